"""Answers that are interrupted and sent on: both kinds of session, held against plain forward passes and each other."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from core_torl.sampler.draw import uniforms
from core_torl.sampler.generate_session import GenerateSession
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.transformers import TransformersSampler
from tests.sampler.vllm_here import NEEDS_VLLM, make_vllm

GIVEN = (31, 7, 7, 120)


@contextmanager
def whole(sampler, requests, sampling):
    yield GenerateSession(sampler, requests, sampling)


@pytest.fixture(params=["kept rows", "generate", pytest.param("vllm", marks=NEEDS_VLLM)])
def open_session(request, make_tiny, tiny_tokenizer):
    """``open_session(requests, sampling)``; its attribute ``model`` is what is sampled from."""
    settings = {"max_new_tokens": 24, "eos_ids": [2]}
    if request.param == "vllm":
        model = make_tiny(seed=1, heads=1)
        sampler = make_vllm(model, tiny_tokenizer, **settings)
        request.addfinalizer(sampler.close)
    else:
        model = make_tiny(seed=1)
        sampler = TransformersSampler(model, tiny_tokenizer, engine="cascade", **settings)
    kept = request.param != "generate"

    def make(requests, sampling=None):
        sampling = sampling or sampler.sampling
        return sampler.session(requests, sampling) if kept else whole(sampler, requests, sampling)

    make.model, make.sampler = model, sampler  # type: ignore[attr-defined]
    return make


def run(session, on_turn) -> None:
    while session.running:
        for row in session.advance():
            on_turn(row)


def test_a_session_that_nobody_interrupts_is_generate(open_session, uneven_requests, tiny_tokenizer):
    requests = uneven_requests(len(tiny_tokenizer))
    ended: list[int] = []
    with open_session(requests) as session:
        assert session.running == sum(r.n for r in requests)
        run(session, lambda row: (ended.append(row), session.release(row)))
        answers = [session.answer(row) for row in range(len(ended))]
    assert sorted(ended) == list(range(sum(r.n for r in requests)))
    plain = [s for group in open_session.sampler.generate(requests) for s in group]
    assert [(a.token_ids, a.finish, a.stop) for a in answers] == [(s.token_ids, s.finish, s.stop) for s in plain]


@pytest.mark.parametrize("times", [1, 3])
def test_given_tokens_are_read_and_not_drawn(open_session, uneven_requests, tiny_tokenizer, times):
    """Behind given tokens the log-probs are those of a plain forward over prompt, answer and given tokens together."""
    stop = tuple(tiny_tokenizer.decode([i]) for i in range(30, 300, 4))
    requests = uneven_requests(len(tiny_tokenizer))
    given: dict[int, list[int]] = {}
    resumed: dict[int, int] = {}

    with open_session(requests, SamplingConfig(24, stop=stop)) as session:

        def on_turn(row: int) -> None:
            answer = session.answer(row)
            if answer.finish == "stop" and resumed.get(row, 0) < times and len(answer.token_ids) + len(GIVEN) < 24:
                resumed[row] = resumed.get(row, 0) + 1
                given.setdefault(row, []).append(len(answer.token_ids))
                session.resume(row, GIVEN, stop if resumed[row] < times else ())
            else:
                session.release(row)

        run(session, on_turn)
        answers = [session.answer(row) for row in range(sum(r.n for r in requests))]
    assert len(given) > 3 and max(resumed.values()) == times
    prompts = [r.prompt_ids for r in requests for _ in range(r.n)]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logits = open_session.model(input_ids=torch.tensor([[*prompt, *answer.token_ids]]), use_cache=False).logits[
                0
            ]
        places = torch.arange(len(answer.token_ids)) + len(prompt) - 1
        right = logits.log_softmax(-1)[places, list(answer.token_ids)].numpy()
        own = np.ones(len(answer.token_ids), dtype=bool)
        for start in given.get(row, []):
            assert answer.token_ids[start : start + len(GIVEN)] == GIVEN
            own[start : start + len(GIVEN)] = False
        assert np.abs(right - np.array(answer.logprobs))[own].max() < 1e-4
        assert not np.array(answer.logprobs)[~own].any()


def test_a_row_cannot_be_sent_on_without_room(open_session):
    with open_session([SampleRequest((5, 6), 1, 0)], SamplingConfig(4)) as session:
        run(session, lambda row: None)
        left = 4 - len(session.answer(0).token_ids)
        with pytest.raises(ValueError, match=f"{left} tokens left, no room for 4"):
            session.resume(0, GIVEN, ())


def test_a_continued_request_draws_what_the_uninterrupted_one_draws(make_tiny, tiny_tokenizer):
    """The second half of an answer asked for by itself, for each answer of a group.

    Embedded samplers promise this. In vLLM a request owns its generator: see test_vllm.py for what holds there.
    """
    sampler = TransformersSampler(make_tiny(seed=2), tiny_tokenizer, max_new_tokens=20, eos_ids=[2])
    (whole_group,) = sampler.generate([SampleRequest((9, 8, 7), 4, seed=3)])
    for j, sample in enumerate(whole_group):
        half = len(sample.token_ids) // 2
        rest = SampleRequest(
            (9, 8, 7, *sample.token_ids[:half]), 1, seed=3, first=j, start=half, max_new_tokens=20 - half
        )
        ((other,),) = sampler.generate([rest])
        assert other.token_ids == sample.token_ids[half:] and other.finish == sample.finish


def test_streams_go_on_where_they_stood():
    long = uniforms([SampleRequest((1,), 3, seed=5)], 12)
    rest = uniforms([SampleRequest((1,), 1, seed=5, first=2, start=7)], 5)
    assert torch.equal(long[2, 7:], rest[0])


def test_requests_may_have_limits_and_stops_of_their_own(make_tiny, tiny_tokenizer):
    sampler = TransformersSampler(make_tiny(seed=2), tiny_tokenizer, max_new_tokens=20, eos_ids=[2])
    requests = [SampleRequest((9, 8), 2, seed=3, max_new_tokens=5), SampleRequest((9, 8), 2, seed=3)]
    short, long = sampler.generate(requests)
    assert [s.token_ids for s in short] == [s.token_ids[:5] for s in long]
    stop = tiny_tokenizer.decode([long[0].token_ids[2]])
    ((stopped, *_),) = sampler.generate([SampleRequest((9, 8), 2, seed=3, stop=(stop,))])
    assert stopped.finish == "stop" and len(stopped.token_ids) <= 3
    with pytest.raises(ValueError, match="asks for 0 tokens"):
        sampler.generate([SampleRequest((9, 8), 1, seed=3, max_new_tokens=0)])
