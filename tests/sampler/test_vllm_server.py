"""Our client of vLLM servers, held against what a real vLLM 0.32 server once said.

The servers here are replays of recordings (fake_vllm.py): these tests hold our client, not vLLM. Whether vLLM still
behaves as recorded is asked by test_vllm_server_live.py, where vLLM is installed.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from core_torl.config.errors import UserError
from core_torl.sampler.protocol import Sampler, SampleRequest, SamplingConfig
from core_torl.sampler.vllm_params import sample_seeds
from tests.sampler.fake_vllm import RECORDED, replays
from tests.sampler.record_vllm import EOS, HOW, STOP, policy, requests, run_session, sampler_of

TOLERANCE = 1e-4


def wait_for(what, seconds: float = 20.0) -> bool:
    give_up = time.monotonic() + seconds
    while not what() and time.monotonic() < give_up:
        time.sleep(0.01)
    return bool(what())


FIRST_SYNC = [
    "POST /pause?mode=wait",
    "POST /collective_rpc",
    "GET /weight_info",
    "POST /update_weight_version",
    "POST /reset_prefix_cache",
    "POST /resume",
]


@pytest.fixture(scope="module")
def policies():
    return policy(0), policy(1)


@pytest.fixture
def start(policies):
    """``start(count, **settings)``: replayed servers and a sampler on them that has weights; closed at the end."""
    opened = []

    def make(count=1, sync=True, **settings):
        servers = replays(*["server"] * count)
        fakes = servers.__enter__()
        settings = {"backoff_s": 0.01, "timeout_s": 20.0, **settings}
        sampler = sampler_of(policies[0], [f.url for f in fakes], **settings)
        opened.append((servers, sampler))
        if sync:
            sampler.sync(policies[0], "0")
        return fakes, sampler

    yield make
    for servers, sampler in opened:
        sampler.close()
        servers.__exit__(None, None, None)


def test_the_recording_is_of_a_tested_version():
    from core_torl.config.vllm_checks import TESTED_VLLM

    for name in ("server", "raw"):
        version = json.loads((RECORDED / f"{name}.json").read_text())["vllm"]
        assert TESTED_VLLM[0] <= tuple(map(int, version.split(".")[:2])) < TESTED_VLLM[1]


# ---- answers


@pytest.mark.parametrize("how", HOW)
def test_answers_are_read_with_the_logprobs_of_a_plain_forward(start, policies, largest_gap, how):
    """vLLM's numbers as they were recorded, held against transformers here."""
    _, sampler = start()
    results = sampler.generate(requests(), HOW[how])
    assert [len(group) for group in results] == [r.n for r in requests()]
    assert largest_gap(policies[0].model, requests(), results, HOW[how], EOS) < TOLERANCE
    samples = [s for group in results for s in group]
    assert {s.weight_version for s in samples} == {"0"}
    for s in samples:
        if s.finish == "eos":
            assert s.token_ids[-1] in EOS and s.stop == s.token_ids[-1] and not set(EOS) & set(s.token_ids[:-1])
        elif s.finish == "length":
            assert len(s.token_ids) == 24 and s.stop is None
        else:
            assert (s.finish, s.stop) == ("stop", "1") and how == "stop"
            text = policies[0].tokenizer.decode(list(s.token_ids))
            assert "1" in text and "1" not in policies[0].tokenizer.decode(list(s.token_ids[:-1]))
    kinds = {s.finish for s in samples}
    assert kinds >= {"eos", "stop"} if how == "stop" else "eos" in kinds
    if how == "late":
        assert min(len(s.token_ids) for s in samples) > 9


def test_it_is_a_sampler_and_every_answer_is_asked_for_with_its_own_seed(start):
    (fake,), sampler = start()
    assert isinstance(sampler, Sampler)
    assert sampler.generate([]) == []
    fake.bodies.clear()
    results = sampler.generate(requests())
    assert sorted(b["seed"] for b in fake.bodies) == sorted(s for r in requests() for s in sample_seeds(r))
    assert {b["n"] for b in fake.bodies} == {1} and {b["repetition_penalty"] for b in fake.bodies} == {1.0}
    assert sampler.generate(requests()) == results
    assert len({s.token_ids for s in results[1]}) == 4


