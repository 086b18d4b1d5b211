"""vLLM's absence, wrong versions and wrong settings are one line each, before anything heavy is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from core_torl.config import vllm_checks
from core_torl.config.checks import check_train
from core_torl.config.errors import UserError
from core_torl.config.vllm_checks import check_vllm, vllm_version

from .test_compose import composed


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4", "0.32.0+cpu"])
def test_tested_versions_are_taken(installed, version):
    installed(version)
    assert check_vllm() == version


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "dev"])
def test_other_versions_are_refused_with_the_command_that_helps(installed, version):
    installed(version)
    with pytest.raises(UserError, match=r"never tested here; pip install 'core-torl\[vllm\]'"):
        check_vllm()


def test_a_package_that_does_not_say_its_version_is_refused(installed):
    installed("x", text="")
    assert vllm_version() == "unknown"
    with pytest.raises(UserError, match="vLLM unknown was never tested"):
        check_vllm()


def test_missing_vllm_is_said_with_the_command_that_installs_it(installed):
    installed(None)
    with pytest.raises(UserError, match=r"not installed; pip install 'core-torl\[vllm\]'") as error:
        check_train(composed("train", "sampler=vllm"))
    assert "\n" not in str(error.value)
    check_train(composed("train"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sampler.weights=merge"], "sampler.weights='merge'.*Did you mean 'merged'"),
        (["sampler.weights=lora"], "set model.lora.rank"),
        (["sampler.sleep_level=3"], "sampler.sleep_level=3"),
        (["sampler.gpu_memory_utilization=90"], "a share of the device"),
        (["sampler.max_rows=0"], "sampler.max_rows=0"),
        (["sampler.kv_cache_mb=0"], "sampler.kv_cache_mb=0"),
        (["sampler.max_model_len=800"], "prompt and answer together.*set it to 816 at least"),
        (["sampler.dtype=half"], r"sampler\.dtype='half': use float32"),
        (
            ["trainer=gpu", "variant.overlap=true"],
            "variant.overlap=true with sampler=vllm: engine and trainer share a GPU",
        ),
        (["sampler.top_p=0.9"], "sampler.top_p=0.9 in training"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_wrong_settings_are_one_line_errors(installed, overrides, says):
    installed("0.32.0")
    with pytest.raises(UserError, match=says) as error:
        check_train(composed("train", "sampler=vllm", *overrides))
    assert "\n" not in str(error.value)


def test_right_settings_pass_on_the_cpu_too(installed):
    installed("0.32.0")
    check_train(composed("train", "sampler=vllm", "sampler.weights=lora", "model.lora.rank=8", "trainer=cpu"))
    assert vllm_checks.check_vllm_sampler(SimpleNamespace(sampler=SimpleNamespace(_target_="x.Other"))) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("trainer", "dtype"), [("cpu", None), ("gpu", "bfloat16")])
def test_the_engine_computes_in_what_the_trainer_computes_in(trainer, dtype):
    """float32 weights under bf16-mixed are read in bfloat16 by the trainer: in float32 the engine would take twice as much."""
    assert composed("train", "sampler=vllm", f"trainer={trainer}").sampler.dtype == dtype
