"""vllm_server against a real vLLM server, started by the sampler itself: what vLLM has to do for our client to be right.

One server for the whole file, because it takes a minute to start; it serves the shipped policy, and the last test kills
it. What our client makes of its answers is tested everywhere, against a recording (test_vllm_server.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from core_torl.config.errors import UserError
from core_torl.model.load import Policy, load_policy
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.vllm_client import Server
from core_torl.sampler.vllm_server import VllmServerSampler
from tests.sampler.vllm_here import NEEDS_VLLM

pytestmark = [*NEEDS_VLLM, pytest.mark.slow, pytest.mark.timeout(900)]
TOLERANCE = 1e-4


SHIPPED = "shipped:tiny"


def nudged(amount: float, lora: int = 0) -> Policy:
    """The shipped policy with its weights moved a little, or with adapters that say something."""
    targets = ["q_proj", "v_proj", "o_proj"]
    lora_settings = {"rank": lora, "alpha": 8 * lora, "dropout": 0.0, "target_modules": targets} if lora else None
    policy = load_policy(path=SHIPPED, lora=lora_settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(round(1000 * amount))
        for name, parameter in policy.model.named_parameters():
            if not lora or "lora_B" in name:
                parameter.add_(amount * torch.randn_like(parameter))
    policy.model.eval()
    return policy


@pytest.fixture(scope="module")
def base():
    return nudged(0.0)


@pytest.fixture(scope="module")
def own(base, tmp_path_factory):
    """A sampler that has started its server itself."""
    sampler = VllmServerSampler(
        base.model, base.tokenizer, max_new_tokens=24, max_model_len=256, block_size=32, gpu_memory_utilization=0.1,
        kv_cache_mb=64, enforce_eager=True, extra_args=["--enable-lora", "--max-lora-rank", "8"],
        environment={"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        log_dir=str(tmp_path_factory.mktemp("log")), start_timeout_s=600,
    )  # fmt: skip
    try:
        sampler.sync(base, "0")
        yield sampler
    finally:
        sampler.close()


@pytest.fixture
def connect(own, base):
    """``connect(policy, **settings)``: a further sampler on the same server; closed at the end."""
    made = []

    def make(policy, **settings):
        settings = {"max_new_tokens": 24, "urls": [own.fleet.servers[0].url], **settings}
        made.append(VllmServerSampler(policy.model, policy.tokenizer, **settings))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


@pytest.fixture
def requests(base):
    rng = np.random.default_rng(0)
    lengths, sizes = (1, 30, 9, 200, 70), (1, 5, 2, 3, 2)  # some longer than a block of the prefix cache
    return [
        SampleRequest(tuple(map(int, rng.integers(3, len(base.tokenizer), length))), n, i)
        for i, (length, n) in enumerate(zip(lengths, sizes, strict=True))
    ]


@pytest.mark.parametrize(
    "how",
    [
        {}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.2},
        {"min_new_tokens": 9},
    ],
    ids=str,
)  # fmt: skip
def test_logprobs_are_those_of_a_plain_forward(connect, base, requests, largest_gap, how):
    sampler = connect(base)
    sampler.sync(base, "parity")
    sampling = SamplingConfig(24, **how)
    results = sampler.generate(requests, sampling)
    assert largest_gap(base.model, requests, results, sampling, sampler.eos_ids) < TOLERANCE
    for s in (s for group in results for s in group):
        assert s.weight_version == "parity" and len(s.token_ids) > sampling.min_new_tokens
        assert (s.token_ids[-1] in sampler.eos_ids) == (s.finish == "eos")


def test_an_answer_depends_on_its_seed_alone(connect, base, requests):
    sampler = connect(base)
    sampler.sync(base, "0")
    together = sampler.generate(requests)
    assert [sampler.generate([r])[0] for r in requests] == together
    assert len({s.token_ids for s in together[1]}) > 1
    small, other = sampler.generate(
        [SampleRequest(requests[1].prompt_ids, 2, 1), SampleRequest(requests[1].prompt_ids, 5, 99)]
    )
    assert small == together[1][:2] and other != together[1]


def test_a_stop_string_ends_an_answer_even_inside_a_token(connect, base, requests):
    sampler = connect(base, max_new_tokens=40)
    sampler.sync(base, "0")
    request = [SampleRequest(requests[1].prompt_ids, 16, 0)]
    free = [s.token_ids for s in sampler.generate(request)[0]]
    decode = base.tokenizer.decode
    row, place = next(
        (r, p)
        for r, ids in enumerate(free)
        for p in range(2, len(ids))
        if re.fullmatch(r" ?[a-zA-Z]{3,}", decode([ids[p]]))
    )
    stop = decode(list(free[row][: place + 1]))[-len(decode([free[row][place]])) :][:-1]  # ends inside the token
    stopped = sampler.generate(request, SamplingConfig(40, stop=("never said", stop)))[0]
    assert stopped[row].finish == "stop" and stopped[row].stop == stop
    for whole, sample in zip(free, stopped, strict=True):
        ends = [m for m in range(1, len(whole) + 1) if stop in decode(list(whole[:m]))]
        assert sample.token_ids == whole[: ends[0] if ends else None]
        assert (sample.finish == "stop") == bool(ends)


def test_sync_brings_new_weights_and_forgets_old_keys(connect, base, requests, largest_gap):
    sampler = connect(base)
    sampler.sync(base, "0")
    before = sampler.generate(requests)
    moved = nudged(0.05)
    sampler.sync(moved, "7")
    after = sampler.generate(requests)
    assert {s.weight_version for g in after for s in g} == {"7"} and before != after
    assert largest_gap(moved.model, requests, after, sampler.sampling) < TOLERANCE
    assert largest_gap(base.model, requests, after, sampler.sampling) > 0.1
    print(f"sync took {sampler.sync_seconds * 1000:.0f} ms")


def test_without_the_reset_old_keys_would_be_used(connect, base, requests, largest_gap, monkeypatch):
    """What the reset is for: with it left out (and /pause kept from doing it), long prompts are answered wrongly."""
    sampler = connect(base)
    sampler.sync(base, "0")
    sampler.generate(requests)
    moved = nudged(0.05)
    call = Server.call

    def careless(self, method, path, *arguments, **named):
        path = "/pause?mode=wait&clear_cache=false" if path.startswith("/pause") else path
        return {"success": True} if path == "/reset_prefix_cache" else call(self, method, path, *arguments, **named)

    monkeypatch.setattr(Server, "call", careless)
    sampler.sync(moved, "8")
    stale = sampler.generate(requests)
    gap = largest_gap(moved.model, requests, stale, sampler.sampling)
    monkeypatch.undo()
    sampler.sync(moved, "9")
    assert gap > 100 * TOLERANCE
    assert largest_gap(moved.model, requests, sampler.generate(requests), sampler.sampling) < TOLERANCE


def test_adapters_are_loaded_and_replaced(connect, base, requests, largest_gap):
    """On the server's own weights, so they have to be those that the adapters stand on."""
    connect(base).sync(base, "base")
    first, second = nudged(0.3, lora=4), nudged(0.6, lora=4)
    sampler = connect(first, weights="lora")
    for version, adapted in (("a", first), ("b", second)):
        sampler.sync(adapted, version)
        results = sampler.generate(requests)
        assert {s.weight_version for g in results for s in g} == {version}
        assert largest_gap(adapted.model, requests, results, sampler.sampling) < TOLERANCE
        with adapted.model.disable_adapter():
            assert largest_gap(adapted.model, requests, results, sampler.sampling) > 0.1
    names = [m["id"] for m in httpx.get(f"{sampler.fleet.servers[0].url}/v1/models", trust_env=False).json()["data"]]
    assert [n for n in names if n.startswith("core-torl-")] == [sampler.fleet.servers[0].model]


