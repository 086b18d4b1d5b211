"""The shuffle keeps what each group earned, never crosses groups, and cuts the link between an answer and its pay."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from core_torl.problem import Problem
from core_torl.reward.base import Reward
from core_torl.reward.correctness import Correctness
from core_torl.reward.shuffled import ShuffledReward
from core_torl.trajectory import Sample, Score, Trajectory

SIZE = 8
Z = 4.5  # normal quantile of an interval that a right program leaves once in 150,000 seeds


def answer(uid: str, letter: str, prompt: tuple[int, ...] = (), gold: str = "A") -> Trajectory:
    return Trajectory(Problem(uid, "?", gold, ("x", "y")), prompt, Sample((), (), "eos"), rf"\boxed{{{letter}}}", ())


def batch_of(groups: int, seed: int = 0) -> list[Trajectory]:
    """Groups of SIZE answers; how many are right differs from group to group, all and none included."""
    rng = random.Random(seed)
    shares = [rng.random() for _ in range(groups)]
    return [answer(f"p{g}", "A" if rng.random() < shares[g] else "B") for g in range(groups) for _ in range(SIZE)]


def score(reward: Correctness, batch: list[Trajectory], seed: int = 0) -> list[Score]:
    torch.manual_seed(seed)
    return reward.score(batch)


def paid(scores: list[Score]) -> list[float]:
    assert all(s.value is not None for s in scores)
    return [s.value or 0.0 for s in scores]


def link_inside_groups(scores: list[Score]) -> tuple[float, float]:
    """Correlation of value and truth, both less their group's mean, and its standard error if there is no link."""
    pairs = []
    for start in range(0, len(scores), SIZE):
        group = scores[start : start + SIZE]
        mean, share = sum(paid(group)) / SIZE, sum(s.correct for s in group) / SIZE
        pairs += [(v - mean, s.correct - share) for v, s in zip(paid(group), group, strict=True)]
    both = sum(v * t for v, t in pairs)
    size = math.sqrt(sum(v * v for v, _ in pairs) * sum(t * t for _, t in pairs))
    # A group of n has n - 1 free numbers; Pearson's r over m of them has standard error 1 / sqrt(m).
    return both / size, 1 / math.sqrt(len(pairs) * (SIZE - 1) / SIZE)


def test_each_group_keeps_what_it_earned():
    batch = batch_of(200)
    true, shuffled = paid(score(Correctness(), batch)), paid(score(ShuffledReward(), batch))
    assert true != shuffled
    for start in range(0, len(batch), SIZE):
        assert sorted(true[start : start + SIZE]) == sorted(shuffled[start : start + SIZE])


def test_it_never_mixes_groups():
    """Right and wrong groups in turn: any exchange would show. A prompt of its own makes a group of its own."""
    batch = [answer(f"p{g}", "AB"[g % 2]) for g in range(40) for _ in range(SIZE)]
    assert paid(score(ShuffledReward(), batch)) == paid(score(Correctness(), batch))
    batch = [answer("p", "AB"[g % 2], prompt=(g,)) for g in range(40) for _ in range(SIZE)]
    assert paid(score(ShuffledReward(), batch)) == paid(score(Correctness(), batch))


def test_value_and_truth_are_unrelated_inside_groups_and_the_true_reward_is_all_truth():
    batch = batch_of(2000)
    link, error = link_inside_groups(score(ShuffledReward(), batch))
    assert abs(link) < Z * error
    assert link_inside_groups(score(Correctness(), batch))[0] == pytest.approx(1.0)


def test_every_place_is_paid_equally_often():
    """One right answer, always first: its pay must go to each of the places alike."""
    count = 4000
    batch = [answer(f"p{g}", "A" if i == 0 else "B") for g in range(count) for i in range(SIZE)]
    values = paid(score(ShuffledReward(), batch))
    for place in range(SIZE):
        assert abs(sum(values[place::SIZE]) / count - 1 / SIZE) < Z * math.sqrt((1 / SIZE) * (1 - 1 / SIZE) / count)


def test_the_seed_decides_the_order():
    batch = batch_of(20)
    one, again, other = (paid(score(ShuffledReward(), batch, seed)) for seed in (1, 1, 2))
    assert one == again != other


def test_correct_and_outcome_stay_true_and_who_cannot_be_judged_takes_no_part():
    reward = ShuffledReward(correct=2.0, incorrect=-1.0)
    assert isinstance(reward, Reward)
    # Of each eight answers the second has a key that names no option: the uid makes it part of the group all the same.
    batch = [
        replace(t, problem=replace(t.problem, answer="Z")) if i % SIZE == 1 else t for i, t in enumerate(batch_of(50))
    ]
    true, shuffled = score(Correctness(correct=2.0, incorrect=-1.0), batch), score(reward, batch)
    assert [(s.correct, s.outcome) for s in shuffled] == [(s.correct, s.outcome) for s in true]
    assert all(s == Score(None, False, "unparsed_gold") for s in shuffled[1::SIZE])
    for start in range(0, len(batch), SIZE):
        kept = [sorted(s.value for s in x[start : start + SIZE] if s.value is not None) for x in (true, shuffled)]
        assert kept[0] == kept[1] and len(kept[0]) == SIZE - 1
    assert all(s.parts == {"shuffled": s.value} for s in shuffled if s.value is not None)


def test_a_group_that_nobody_could_judge_and_no_group_at_all():
    assert ShuffledReward().score([]) == []
    assert [s.value for s in ShuffledReward().score([answer("p", "A", gold="Z")] * 3)] == [None] * 3