def test_prompts_are_spread_and_the_answers_to_one_keep_together(start):
    fakes, sampler = start(2)
    asked = [SampleRequest((3 + i, 4, 5), 2, i) for i in range(12)]
    for fake in fakes:
        fake.delay_s = 0.02
        fake.bodies.clear()
    sampler.generate(asked)
    homes = [{tuple(b["prompt"][0]) for b in fake.bodies} for fake in fakes]
    assert not homes[0] & homes[1] and len(homes[0] | homes[1]) == 12
    assert [len(home) for home in homes] == [6, 6]


def test_a_busy_server_gets_fewer_prompts(start):
    fakes, sampler = start(2, concurrency=2)
    for fake in fakes:
        fake.bodies.clear()
    fakes[0].gate.clear()

    def open_again():
        assert wait_for(lambda: len(fakes[1].bodies) == 22)
        fakes[0].gate.set()

    threading.Thread(target=open_again).start()
    sampler.generate([SampleRequest((3 + i, 4, 5), 2, i) for i in range(12)])
    assert [len(fake.bodies) for fake in fakes] == [2, 22]


def test_no_more_answers_are_under_way_than_allowed(start):
    (fake,), sampler = start(concurrency=3)
    fake.delay_s = 0.02
    sampler.generate([SampleRequest((5, 6, 7), 64, 9)])
    assert fake.most_at_once == 3


# ---- failures


def test_a_server_that_dies_in_a_step_is_replaced_by_another_with_the_same_seeds(start, caplog):
    expected = start()[1].generate(requests())
    fakes, sampler = start(2)
    fakes[0].delay_s = fakes[1].delay_s = 0.05
    threading.Timer(0.02, lambda: setattr(fakes[0], "healthy", False)).start()
    fakes[0].drop = 3
    assert sampler.generate(requests()) == expected
    assert sampler.retried > 0 and [s.alive for s in sampler.fleet.servers] == [False, True]
    assert f"1 left ({fakes[0].url}" in caplog.text


def test_a_lost_server_comes_back_with_the_next_weights_and_not_before(start, policies):
    fakes, sampler = start(2)
    sampler.generate(requests())
    fakes[0].healthy = False
    sampler.generate(requests())
    fakes[0].restart()
    fakes[0].calls.clear()
    sampler.generate(requests())
    assert not fakes[0].calls, "it holds other weights"
    sampler.sync(policies[1], "1")
    assert [s.alive for s in sampler.fleet.servers] == [True, True]
    assert fakes[0].calls[-len(FIRST_SYNC) :] == FIRST_SYNC and "GET /v1/models" in fakes[0].calls
    fakes[0].bodies.clear()
    sampler.generate(requests())
    assert fakes[0].bodies


def test_a_server_that_only_stumbles_is_asked_again(start):
    (fake,), sampler = start()
    expected = sampler.generate(requests())
    fake.drop = 2
    assert sampler.generate(requests()) == expected
    assert sampler.retried == 2 and sampler.fleet.alive


def test_with_no_server_left_the_error_is_one_line(start):
    (fake,), sampler = start()
    sampler.fleet.servers[0].log = Path("outputs/run/vllm/server-0.log")
    fake.healthy = False
    with pytest.raises(
        UserError, match=r"no vLLM server is left.*output: outputs/run/vllm/server-0\.log.*resume=auto"
    ) as e:
        sampler.generate(requests())
    assert "\n" not in str(e.value)


def test_a_server_that_fails_every_time_is_given_up(start):
    (fake,), sampler = start(retries=2)
    fake.broken["/v1/completions"] = (500, '{"error": {"message": "out of luck"}}')
    with pytest.raises(UserError, match=r"no vLLM server is left.*HTTP status 500 .out of luck"):
        sampler.generate([SampleRequest((5, 6, 7), 1, 0)])
    assert len(fake.bodies) == 1 + 1 + 2, "the probe, and three attempts"


def test_a_timeout_is_a_failure_of_the_server(start):
    expected = start()[1].generate(requests())
    fakes, sampler = start(2, timeout_s=0.5, retries=0)
    fakes[0].gate.clear()
    assert sampler.generate(requests()) == expected
    assert not sampler.fleet.servers[0].alive and "Timeout" in sampler.fleet.last_failure


def test_a_request_that_the_server_refuses_is_not_repeated(start):
    (fake,), sampler = start()
    fake.broken["/v1/completions"] = (400, '{"error": {"message": "Token id 605 is out of vocabulary"}}')
    with pytest.raises(UserError, match=r"refuses a request.*Token id 605 is out of vocabulary"):
        sampler.generate([SampleRequest((5, 6, 7), 1, 0)])
    assert len(fake.bodies) == 2 and sampler.retried == 0