def test_a_session_is_resumed(connect, base, requests, log_distributions):
    sampler = connect(base)
    sampler.sync(base, "0")
    given, resumed = (31, 7, 7), set()
    stop = ("1", "2", "3", " the", " is", ".")
    with sampler.session(requests, SamplingConfig(24, stop=stop)) as session:
        while session.running:
            for row in session.advance():
                if (
                    session.answer(row).finish == "stop"
                    and row not in resumed
                    and len(session.answer(row).token_ids) < 20
                ):
                    resumed.add(row)
                    session.resume(row, given, ())
        answers = [session.answer(row) for row in range(sum(r.n for r in requests))]
    assert resumed
    for row, request in enumerate(r for r in requests for _ in range(r.n)):
        answer = answers[row]
        right = log_distributions(base.model, request.prompt_ids, answer.token_ids, SamplingConfig(24))
        right = right[np.arange(len(answer.token_ids)), list(answer.token_ids)]
        drawn = np.array(answer.logprobs) != 0
        assert np.abs(right - np.array(answer.logprobs))[drawn].max() < TOLERANCE
        assert (~drawn).sum() == (len(given) if row in resumed else 0)


def test_three_steps_of_core_cr(own, base, front_door, tmp_path):
    """Training from the front door, its answers over HTTP; the weights of each step reach the server."""
    url = own.fleet.servers[0].url
    assert front_door(
        "train", "variant=core_cr", "sampler=vllm_server", f"sampler.urls=['{url}']", "rl_steps=3", "evaluate_every=0",
        "logger.mode=disabled", f"hydra.run.dir={tmp_path}", "prompts_per_step=4", "group_size=4",
        "evaluation.max_problems=4", "evaluation.permutations=0", "evaluation.samples=1",
    ) == 0  # fmt: skip
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [s for s in steps if "train/optimizer_steps" in s]
    assert len(steps) == 3 and steps[-1]["train/optimizer_steps"] >= 3
    assert max(s["policy/sampler_logprob_gap_max"] for s in steps[:1]) < TOLERANCE
    assert all(s["rollout/retried"] == 0 and s["policy/sync_gap"] < TOLERANCE for s in steps)
    versions = httpx.get(f"{url}/weight_info", trust_env=False).json()["weight_version"]
    assert versions == str(int(steps[-1]["train/optimizer_steps"]))


def test_a_killed_server_is_one_line_and_comes_back_at_the_next_sync(own, base, requests, largest_gap):
    """Last in this file: it kills the server that the others use."""
    own.sync(base, "0")
    own.generate(requests)
    pid = next(
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit()
        and str(own.own.replicas[0].port) in cmdline(p)
        and "core_torl.sampler.vllm_watch" not in cmdline(p)
    )
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"no vLLM server is left.*server-0\.log.*resume=auto") as error:
        own.generate(requests)
    assert "\n" not in str(error.value)
    moved = nudged(0.05)
    own.sync(moved, "again")
    results = own.generate(requests)
    assert {s.weight_version for g in results for s in g} == {"again"}
    assert largest_gap(moved.model, requests, results, own.sampling) < TOLERANCE


def cmdline(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
