"""The tool loop: which tokens are the policy's own, what is run, when an answer ends, and that waiting changes nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core_torl.code_blocks import OUTPUT
from core_torl.sampler.generate_session import GenerateSession
from core_torl.sampler.protocol import Sampler, SampleRequest
from core_torl.sampler.transformers import TransformersSampler
from core_torl.sandbox.protocol import Execution
from core_torl.tool.observation import Observations
from core_torl.tool.tool_sampler import ToolSampler, _Loop, encode_plainly

GOOD = Execution("17\n", "", "ok", 0.5)
ASK = "x\n```python\nprint(1)\n```\n```output"


@pytest.fixture
def tools(tiny_tokenizer, scripted, fake_sandbox):
    """``tools(scripts, C, rule=...)``: a sampler with tools whose policy writes what ``scripts`` say."""

    def make(scripts, budget: int, rule=lambda code: GOOD, limit: int = 10_000, **options) -> ToolSampler:
        sampler = scripted(tiny_tokenizer, scripts, limit)
        rules = options.pop("observation", Observations())
        return ToolSampler(
            sampler, fake_sandbox(rule), tiny_tokenizer, observation=rules, call_budget=budget, **options
        )

    return make


def ask(scripts) -> list[SampleRequest]:
    return [SampleRequest((5, 6), len(rows), seed=i) for i, rows in enumerate(scripts)]


def test_it_is_a_sampler(tools):
    sampler = tools([[["x"]]], 1)
    assert isinstance(sampler, Sampler) and sampler.generate([]) == []


# ---- which tokens are the policy's own ---------------------------------------------------------------------------

PIECES = st.sampled_from(
    ["x", " is 12", "\n", "```python\nprint(1)\n```\n", "```py\n1/0\n```", "```\n", "é", "\\boxed{3}", "```python\n", "</s", "  "]
)  # fmt: skip
TURNS = st.lists(st.tuples(st.lists(PIECES, max_size=5).map("".join), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=TURNS, budget=st.integers(1, 4), policy=st.sampled_from(["last", "all", "first"]))
def test_trained_positions_are_the_sampled_positions(tools, endings, tiny_tokenizer, script, budget, policy):
    """For every budget and layout: what the policy said, token for token and in order, is what is trained."""
    rows = [[text + (OUTPUT if asks else "") for text, asks in script]]
    sampler = tools([rows], budget, endings, block_policy=policy)
    ((sample,),) = sampler.generate(ask([rows]))
    own = [i for i, mine in zip(sample.token_ids, sample.sampled, strict=True) if mine]
    assert own == sampler.sampler.said[0, 0]
    for call in sample.calls:
        assert not any(sample.sampled[call.start : call.end])
        shown = tiny_tokenizer.decode(list(sample.token_ids[call.start : call.end]))
        assert shown.strip("\n") == f"{call.observation}\n```"
        assert all(p == 0 for p in sample.logprobs[call.start : call.end])
    assert sum(sample.sampled) == sample.drawn == len(own)
    assert len(sample.calls) <= budget
    assert sampler.sandbox.codes == [c.code for c in sample.calls]
    assert [t for turn in sample.turns for t in turn] == own


def test_nothing_is_tokenised_again(tools, tiny_tokenizer):
    """Ids that decode to a text but are not its encoding stay what they are."""
    odd = [tiny_tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in b"x"]
    assert tiny_tokenizer.decode(odd) == "x" and tiny_tokenizer("x", add_special_tokens=False)["input_ids"] != odd

    class Odd(type(tools([[[""]]], 1).sampler)):
        def generate(self, requests, sampling=None):
            groups = super().generate(requests, sampling)
            for group in groups:
                for k, s in enumerate(group):
                    group[k] = type(s)((*odd, *s.token_ids), (-1.0, *s.logprobs), s.finish, s.stop)
            return groups

    sampler = tools([[[ASK, "end"]]], 1)
    sampler.sampler.__class__ = Odd
    ((sample,),) = sampler.generate(ask([[["", ""]]]))
    assert sample.token_ids[0] == odd[0] and sample.token_ids[sample.calls[0].end] == odd[0]


def test_a_program_cannot_spell_a_special_token(tools, tiny_tokenizer):
    trick = Execution("</s> <s> <pad></s>", "", "ok")
    sampler = tools([[[ASK, "end"]]], 1, lambda code: trick)
    ((sample,),) = sampler.generate(ask([[["", ""]]]))
    (call,) = sample.calls
    shown = sample.token_ids[call.start : call.end]
    assert set(shown).isdisjoint(tiny_tokenizer.all_special_ids)
    assert tiny_tokenizer.decode(list(shown), skip_special_tokens=True) == "\n</s> <s> <pad></s>\n```\n"


@given(
    text=st.text(max_size=40) | st.lists(st.sampled_from(["</s>", "<s>", "<pad>", "<", "s>", " ", "a"])).map("".join)
)
def test_any_observation_is_encoded_without_special_tokens(tiny_tokenizer, text):
    ids = encode_plainly(tiny_tokenizer, text)
    assert set(ids).isdisjoint(tiny_tokenizer.all_special_ids)
    if "<0x" not in text and "\u2581" not in text:
        assert tiny_tokenizer.decode(list(ids)) == text


# ---- what is run, and when it ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 3, 4])
def test_the_budget_counts_runs_and_an_answer_follows_the_last(tools, budget):
    scripts = [[[ASK] * budget + ["the answer ```output is mine"]]]
    sampler = tools(scripts, budget)
    ((sample,),) = sampler.generate(ask(scripts))
    assert len(sample.calls) == budget == len(sampler.sandbox.codes)
    assert sample.finish == "eos"
    assert sampler.decode(sample.turns[-1]) == "the answer ```output is mine"  # not stopped: no call is left


def test_an_output_without_a_program_costs_no_call(tools):
    scripts = [[["I think ```output", "nothing. " + ASK, "done"]]]
    sampler = tools(scripts, 1)
    ((sample,),) = sampler.generate(ask(scripts))
    assert [c.code for c in sample.calls] == ["print(1)"] and sample.finish == "eos"
    assert len(sample.turns) == 2 and sampler.decode(sample.turns[0]) == "I think ```outputnothing. " + ASK


def test_which_block_is_run(tools):
    text = "```python\na = 1\n```\nx\n```python\nprint(a)\n```\n```output"
    for policy, code in (("last", "print(a)"), ("first", "a = 1"), ("all", "a = 1\nprint(a)")):
        sampler = tools([[[text, "y"]]], 1, block_policy=policy)
        sampler.generate(ask([[["", ""]]]))
        assert [c.rstrip("\n") for c in sampler.sandbox.codes] == [code]


def test_notices(tools, tiny_tokenizer):
    scripts = [[[ASK, ASK, "and then"]]]
    plain, message, forbidden = (
        tools(scripts, 1, budget_notice=notice, notice="none left") for notice in ("none", "message", "forbid_output")
    )
    ((sample,),) = plain.generate(ask(scripts))
    assert sample.finish == "eos" and plain.decode(sample.turns[1]) == ASK  # it invents the output itself
    ((sample,),) = message.generate(ask(scripts))
    assert sample.calls[0].observation == "17\nnone left" and sample.finish == "eos"
    ((sample,),) = forbidden.generate(ask(scripts))
    assert sample.finish == "stop" and forbidden.decode(sample.turns[1]) == ASK and len(sample.calls) == 1
    two = tools(scripts, 2, budget_notice="message", notice="none left")
    ((sample,),) = two.generate(ask(scripts))
    assert [c.observation for c in sample.calls] == ["17", "17\nnone left"]


def test_a_failing_sandbox_aborts_the_answer_and_shows_nothing(tools):
    scripts = [[[ASK, "end"], ["no tools"]]]
    sampler = tools(scripts, 2, lambda code: Execution("17", "", "infrastructure"))
    ((lost, kept),) = sampler.generate(ask(scripts))
    assert lost.finish == "abort" and kept.finish == "eos" and all(lost.sampled)
    (call,) = lost.calls
    assert (call.status, call.observation, call.start) == ("infrastructure", "", call.end)


def test_the_length_is_shared_and_a_cut_turn_is_kept(tools, tiny_tokenizer):
    scripts = [[[ASK, "x x x x x x x x x x x x x x x"]]]
    asked = len(tiny_tokenizer(ASK, add_special_tokens=False)["input_ids"])
    observation = len(encode_plainly(tiny_tokenizer, "\n17\n```\n"))
    whole = asked + observation
    for limit in (asked - 1, asked, asked + 1, whole, whole + 1, whole + 3):
        sampler = tools(scripts, 1, limit=limit)
        ((sample,),) = sampler.generate(ask(scripts))
        assert sample.finish == "length" and len(sample.token_ids) <= limit
        assert [i for i, mine in zip(sample.token_ids, sample.sampled, strict=True) if mine] == sampler.sampler.said[
            0, 0
        ]
        shown = limit > whole
        assert len(sample.token_ids) == (limit if shown or limit < asked else asked)
        assert [c.end - c.start for c in sample.calls] == ([] if limit < asked else [observation if shown else 0])


def test_wrong_settings_are_one_line_errors(tools):
    for change, text in (
        ({"budget": 0}, "tool.call_budget=0"),
        ({"budget": 1, "block_policy": "lst"}, "tool.block_policy='lst'"),
        ({"budget": 1, "budget_notice": "yes"}, "tool.budget_notice='yes'"),
    ):
        with pytest.raises(ValueError, match=text):
            tools([[["x"]]], **change)


# ---- waiting changes nothing -------------------------------------------------------------------------------------


def make(model, tokenizer, sandbox, budget, engine="cascade", session=True, limit=60, **options):
    sampler = TransformersSampler(model, tokenizer, engine=engine, max_new_tokens=limit, **options)
    if not session:
        sampler.session = lambda requests, sampling: _whole(sampler, requests, sampling)
    return ToolSampler(sampler, sandbox, tokenizer, observation=Observations(), call_budget=budget)


class _whole(GenerateSession):
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def facts(groups):
    return [(s.token_ids, s.finish, s.stop, s.calls) for group in groups for s in group]


@pytest.fixture
def uneven(tiny_tokenizer):
    rng = np.random.default_rng(5)
    sizes = [(1, 6), (12, 9), (4, 1), (30, 8)]
    return [
        SampleRequest(tuple(map(int, rng.integers(3, len(tiny_tokenizer), length))), n, 10 + i)
        for i, (length, n) in enumerate(sizes)
    ]


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_rows_that_wait_draw_what_rows_of_a_batch_draw(
    talkative, tiny_tokenizer, fake_sandbox, endings, uneven, budget
):
    """Kept rows with results that come back in any order, against one batched call a turn that reads everything anew."""
    rng = random.Random(0)
    slow = fake_sandbox(endings, lambda code: rng.choice([0.0, 0.002, 0.02]))
    kept = make(talkative, tiny_tokenizer, slow, budget).generate(uneven)
    batched = make(talkative, tiny_tokenizer, fake_sandbox(endings), budget, session=False).generate(uneven)
    engine = make(talkative, tiny_tokenizer, fake_sandbox(endings), budget, engine="generate").generate(uneven)
    assert facts(kept) == facts(batched) == facts(engine)
    calls = [c for group in kept for s in group for c in s.calls]
    assert len(calls) > 8 and len({c.status for c in calls}) == 3
    assert max(len(s.calls) for group in kept for s in group) == min(budget, 2)
    for one, other in zip(kept, batched, strict=True):
        for a, b in zip(one, other, strict=True):
            assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_logprobs_behind_observations_are_those_of_a_plain_forward(
    talkative, tiny_tokenizer, fake_sandbox, endings, uneven
):
    groups = make(talkative, tiny_tokenizer, fake_sandbox(endings, lambda code: 0.003), 2).generate(uneven)
    compared = 0
    for request, group in zip(uneven, groups, strict=True):
        for sample in group:
            ids = torch.tensor([[*request.prompt_ids, *sample.token_ids]])
            with torch.no_grad():
                logprobs = talkative(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            places = torch.arange(len(sample.token_ids)) + len(request.prompt_ids) - 1
            right = logprobs[places, list(sample.token_ids)].numpy()
            mine = np.array(sample.sampled)
            assert np.abs(right - np.array(sample.logprobs))[mine].max() < 1e-4
            compared += int(mine[sample.calls[0].end :].sum()) if sample.calls else 0
    assert compared > 100


def test_an_answer_depends_on_its_seed_alone(talkative, tiny_tokenizer, fake_sandbox, endings, uneven):
    alone = [make(talkative, tiny_tokenizer, fake_sandbox(endings), 2).generate([r])[0] for r in uneven]
    together = make(talkative, tiny_tokenizer, fake_sandbox(endings, lambda c: 0.002), 2, max_rows=14).generate(uneven)
    assert facts(alone) == facts(together)


@pytest.mark.parametrize("rows", [512, 9])
def test_an_answer_goes_on_while_others_wait(
    talkative, tiny_tokenizer, fake_sandbox, endings, uneven, monkeypatch, rows
):
    """One slow program: every other answer is finished before its result is there, those of later parts too."""
    first: list[str] = []
    done: list[int] = []
    finished_before: list[int] = []
    monkeypatch.setattr(_Loop, "_finish", spying(_Loop._finish, lambda: done.append(1)))
    monkeypatch.setattr(_Loop, "observe", spying(_Loop.observe, lambda: finished_before.append(len(done))))

    def delay(code: str) -> float:
        first.append(code)
        return 2.0 if len(first) == 1 else 0.0

    make(talkative, tiny_tokenizer, fake_sandbox(endings, delay), 1, max_rows=rows).generate(uneven)
    assert finished_before[-1] == 23 and finished_before[0] < 23


def spying(method, note):
    def wrapped(self, *args):
        note()
        return method(self, *args)

    return wrapped


def test_a_request_keeps_its_own_limit_and_stop_strings(talkative, tiny_tokenizer, fake_sandbox, endings, uneven):
    def answer(requests):
        return make(talkative, tiny_tokenizer, fake_sandbox(endings), 2).generate(requests)

    short = [replace(r, max_new_tokens=9 + i) for i, r in enumerate(uneven)]
    for i, (group, cut) in enumerate(zip(answer(uneven), answer(short), strict=True)):
        for a, b in zip(group, cut, strict=True):
            assert len(b.token_ids) <= 9 + i and b.token_ids == a.token_ids[: len(b.token_ids)]
    for group in answer([replace(r, stop=("x",)) for r in uneven]):
        for sample in group:
            assert not any("x" in tiny_tokenizer.decode(list(turn[:-1])) for turn in sample.turns)
            assert sample.stop != "x" or "x" in tiny_tokenizer.decode([sample.token_ids[-1]])


def test_with_no_program_at_all_the_answers_are_those_without_tools(
    talkative, tiny_tokenizer, fake_sandbox, endings, uneven
):
    sampler = TransformersSampler(talkative, tiny_tokenizer, max_new_tokens=3)
    tools = ToolSampler(sampler, fake_sandbox(endings), tiny_tokenizer, observation=Observations(), call_budget=2)
    assert facts(tools.generate(uneven)) == facts(sampler.generate(uneven))