# ---- weights


def test_weights_are_handed_over_between_answers_and_old_keys_forgotten(start, policies):
    """The order matters: no answer under way, then the weights, then the cache emptied, then on."""
    (fake,), sampler = start(sync=False)
    fake.calls.clear()
    sampler.sync(policies[0], "0")
    assert fake.calls == FIRST_SYNC
    before = sampler.generate(requests())
    fake.calls.clear()
    sampler.sync(policies[1], "1")
    assert fake.calls == FIRST_SYNC and sampler.sync_seconds > 0
    after = sampler.generate(requests())
    assert {s.weight_version for g in after for s in g} == {"1"} and before != after


def test_new_weights_are_those_that_are_sampled_from(start, policies, largest_gap):
    _, sampler = start()
    sampler.sync(policies[1], "1")
    results = sampler.generate(requests())
    sampling = SamplingConfig(24)
    assert largest_gap(policies[1].model, requests(), results, sampling) < TOLERANCE
    assert largest_gap(policies[0].model, requests(), results, sampling) > 0.5


def test_a_cache_that_cannot_be_emptied_takes_the_server_out(start, policies):
    (fake,), sampler = start()
    fake.broken["/reset_prefix_cache"] = (200, '{"success": false}')
    fake.calls.clear()
    with pytest.raises(UserError, match=r"no vLLM server is left.*the cache is in use"):
        sampler.sync(policies[1], "1")
    assert fake.calls.count("POST /pause?mode=wait") == 2 == fake.calls.count("POST /resume"), "it stays paused"
    with pytest.raises(UserError, match=r"no vLLM server is left"):
        sampler.generate(requests())


def test_nothing_is_sampled_before_the_first_sync(start):
    (fake,), sampler = start(sync=False)
    fake.bodies.clear()
    with pytest.raises(RuntimeError, match=r"no weights yet; call sync first"):
        sampler.generate(requests())
    assert not fake.bodies


def test_answers_of_a_server_that_started_anew_are_thrown_away(start):
    """It was started again within the call, under its old address, and answered with the weights it started with."""
    expected = start()[1].generate(requests())
    fakes, sampler = start(2)
    asked, calls = sampler.fleet.submit, []

    def submit(job):
        calls.append(asked(job))
        if len(calls) == 11:  # all that there are
            for future in calls:
                future.result()  # none is under way when it starts anew: the recording has no such answers
            fakes[0].restart()
        return calls[-1]

    sampler.fleet.submit = submit
    assert sampler.generate(requests()) == expected
    assert [s.alive for s in sampler.fleet.servers] == [False, True] and sampler.retried > 0
    assert len(calls) > 11 and "it holds the weights 'none' and not '0'" in sampler.fleet.last_failure


def test_a_session_whose_server_started_anew_ends_in_an_error(start):
    fakes, sampler = start(2)
    with (
        pytest.raises(UserError, match=r"holds the weights 'none'.*its answers are of no use"),
        sampler.session(requests(), STOP) as session,
    ):
        while session.running:
            session.advance()
        fakes[0].restart()


def test_adapters_come_under_names_never_used_and_go_again(policies):
    both = [policy(0, lora=True), policy(1, lora=True)]
    with replays("server") as (fake,):
        sampler = sampler_of(both[0], [fake.url], weights="lora")
        names = []
        for version, adapted in enumerate(both):
            fake.bodies.clear()
            sampler.sync(adapted, f"adapter {version}")
            results = sampler.generate(requests())
            names += sorted({b["model"] for b in fake.bodies})
            assert {s.weight_version for g in results for s in g} == {f"adapter {version}"}
        assert len(names) == 2 and all(n.startswith("core-torl-") for n in names)
        assert [c for c in fake.calls if "lora" in c or "reset" in c] == [
            "POST /v1/load_lora_adapter", "POST /reset_prefix_cache",
            "POST /v1/load_lora_adapter", "POST /reset_prefix_cache", "POST /v1/unload_lora_adapter",
        ]  # fmt: skip
        with pytest.raises(UserError, match=r"sampler\.weights=lora with model\.lora\.rank=0"):
            sampler.sync(policies[0], "2")
        sampler.close()


