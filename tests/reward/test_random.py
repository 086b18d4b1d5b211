"""The coin pays right and wrong alike, repeats with its seed, and never touches what is said about the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from core_torl.evaluation.protocol import Evaluation
from core_torl.problem import Problem
from core_torl.reward.base import Reward
from core_torl.reward.correctness import Correctness
from core_torl.reward.random import RandomReward
from core_torl.sampler.protocol import SamplingConfig
from core_torl.trajectory import Sample, Score, Trajectory

QUIZ = Problem("p", "?", "A", ("x", "y"))
BROKEN = Problem("broken", "?", "Z", ("x", "y"))  # its key names no option: nobody can judge an answer to it
Z = 4.5  # normal quantile of an interval that a right program leaves once in 150,000 seeds


def answer(letter: str, problem: Problem = QUIZ) -> Trajectory:
    return Trajectory(problem, (), Sample((), (), "eos"), rf"\boxed{{{letter}}}", ())


def values(reward: Correctness, seed: int, trajectories: Sequence[Trajectory]) -> list[float | None]:
    torch.manual_seed(seed)
    return [score.value for score in reward.score(trajectories)]


def pays_right_and_wrong_alike(make: Callable[[], Correctness], count: int = 4000) -> bool:
    """Whether the mean values of ``count`` right and ``count`` wrong answers agree within their joint error."""
    paid = values(make(), 0, [answer("AB"[i % 2]) for i in range(2 * count)])
    right, wrong = sum(v or 0.0 for v in paid[::2]) / count, sum(v or 0.0 for v in paid[1::2]) / count
    return abs(right - wrong) < Z * math.sqrt(2 * 0.25 / count)


@pytest.mark.parametrize("probability", [0.5, 0.1, 0.9])
def test_the_share_of_heads_is_the_probability(probability: float):
    count = 10_000
    paid = values(RandomReward(probability=probability), 0, [answer("A")] * count)
    assert set(paid) == {0.0, 1.0}
    width = Z * math.sqrt(probability * (1 - probability) / count)
    assert abs(paid.count(1.0) / count - probability) < width


@pytest.mark.parametrize(("probability", "value"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_ends_of_the_range_are_certain(probability: float, value: float):
    assert set(values(RandomReward(probability=probability), 0, [answer("B")] * 500)) == {value}


def test_it_pays_right_and_wrong_answers_alike_and_the_true_reward_does_not():
    assert pays_right_and_wrong_alike(RandomReward)
    assert not pays_right_and_wrong_alike(Correctness)


def test_the_values_are_those_of_the_config_and_the_only_part():
    scores = RandomReward(correct=2.0, incorrect=-1.0).score([answer("A")] * 100)
    assert {s.value for s in scores} == {2.0, -1.0}
    assert all(s.parts == {"random": s.value} for s in scores)


def test_correct_and_outcome_stay_true_and_who_cannot_be_judged_stays_none():
    reward = RandomReward()
    assert isinstance(reward, Reward)
    batch = [answer("A"), answer("B"), answer("none"), answer("A", BROKEN)] * 50
    drawn, true = reward.score(batch), Correctness().score(batch)
    assert [(s.correct, s.outcome) for s in drawn] == [(s.correct, s.outcome) for s in true]
    assert [s.value is None for s in drawn] == [s.value is None for s in true] == [False, False, False, True] * 50
    assert all(s == Score(None, False, "unparsed_gold") for s in drawn[3::4])


def test_the_seed_decides_the_coins():
    batch = [answer("A")] * 64
    assert values(RandomReward(), 1, batch) == values(RandomReward(), 1, batch)
    assert values(RandomReward(), 1, batch) != values(RandomReward(), 2, batch)
    torch.manual_seed(1)
    reward = RandomReward()
    assert [s.value for s in reward.score(batch)] != [s.value for s in reward.score(batch)], "each call has its own"


def test_an_answer_that_cannot_be_judged_does_not_move_the_coins_of_the_others():
    batch = [answer("A") for _ in range(64)]
    all_judged = values(RandomReward(), 3, batch)
    batch[0] = answer("A", BROKEN)
    assert values(RandomReward(), 3, batch) == [None, *all_judged[1:]]


class Fixed:
    """A sampler and tokenizer in one: answers A, and to every fifth problem nothing that can be read."""

    sampling = SamplingConfig(8)

    def generate(self, requests: Sequence[Any], sampling: Any = None) -> list[list[Sample]]:
        return [[Sample(request.prompt_ids, (0.0,), "eos")] * request.n for request in requests]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "?" if ids[0] % 5 == 0 else r"\boxed{A}"


def evaluate(reward: Correctness) -> dict[str, float]:
    evaluation, policy = Evaluation(samples=2), Fixed()
    quizzes = [Problem(f"q{i}", str(i), "ABCD"[i % 4], tuple("wxyz")) for i in range(12)]
    return evaluation.metrics(evaluation.run({"s": quizzes}, policy, lambda p, _: (int(p.question),), reward, policy))


def test_an_evaluation_reads_the_truth():
    unread = ["unparsed_prediction"]
    true = evaluate(Correctness(exclude=unread))
    assert 0 < true["eval/s/sampled/accuracy"] < 1 and true["eval/s/sampled/excluded"] > 0
    for probability in (0.0, 0.5, 1.0):
        assert evaluate(RandomReward(probability=probability, exclude=unread)) == true


def test_an_evaluation_between_two_steps_leaves_the_values_of_training_as_they_were():
    """The spine seeds torch at each step's beginning; without that, the coins would shift (the last line)."""
    batch = [answer("A")] * 64

    def steps(evaluated: bool, seeded: bool = True) -> list[list[float | None]]:
        reward, paid = RandomReward(), []
        torch.manual_seed(0)
        for step in range(3):
            if seeded:
                torch.manual_seed(step)
            paid.append([s.value for s in reward.score(batch)])
            if evaluated:
                evaluate(reward)
        return paid

    assert steps(evaluated=True) == steps(evaluated=False)
    assert steps(evaluated=True, seeded=False) != steps(evaluated=False, seeded=False)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_probability_out_of_range_is_named_in_one_line(probability: float):
    with pytest.raises(ValueError, match=r"reward\.probability") as caught:
        RandomReward(probability=probability)
    assert "\n" not in str(caught.value)


def test_what_correctness_refuses_is_refused_here():
    with pytest.raises(ValueError, match=r"reward\.exclude"):
        RandomReward(exclude=["wrong"])
