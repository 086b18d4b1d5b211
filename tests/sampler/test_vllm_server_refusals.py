"""Servers of other models, of other settings, or none: refused in one line, before anything is sampled."""

from __future__ import annotations

import re
from functools import cache

import pytest

from core_torl.config.errors import UserError
from core_torl.config.vllm_server_checks import check_servers
from core_torl.sampler.protocol import SampleRequest
from core_torl.sampler.vllm_replicas import free_port
from tests.sampler.fake_vllm import replays
from tests.sampler.record_vllm import model, policy, requests, sampler_of


@pytest.fixture(scope="module")
def policies():
    return policy(0), policy(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 700}, "another model than model.path: core-torl has a vocabulary of 605, the trainer's 700"),
        ({"hidden_size": 64}, "another model than model.path: core-torl has a width of 128, the trainer's 64"),
        ({"num_hidden_layers": 9}, "another model than model.path: core-torl has layers: 2, the trainer's 9"),
    ],
    ids=["vocabulary", "width", "layers"],
)
def test_a_server_of_another_model_is_refused(policies, change, said):
    other = model()
    for key, value in change.items():
        setattr(other.config, key, value)
    with replays("server") as (fake,), pytest.raises(UserError, match=re.escape(said)) as error:
        sampler_of(type(policies[0])(other, policies[0].tokenizer, False), [fake.url])
    assert "\n" not in str(error.value)


def test_a_server_with_raw_logprobs_is_refused(policies, monkeypatch):
    with replays("raw") as (fake,):
        with pytest.raises(UserError, match=r"--logprobs-mode raw_logprobs.*start it with --logprobs-mode processed"):
            sampler_of(policies[0], [fake.url])
        # By what it does, too, where it does not say.
        fake.exchanges = {
            k: [s, t.replace("raw_logprobs", "processed_logprobs")] for k, (s, t) in fake.exchanges.items()
        }
        with pytest.raises(UserError, match=r"from before temperature and truncation"):
            sampler_of(policies[0], [fake.url])


def test_a_server_without_the_calls_for_weights_is_refused(policies):
    with replays("server") as (fake,):
        fake.broken["/server_info"] = (404, '{"detail":"Not Found"}')
        with pytest.raises(UserError, match=r"no calls that change weights: start it with VLLM_SERVER_DEV_MODE=1"):
            sampler_of(policies[0], [fake.url])


def test_a_server_without_room_or_adapters_is_refused(policies):
    with replays("server") as (fake,):
        with pytest.raises(UserError, match=r"takes 512 tokens .*and 513 are needed"):
            sampler_of(policies[0], [fake.url], max_model_len=513)
        fake.exchanges = {k: [s, t.replace('"lora_config": {', '"no": {')] for k, (s, t) in fake.exchanges.items()}
        with pytest.raises(UserError, match=r"takes no adapters.*--enable-lora"):
            sampler_of(policy(0, lora=True), [fake.url], weights="lora")


def test_a_tied_output_layer_on_the_cpu_needs_our_worker(policies):
    with replays("server") as (fake,):
        fake.exchanges = {k: [s, t.replace("WorkerExtension", "Other")] for k, (s, t) in fake.exchanges.items()}
        with pytest.raises(UserError, match=r"tied to the embedding.*--worker-extension-cls core_torl\.sampler"):
            sampler_of(policies[0], [fake.url])


def test_a_server_that_is_down_is_refused(policies):
    with pytest.raises(UserError, match=r"no vLLM server answers at http://127.0.0.1:.*refused") as error:
        sampler_of(policies[0], [f"http://127.0.0.1:{free_port()}"])
    assert "\n" not in str(error.value)