def test_adapters_are_sampled_from(largest_gap):
    adapted = policy(0, lora=True)
    with replays("server") as (fake,):
        sampler = sampler_of(adapted, [fake.url], weights="lora")
        sampler.sync(adapted, "adapter 0")
        results = sampler.generate(requests())
        sampler.close()
    assert largest_gap(adapted.model, requests(), results, SamplingConfig(24)) < TOLERANCE
    with adapted.model.disable_adapter():
        assert largest_gap(adapted.model, requests(), results, SamplingConfig(24)) > 0.1


def test_the_end_leaves_nothing_behind(start, tmp_path, policies):
    before = threading.active_count()
    with replays("server") as (fake,):
        sampler = sampler_of(policies[0], [fake.url], sync_dir=str(tmp_path / "sync"))
        sampler.sync(policies[0], "0")
        sampler.generate(requests())
        assert list((tmp_path / "sync").iterdir())
        sampler.close()
        sampler.close()
        assert not list((tmp_path / "sync").iterdir())
        assert not [t for t in threading.enumerate() if t.name == "vllm-requests"] and before


# ---- sessions


def test_a_session_sends_rows_on_at_the_same_server(start, policies, log_distributions):
    fakes, sampler = start(2)
    for fake in fakes:
        fake.bodies.clear()
    resumed: list[int] = []
    answers = run_session(sampler, resumed.append)
    assert len(resumed) > 2
    rows = [r for r in requests() for _ in range(r.n)]
    for row, (request, answer) in enumerate(zip(rows, answers, strict=True)):
        own = np.ones(len(answer.token_ids), dtype=bool)
        if row in resumed:
            place = next(i for i in range(len(answer.token_ids)) if answer.token_ids[i : i + 3] == (31, 7, 120))
            own[place : place + 3] = False
            assert answer.logprobs[place : place + 3] == (0.0, 0.0, 0.0)
            first = request.prompt_ids
            asked = [i for i, f in enumerate(fakes) for b in f.bodies if tuple(b["prompt"][0])[: len(first)] == first]
            assert len(set(asked)) == 1
        right = log_distributions(policies[0].model, request.prompt_ids, answer.token_ids, SamplingConfig(24))
        gaps = right[np.arange(len(answer.token_ids)), list(answer.token_ids)] - np.array(answer.logprobs)
        assert np.abs(gaps[own]).max() < TOLERANCE
    with sampler.session([SampleRequest((3, 4, 5), 2, 0)]) as session:
        while session.running:
            session.advance()
        left = 24 - len(session.answer(0).token_ids)
        with pytest.raises(ValueError, match=f"{left} tokens left, no room for 24"):
            session.resume(0, (1,) * 24, ())


def test_a_row_that_ends_is_told_while_others_go_on(start):
    fakes, sampler = start(2)
    fakes[1].gate.clear()
    with sampler.session([SampleRequest((3, 4, 5), 2, 0), SampleRequest((4, 4, 5), 2, 1)]) as session:
        ended = session.advance()
        assert ended and session.running
        fakes[1].gate.set()
        while session.running:
            ended += session.advance()
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_session_that_is_left_early_gives_up_what_is_under_way(start):
    (fake,), sampler = start()
    fake.gate.clear()
    with pytest.raises(RuntimeError, match="made by the test"), sampler.session(requests()) as session:
        under_way = dict(session._under_way)
        raise RuntimeError("made by the test")
    assert under_way and all(future.cancelled() for future in under_way.values())


def test_shared_gpus_are_given_back_while_the_trainer_learns(start, policies):
    (fake,), sampler = start()
    sampler.colocated = True
    for path in ("/sleep", "/wake_up"):
        fake.broken[path] = (200, "{}")
    fake.calls.clear()
    sampler.sleep()
    sampler.sleep()
    sampler.generate(requests())
    assert [c for c in fake.calls if "sleep" in c or "wake" in c] == ["POST /sleep?level=1&mode=wait", "POST /wake_up"]
    sampler.sleep()
    sampler.sync(policies[1], "1")
    assert fake.calls.index("POST /pause?mode=wait") > fake.calls.index("POST /wake_up")


def test_prompt_and_answer_may_take_what_the_servers_take(start):
    _, sampler = start(2)
    assert sampler.max_model_len == 512
    sampler.fleet.servers[1].max_model_len = 100
    assert sampler.max_model_len == 100
    sampler.fleet.servers[1].max_model_len = 1 << 20
    sampler._positions = 300
    assert sampler.max_model_len == 300
