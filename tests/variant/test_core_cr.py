"""CORE-CR: primed answers take failed ones' places, and it is their tokens, their pay and their ratios that are learned."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from core_torl.config.errors import UserError
from core_torl.intervention.expert_prefix import ExpertPrefix
from core_torl.objective.grpo import GRPO
from core_torl.trajectory import Sample, Trajectory
from core_torl.trigger.failure import Failure
from core_torl.variant.checkpoint import RLCheckpoint, newest
from core_torl.variant.compat_released_cr import CompatReleasedCR
from core_torl.variant.core_base import CoreBase
from core_torl.variant.core_cr import CoreCR
from core_torl.variant.replacement import choose, with_bonus

from .conftest import (
    RIGHT,
    TEMPLATE,
    UNJUDGED,
    WRONG,
    Evenness,
    Rule,
    fit,
    meddled,
    other_ids,
    same,
    shorter,
    watched,
    weights,
)

SEEN = watched(CoreCR)
# Every fifth token id ends an answer, so that some end by themselves and some are cut off.
ENDS = {"eos_ids": list(range(0, 640, 5)), "max_new_tokens": 6}


def mixed(t: Trajectory, i: int):
    """The first of two primed answers is wrong, the second right."""
    return RIGHT if i % 2 else WRONG


def unpadded(batch, row: int) -> list[int]:
    return batch.ids[row][batch.attention_mask[row].bool()].tolist()


def replaced(groups) -> list[list[int]]:
    return [[i for i, t in enumerate(g.trajectories) if t.behaviour != "policy"] for g in groups]


# --- what is trained


def test_the_trained_row_is_the_plain_prompt_and_the_primed_answer_with_its_end(make):
    module = fit(make(SEEN, rl_steps=2, **ENDS))
    ended = 0
    for sampled, groups, batch in zip(module.sampled, module.weighed, module.batches, strict=True):
        assert [len(places) for places in replaced(groups)] == [2] * 4
        for g, group in enumerate(groups):
            plain = list(TEMPLATE.encode(module.policy.tokenizer, group.problem))
            for i, trajectory in enumerate(group.trajectories):
                own = sampled[g][i]
                row = unpadded(batch, 4 * g + i)
                assert row == plain + list(trajectory.token_ids)
                assert batch.foreign[4 * g + i].item() is (i in replaced(groups)[g])
                assert int(batch.train_mask[4 * g + i].sum()) == len(trajectory.token_ids)
                if i in replaced(groups)[g]:
                    assert row != plain + list(own.token_ids)
                    ended += trajectory.sample.finish == "eos" and row[-1] % 5 == 0
                else:
                    assert trajectory is own
    assert ended > 3, "the end token is a part of what is learned"


def test_the_primed_tokens_reach_the_weights(make):
    """And in what the published code does they do not: it is the control of the test itself."""
    ours = [fit(make(kind, rl_steps=1)) for kind in (CoreCR, meddled(CoreCR, other_ids))]
    assert not same(*map(weights, ours))
    theirs = [fit(make(kind, rl_steps=1)) for kind in (CompatReleasedCR, meddled(CompatReleasedCR, other_ids))]
    assert same(*map(weights, theirs))
    assert not same(weights(ours[0]), weights(theirs[0]))


def test_the_published_code_takes_no_more_than_length_and_pay_from_a_primed_answer(make):
    plain = weights(fit(make(CompatReleasedCR, rl_steps=1, **ENDS)))
    assert not same(plain, weights(fit(make(meddled(CompatReleasedCR, shorter), rl_steps=1, **ENDS))))
    assert not same(plain, weights(fit(make(CompatReleasedCR, rl_steps=1, reward=Rule(mixed), **ENDS))))
    module = fit(make(watched(CompatReleasedCR), rl_steps=1, **ENDS))
    batch, cut = module.batches[0], 0
    for row, own in enumerate(t for group in module.sampled[0] for t in group):
        assert unpadded(batch, row) == list(own.prompt_ids + own.token_ids), "no row has a token that is not its own"
        cut += int(batch.train_mask[row].sum()) < len(own.token_ids)
    assert cut > 0 and not batch.foreign.any()
    paid = [[round(a, 3) for a in group] for group in batch.advantages.view(4, 4).tolist()]
    assert all(Counter(group) == {0.866: 2, -0.866: 2} for group in paid), "wrong answers are paid as if right"


def test_the_concept_is_in_no_trained_row_unless_asked_for(make):
    for train_prompt, expected in (("plain", False), ("primed", True)):
        module = fit(make(SEEN, rl_steps=1, train_prompt=train_prompt))
        text = module.policy.tokenizer.batch_decode([unpadded(module.batches[0], i) for i in range(16)])
        concepts = [t.problem.concept.text for g in module.weighed[0] for t in g.trajectories]
        assert any(c in x for c, x in zip(concepts, text, strict=True)) is expected


# --- what it is worth

TABLE = {
    "both wrong": (Rule(), [-0.866, -0.866, 0.866, 0.866]),
    "one right": (Rule(mixed), [-0.681, -0.681, -0.076, 1.438]),
    "both right": (Rule(lambda t, i: RIGHT), [-0.866, -0.866, 0.866, 0.866]),
}


@pytest.mark.parametrize(("reward", "expected"), TABLE.values(), ids=TABLE)
def test_the_advantages_of_four_answers_of_which_two_are_primed(make, reward, expected):
    module = fit(make(SEEN, rl_steps=2, reward=reward))
    for batch, groups in zip(module.batches, module.weighed, strict=True):
        for row, places in zip(batch.advantages.view(4, 4), replaced(groups), strict=True):
            assert sorted(row.tolist()) == pytest.approx(expected, abs=1e-3)
            others = [i for i in range(4) if i not in places]
            assert row[others].tolist() == pytest.approx(expected[:2], abs=1e-3), "the failed ones that stayed"
            assert row[places].tolist() == pytest.approx(expected[2:], abs=1e-3), "in the order they were drawn"


@pytest.mark.parametrize(
    ("when", "values"), [("always", [0.4, 1.4]), ("only_if_correct", [0.0, 1.4]), ("none", [0.0, 1.0])]
)
def test_which_primed_answers_earn_the_bonus(make, when, values):
    assert [with_bonus(s, 0.4, when).value for s in (WRONG, RIGHT)] == values
    earned = [value - reward for value, reward in zip(values, (0.0, 1.0), strict=True)]
    module = fit(make(SEEN, rl_steps=1, reward=Rule(mixed), bonus_when=when))
    for group in module.weighed[0]:
        scores = [t.score for t in group.trajectories if t.behaviour != "policy"]
        assert [s.value for s in scores] == values
        assert [s.parts["bonus"] for s in scores] == pytest.approx(earned)
        assert [t.score.value for t in group.trajectories if t.behaviour == "policy"] == [0.0, 0.0]


def test_without_a_bonus_wrong_primed_answers_teach_nothing(make):
    module = fit(make(SEEN, rl_steps=1, bonus=0.0, bonus_when="none"))
    assert replaced(module.weighed[0]) != [[]] * 4 and not module.batches[0].advantages.any()


def test_what_was_measured_of_the_sampled_groups_is_without_the_bonus(make):
    found = fit(make(CoreCR, rl_steps=1, reward=Rule(mixed))).last_metrics
    assert found["reward/mean"] == found["reward/accuracy"] == 0 and found["group/all_wrong"] == 1
    assert found["core/primed_accuracy"] == 0.5 and found["core/trigger_rate"] == 1


def test_a_group_without_a_right_primed_answer_can_be_left_alone(make):
    def by_problem(t, i):
        return mixed(t, i) if int(t.problem.uid[-1]) % 2 else WRONG

    module = fit(make(SEEN, rl_steps=2, reward=Rule(by_problem), require_success=True))
    for groups, sampled in zip(module.weighed, module.sampled, strict=True):
        for group, before, places in zip(groups, sampled, replaced(groups), strict=True):
            if int(group.problem.uid[-1]) % 2:
                assert len(places) == 2
            else:
                assert all(a is b for a, b in zip(group.trajectories, before, strict=True))
    assert 0 < module.last_metrics["core/replaced_tokens"] < module.last_metrics["core/primed_tokens"]
    needless = fit(make(SEEN, rl_steps=2, reward=Rule(by_problem)))
    assert all(len(places) == 2 for places in replaced(needless.weighed[-1]))


def test_an_unjudged_primed_answer_takes_nobodys_place(make):
    def first_timed_out(t, i):
        return UNJUDGED if i % 2 == 0 else WRONG

    module = fit(make(SEEN, rl_steps=1, reward=Rule(first_timed_out)))
    assert [len(p) for p in replaced(module.weighed[0])] == [1] * 4
    assert all(t.score.value is not None for g in module.weighed[0] for t in g.trajectories)


def test_primed_answers_that_time_out_do_not_stop_a_run_whose_answers_are_judged(make):
    """What may not be judged is a share of all of a step's answers: two of two primed ones are no broken reward."""

    def only_one_fails(t, i):
        return WRONG if i < 4 else RIGHT

    module = fit(make(SEEN, rl_steps=1, reward=Rule(lambda t, i: UNJUDGED, only_one_fails)))
    assert replaced(module.weighed[0]) == [[]] * 4 and module.last_metrics["core/primed_tokens"] > 0
    assert "core/primed_accuracy" not in module.last_metrics
    with pytest.raises(RuntimeError, match=r"variant\.max_excluded=0\.1"):
        fit(make(SEEN, rl_steps=1, reward=Rule(lambda t, i: UNJUDGED, only_one_fails), max_excluded=0.1))