def test_a_server_that_was_left_paused_is_refused_and_not_waited_for(policies, monkeypatch):
    from core_torl.sampler import vllm_client

    monkeypatch.setattr(vllm_client, "_FIRST_S", 0.3)
    with replays("server") as (fake,):
        fake.gate.clear()
        with pytest.raises(UserError, match=r"no answer within 0\.3 s: .*left it paused, curl -X POST http.*/resume"):
            sampler_of(policies[0], [fake.url])


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (SampleRequest((), 2, 0), "empty"),
        (SampleRequest((5, 6), 0, 0), "n < 1"),
        (SampleRequest((5, 6), 1, 0, max_new_tokens=0), "asks for 0 tokens"),
        (SampleRequest(tuple(range(3, 503)), 1, 0), "exceeds the servers' 512: lower sampler.max_new_tokens"),
        (SampleRequest((5, 6), 1, 0, stop=tuple("abcdefgh") * 9), "texts for an answer"),
    ],
    ids=["empty", "no samples", "no tokens", "too long", "too many stops"],
)
def test_impossible_requests_are_one_line_errors_before_anything_is_sampled(policies, request_, word):
    with replays("server") as (fake,):
        sampler = sampler_of(policies[0], [fake.url])
        sampler.sync(policies[0], "0")
        fake.calls.clear()
        with pytest.raises(ValueError, match=word) as error:
            sampler.generate([*requests(), request_])
        assert "\n" not in str(error.value) and not fake.calls
        sampler.close()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"urls": ["ftp://a:1"]}, "'ftp://a:1' is no address of a server; write http://HOST:PORT"),
        ({"urls": ["localhost:8000"]}, "write http://HOST:PORT"),
        ({"urls": ["http://a:x"]}, "write http://HOST:PORT"),
        ({"urls": ["http://localhost:8000/v1"]}, "without a path"),
        ({"urls": ["http://localhost:1", "http://localhost:1/"]}, "a server is named twice"),
        ({"urls": ["http://localhost:1"], "replicas": 2}, "sampler.urls and sampler.replicas"),
        ({"urls": ["http://localhost:1"], "gpus": ["0"]}, "sampler.urls and sampler.replicas"),
        ({"urls": ["http://far:1"]}, "sampler.sync_dir has no value: http://far:1 is another machine"),
        ({"replicas": 0}, "sampler.replicas=0: must be at least 1"),
        ({"replicas": 2, "gpus": ["0"]}, "one entry for each of sampler.replicas=2"),
        ({"weights": "adapters"}, "sampler.weights='adapters': use merged or lora"),
        ({"dtype": "bfloat"}, "sampler.dtype='bfloat': use float32, bfloat16, float16, or null"),
        ({"sync_dir": "/proc/nowhere"}, "sampler.sync_dir=/proc/nowhere: cannot be written"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, dict) else "",
)
def test_settings_are_refused_in_one_line(settings, said):
    whole = {"urls": [], "replicas": 1, "gpus": [], "weights": "merged", "dtype": None, "sync_dir": None, **settings}
    with pytest.raises(UserError, match=re.escape(said)) as error:
        check_servers(**whole)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def composed():
    """``composed(*overrides)``: the config of a training run with this sampler."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from core_torl.config.paths import conf_dir
    from core_torl.config.schema import register

    register()

    @cache
    def base(*groups):
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("train", ["sampler=vllm_server", "paths.output_dir=x", *groups])

    def make(*overrides):
        """Keys are set in a copy: composing takes half a second."""
        groups = [o for o in overrides if "." not in o.split("=")[0]]
        keys = OmegaConf.from_dotlist([o for o in overrides if o not in groups])
        return OmegaConf.merge(base(*groups), keys)

    return make


URLS = "sampler.urls=['http://localhost:1']"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sampler.urls=[ftp://a]"], "sampler.urls: 'ftp://a' is no address"),
        ([URLS, "sampler.concurrency=0"], "sampler.concurrency=0: must be at least 1"),
        ([URLS, "sampler.retries=-1"], "sampler.retries=-1: must be 0 or more"),
        ([URLS, "sampler.timeout_s=0"], "sampler.timeout_s=0.0: must be more than 0"),
        ([URLS, "sampler.weights=lora"], "sampler.weights=lora without adapters: set model.lora.rank"),
        ([URLS, "sampler.colocated=true"], "sampler.colocated with sampler.urls"),
        ([URLS, "sampler.gpu_memory_utilization=2"], "a share of the device"),
        ([URLS, "sampler.max_model_len=24"], "sampler.max_model_len=24 is for prompt and answer together, "),
        (["trainer.num_nodes=2"], "start servers yourself and name them in sampler.urls"),
        (["trainer=gpu"], "sampler.gpus has no value: the trainer is on a GPU"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_configs_are_refused_before_anything_is_loaded(composed, monkeypatch, overrides, said):
    from core_torl.config import vllm_server_checks

    monkeypatch.setattr(vllm_server_checks, "check_vllm", lambda: "0.32.0")
    with pytest.raises(UserError, match=re.escape(said)) as error:
        vllm_server_checks.check_vllm_server(composed(*overrides))
    assert "\n" not in str(error.value)


def test_the_checks_stand_before_the_run(front_door, capsys):
    assert front_door("train", "sampler=vllm_server", "sampler.urls=[ftp://a]") == 2
    assert "sampler.urls: 'ftp://a' is no address" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def loaded(monkeypatch):
    """The models that were loaded meanwhile: none is."""
    from core_torl.model import load

    paths = []

    def refuse(path, **settings):
        paths.append(path)
        raise UserError("a model is loaded")

    monkeypatch.setattr(load, "load_policy", refuse)
    return paths


def test_a_run_whose_server_is_down_ends_before_it_loads_a_model(front_door, capsys, tmp_path, loaded):
    url = f"http://127.0.0.1:{free_port()}"
    overrides = [f"sampler.urls=['{url}']", f"hydra.run.dir={tmp_path}", "logger.mode=disabled"]
    assert front_door("train", "sampler=vllm_server", *overrides) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "sampler.urls" in line]
    assert len(said) == 1 and f"no vLLM server answers at {url} (" in said[0] and "Traceback" not in said[0]
    assert not loaded


def test_a_dry_run_says_which_server_is_not_there(composed):
    from core_torl.runs.dry_run import device_lines

    url = f"http://127.0.0.1:{free_port()}"
    (line,) = device_lines(composed(f"sampler.urls=['{url}']"))
    assert line.startswith(f"not here: sampler.urls: no vLLM server answers at {url} (")
    with replays("server") as (fake,):
        assert not device_lines(composed(f"sampler.urls=['{fake.url}']"))