# --- whose place it takes


def trajectory(length: int, right: bool = False, finish="eos") -> Trajectory:
    sample = Sample((5,) * length, (-1.0,) * length, finish)
    return Trajectory(None, (1,), sample, "", (True,) * length, RIGHT if right else WRONG)  # type: ignore[arg-type]


def test_the_places_by_policy():
    group = [
        trajectory(3),
        trajectory(9),
        trajectory(5, finish="length"),
        trajectory(9),
        trajectory(2, finish="length"),
    ]
    drawn = {policy: [choose(group, 2, policy, seed) for seed in range(200)] for policy in
             ("random", "longest", "truncated_first")}  # fmt: skip
    assert {tuple(p) for p in drawn["longest"]} == {(1, 3)}
    assert {tuple(p) for p in drawn["truncated_first"]} == {(2, 4)}
    counts = Counter(i for places in drawn["random"] for i in places)
    assert len({tuple(p) for p in drawn["random"]}) == 10 and min(counts.values()) > 50, "uniform over all pairs"
    assert {tuple(choose(group, 1, "longest", s)) for s in range(50)} == {(1,), (3,)}, "ties fall by the seed"
    assert all(choose(group, 3, "truncated_first", s)[0] in (0, 1, 2) for s in range(50))
    assert {tuple(choose(group, 3, "truncated_first", s)) for s in range(99)} == {(0, 2, 4), (1, 2, 4), (2, 3, 4)}


@pytest.mark.parametrize("policy", ["random", "longest", "truncated_first"])
def test_answers_that_nobody_could_judge_give_way_last(policy):
    group = [trajectory(9), trajectory(1), trajectory(9, finish="length"), trajectory(2)]
    group[0].score = group[2].score = UNJUDGED
    assert all(choose(group, 2, policy, seed) == [1, 3] for seed in range(50))
    assert all(len(choose(group, 3, policy, seed)) == 3 for seed in range(20))


@pytest.mark.parametrize("policy", ["random", "longest", "truncated_first"])
def test_right_answers_never_give_way(policy):
    group = [trajectory(9, right=True), trajectory(1), trajectory(9, right=True, finish="length"), trajectory(2)]
    for seed in range(50):
        assert choose(group, 4, policy, seed) == [1, 3]
        assert choose(group, 2, policy, seed) == choose(group, 2, policy, seed) == [1, 3]
    assert choose([trajectory(3, right=True)] * 4, 2, policy, 0) == []


def test_right_answers_never_give_way_when_the_coach_always_comes(make):
    module = fit(make(SEEN, rl_steps=3, reward=Rule(plain=lambda t, i: RIGHT if i % 4 else WRONG),
                      trigger=Failure("always", min_finished=0)))  # fmt: skip
    assert all(replaced(groups) == [[0]] * 4 for groups in module.weighed)


def test_the_choice_can_be_repeated_and_is_another_one_each_step(make, problems):
    def places(**changes):
        settings = {"problems": problems[:1], "prompts_per_step": 1, "rl_steps": 8, "lr": 0.0, "weight_decay": 0.0}
        return [replaced(groups)[0] for groups in fit(make(SEEN, **(settings | changes))).weighed]

    found = places()
    assert found == places() and len({tuple(p) for p in found}) > 3
    assert found != places(seed=1)


@pytest.mark.parametrize("policy", ["longest", "truncated_first"])
def test_the_policy_is_the_configured_one(make, policy):
    module = fit(make(SEEN, rl_steps=2, replace_policy=policy, **ENDS))
    for sampled, groups in zip(module.sampled, module.weighed, strict=True):
        for own, places in zip(sampled, replaced(groups), strict=True):
            keep = [t for i, t in enumerate(own) if i not in places]
            gone = [own[i] for i in places]
            if policy == "longest":
                assert min(len(t.token_ids) for t in gone) >= max(len(t.token_ids) for t in keep)
            else:
                assert min(t.truncated for t in gone) >= max(t.truncated for t in keep)


# --- under which prompt, with which ratio


class Note(GRPO):
    """Keeps what the loss was given and what it made of it."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls = []

    def loss(self, logprobs, entropies, batch, denominator):
        loss = super().loss(logprobs, entropies, batch, denominator)
        self.calls.append((logprobs.detach().clone(), batch, float(denominator), loss))
        return loss


def louder(sample):
    """A sampler that reports other log-probs than its own."""
    return replace(sample, logprobs=tuple(x + 0.5 for x in sample.logprobs))


def test_a_row_under_its_own_primed_prompt_is_on_policy(make):
    module = fit(make(SEEN, rl_steps=1, train_prompt="primed"))
    batch, first = module.batches[0], TEMPLATE.encode(module.policy.tokenizer, module.weighed[0][0].problem)
    rows = [t for g in module.weighed[0] for t in g.trajectories]
    primed = [i for i, t in enumerate(rows) if t.score.parts]
    assert len(primed) == 8 and all(t.behaviour == "policy" for t in rows) and not batch.foreign.any()
    for i in primed:
        expected = TEMPLATE.encode(module.policy.tokenizer, rows[i].problem, rows[i].problem.concept)
        assert unpadded(batch, i) == list(expected + rows[i].token_ids) and len(expected) > len(first)
    assert module.last_metrics["policy/sampler_logprob_gap_max"] < 1e-4
    # Sampler and trainer are compared on these rows: a sampler that is off there is caught.
    with pytest.raises(UserError, match="first-step check: sampler and trainer disagree"):
        fit(make(meddled(CoreCR, louder), rl_steps=1, train_prompt="primed"))


@pytest.mark.parametrize("minibatch_size", [None, 8])
def test_a_row_under_the_plain_prompt_is_left_out_of_that_comparison(make, minibatch_size):
    fit(make(meddled(CoreCR, louder), rl_steps=1, minibatch_size=minibatch_size))

    class Claiming(CoreCR):
        """Says of replaced rows that the policy sampled them under the plain prompt."""

        def _row(self, failed, answer):
            return replace(super()._row(failed, answer), behaviour="policy")

    with pytest.raises(UserError, match="first-step check: sampler and trainer disagree"):
        fit(make(Claiming, rl_steps=1, minibatch_size=minibatch_size))


@pytest.mark.parametrize("minibatch_size", [None, 8])
def test_a_recomputed_ratio_is_one_at_the_first_update(make, minibatch_size):
    note = Note()
    module = fit(make(SEEN, rl_steps=1, objective=note, minibatch_size=minibatch_size))
    first = note.calls[0]
    assert first[3].foreign_tokens > 0 and first[1].foreign.any() and not first[1].guided.any()
    assert float(first[3].ratio_gap) <= (1e-6 if minibatch_size else 0.0)
    found = module.last_metrics
    if minibatch_size is None:
        assert found["policy/ratio_max"] == found["policy/ratio_mean"] == 1.0
    # The true ratio is reported nonetheless, and it is not 1: the prompt matters.
    assert abs(found["core/replaced_ratio_mean"] - 1) > 1e-3 and abs(found["core/primed_logprob_gap"]) > 1e-3


@pytest.mark.parametrize("shaping", [False, True])
def test_a_guided_row_is_divided_by_what_the_sampler_reported_under_the_primed_prompt(make, shaping):
    note = Note(guided_ratio="shaping" if shaping else "clip", shaping_gamma=0.05)
    module = fit(make(SEEN, rl_steps=1, objective=note, behaviour="guided"))
    (logprobs, part, denominator, loss), total, foreign = note.calls[0], 0.0, 0
    by_answer = {t.token_ids: t for g in module.weighed[0] for t in g.trajectories}
    for i in range(part.rows):
        advantage, ids = part.advantages[i].item(), part.answer_ids[i][part.train_mask[i]].tolist()
        sampled = by_answer[tuple(ids)]
        for t in range(len(ids)):
            now = logprobs[i, t].item()
            if sampled.behaviour == "guided":
                foreign += 1
                ratio = math.exp(now - sampled.sample.logprobs[t])
                f = math.exp(now) / (math.exp(now) + 0.05)
                total -= f * advantage if shaping else min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            else:
                total -= advantage
    assert foreign == float(loss.foreign_tokens) > 0 and denominator == float(part.train_mask.sum())
    assert loss.total.item() == pytest.approx(total / denominator, rel=1e-4, abs=1e-6)
    assert loss.total.item() != pytest.approx(0.0, abs=1e-3), "with all ratios at 1 the advantages would cancel"
    assert not same(weights(module), weights(fit(make(CoreCR, rl_steps=1))))
    # The denominator is the sampler's word: another one gives another gradient (but nothing to shaping).
    louder_one = weights(fit(make(meddled(CoreCR, louder), rl_steps=1, objective=Note(guided_ratio=note.guided_ratio,
                             shaping_gamma=0.05), behaviour="guided")))  # fmt: skip
    assert same(louder_one, weights(module)) is shaping


def test_the_reference_is_asked_about_the_row_that_is_trained(make):
    """At the first update the KL to the reference is 0 on every row, replaced ones included."""
    found = fit(make(CoreCR, rl_steps=1, objective=GRPO(kl_coef=0.1))).last_metrics
    assert found["loss/reference_kl"] == pytest.approx(0.0, abs=1e-6) and found["core/replaced_tokens"] > 0


# --- cost


def counted(module) -> list[int]:
    """Calls of the sampler at each RL step."""
    calls, generate = Counter(), module.sampler.generate

    def wrapped(requests, *rest):
        calls[module.rl_step] += 1
        return generate(requests, *rest)

    module.sampler.generate = wrapped
    fit(module)
    return [calls[step] for step in range(module.rl_step)]


def test_all_primed_answers_of_a_step_come_from_one_call(make):
    assert counted(make(CoreCR)) == [2, 2, 2, 2]
    assert counted(make(CoreCR, reward=Rule(plain=lambda t, i: RIGHT))) == [1, 1, 1, 1]
    assert counted(make(CoreBase)) == [1, 1, 1, 1]


def test_primed_tokens_count_and_can_spend_the_budget(make, tmp_path):
    class Spending(SEEN):
        spent = ()

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            self.spent = (*self.spent, self.tokens_seen)

    free = fit(make(Spending, rl_steps=4))
    own = sum(len(t.token_ids) for step in free.sampled for group in step for t in group)
    assert free.samples_seen == 4 * (16 + 8) and free.last_metrics["train/samples"] == free.samples_seen
    assert free.tokens_seen > own
    # A budget that the second step reaches with its primed answers and would not reach without them.
    limits = {"rl_steps": 4, "token_budget": free.spent[1]}
    stopped = fit(make(Spending, **limits), [RLCheckpoint(tmp_path, 1, 9)])
    assert stopped.rl_step == 2 and stopped.tokens_seen == free.spent[1] and stopped.finished
    resumed = fit(make(Spending, **limits), ckpt=newest(tmp_path))
    assert resumed.rl_step == 2 and resumed.spent == () and same(weights(resumed), weights(stopped))
    one_more = fit(make(Spending, rl_steps=4, token_budget=free.spent[1] + 1))
    assert one_more.rl_step == 3


# --- when nobody comes


@pytest.mark.parametrize("changes", [{}, {"minibatch_size": 8, "update_epochs": 2}])
def test_a_coach_that_never_comes_is_core_base_bit_for_bit(make, changes):
    settings = {"reward": Evenness(), "objective": GRPO(kl_coef=0.01), "rl_steps": 3, **changes}
    base = make(CoreBase, policy=make(CoreCR).policy, **settings)
    never = fit(make(CoreCR, trigger=Failure("never"), **settings))
    assert same(weights(fit(base)), weights(never))
    always = fit(make(CoreCR, trigger=Failure("always", min_finished=0), **settings))
    assert not same(weights(always), weights(never))
    assert never.last_metrics["core/trigger_rate"] == 0 and never.tokens_seen == base.tokens_seen
    # Nothing was primed: these have no value rather than a zero that would be taken for one.
    assert not {"core/primed_accuracy", "core/replaced_ratio_max"} & never.last_metrics.keys()


def test_gates_and_prompts_that_are_too_long_leave_a_group_alone_and_are_counted(make):
    shut = fit(make(SEEN, rl_steps=1, trigger=Failure(min_finished=1)))  # six tokens: all are cut off
    long = fit(make(SEEN, rl_steps=1, max_prompt_tokens=10))
    for module in (shut, long):
        assert replaced(module.weighed[0]) == [[]] * 4
        found = module.last_metrics
        assert (found["core/trigger_rate"], found["core/gated"], found["core/primed_tokens"]) == (0, 1, 0)


def test_a_group_of_which_nothing_could_be_judged_has_not_failed(make):
    module = fit(make(SEEN, rl_steps=1, reward=Rule(plain=lambda t, i: UNJUDGED), max_excluded=1.0))
    assert replaced(module.weighed[0]) == [[]] * 4


# --- an expert's prefix


def test_behind_an_experts_prefix_only_the_continuation_is_trained(make, problems):
    module = fit(make(SEEN, rl_steps=1, train_prompt="primed", intervention=ExpertPrefix(problems)))
    batch, tokenizer = module.batches[0], module.policy.tokenizer
    prefixes = set()
    for row, t in enumerate(t for g in module.weighed[0] for t in g.trajectories):
        plain = TEMPLATE.encode(tokenizer, t.problem)
        assert unpadded(batch, row) == list(t.prompt_ids + t.token_ids)
        assert int(batch.train_mask[row].sum()) == len(t.token_ids)
        prefix = t.prompt_ids[len(plain) :]
        assert t.prompt_ids[: len(plain)] == plain and bool(prefix) is bool(t.score.parts)
        solution = TEMPLATE.encode_answer(tokenizer, t.problem.solution)
        assert prefix == solution[: len(prefix)] and len(prefix) < len(solution)
        assert t.problem.concept.text not in tokenizer.decode(list(t.prompt_ids))
        prefixes.add(prefix)
    assert len(prefixes) > 4, "each branch starts behind another share of the solution"


def test_an_unknown_choice_names_the_key(make):
    for key, value in (("bonus_when", "sometimes"), ("replace_policy", "shortest"), ("train_prompt", "both"),
                       ("behaviour", "policy")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"variant\.{key}='{value}': use one of"):
            make(CoreCR, **{key: value})
