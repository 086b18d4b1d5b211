r"""The reward against a labelled corpus, and what it does with answers that nobody could judge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core_torl.problem import Problem
from core_torl.reward.base import OUTCOMES, Reward, outcome_rates
from core_torl.reward.correctness import Correctness
from core_torl.reward.verifier import Verdict
from core_torl.trajectory import Sample, Score, Trajectory

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "corpus.jsonl").read_text("utf-8").splitlines()]


def trajectory(text: str, gold: str, options: tuple[str, ...] = ()) -> Trajectory:
    return Trajectory(Problem("p", "?", gold, options), (), Sample((), (), "eos"), text, ())


@pytest.fixture(scope="module")
def reward() -> Iterator[Correctness]:
    reward = Correctness(timeout_s=10.0)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def scored(reward: Correctness) -> list[tuple[dict[str, Any], Score]]:
    """The whole corpus as one batch, choice and open problems mixed."""
    trajectories = [trajectory(row["text"], row["gold"], tuple(row.get("options", ()))) for row in CORPUS]
    return list(zip(CORPUS, reward.score(trajectories), strict=True))


def disagreements(scored: list[tuple[dict[str, Any], Score]], known: str | None) -> list[str]:
    return [
        f"{row['note']}: gold {row['gold']!r}, text {row['text'][:80]!r}: {score.outcome}, not {row['outcome']}"
        for row, score in scored
        if row.get("known") == known and score.outcome != row["outcome"]
    ]


@pytest.mark.slow
def test_corpus(scored: list[tuple[dict[str, Any], Score]]) -> None:
    assert len(CORPUS) >= 140
    assert disagreements(scored, None) == []


@pytest.mark.slow
def test_known_false_positives(scored: list[tuple[dict[str, Any], Score]]) -> None:
    r"""Wrong answers that math-verify 0.9 accepts. If this fails, it has changed: move the row.

    ``9\%`` for 9; ``5 km`` for ``5 cm`` (units are dropped); ``101_3`` for ``101_2`` (bases are dropped); ``5=4`` for
    4; ``(1,2)`` for ``\{1,2\}``; "14 apples and 3 pears" for 14; two numbers that agree to six decimals though not in
    their first digit; ``3,3`` for 3; an anagram of a word in italics.
    """
    assert sum(row.get("known") == "false_positive" for row in CORPUS) == 9
    assert disagreements(scored, "false_positive") == []


@pytest.mark.slow
def test_known_false_negatives(scored: list[tuple[dict[str, Any], Score]]) -> None:
    r"""Right answers that math-verify 0.9 does not accept. If this fails, it has changed: move the row.

    ``\frac{1}{3}`` for ``0.\overline{3}`` (not read at all); ``180^\circ`` for ``\pi``; ``\sqrt{-1}`` for ``i``;
    ``x=\pm 2`` for ``x^2=4``; ``\text{the answer is }7`` for 7.
    """
    assert sum(row.get("known") == "false_negative" for row in CORPUS) == 5
    assert disagreements(scored, "false_negative") == []


@pytest.mark.slow
def test_outcomes_and_their_values(reward: Correctness, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(reward, Reward)
    monkeypatch.setattr(reward, "incorrect", -1.0)
    monkeypatch.setattr(reward.verifier, "timeout_s", 0.5)
    box = r"\boxed{%s}"
    texts = [("3", box % "3"), ("3", box % "4"), ("3", "3"), ("x^2+", box % "3"), ("1", box % "9^{9^{9^{9}}}")]
    scores = reward.score([trajectory(text, gold) for gold, text in texts])
    assert [s.outcome for s in scores] == ["correct", "wrong", "unparsed_prediction", "unparsed_gold", "timeout"]
    assert [s.value for s in scores] == [1.0, -1.0, -1.0, None, None], "a timeout is None, never a number"
    assert [s.correct for s in scores] == [True, False, False, False, False]
    assert [s.parts for s in scores] == [{"correctness": v} for v in (1.0, -1.0, -1.0)] + [{}, {}]


def test_what_is_excluded_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict("timeout"), Verdict("error"), Verdict("unparsed_gold"), Verdict("unparsed_prediction")]
    trajectories = [trajectory(rf"\boxed{{{i}}}", "3") for i in range(4)]
    for exclude, values in (
        (("timeout", "error", "unparsed_gold"), [None, None, None, 0.0]),
        ((), [0.0, 0.0, 0.0, 0.0]),
        (["unparsed_prediction"], [0.0, 0.0, 0.0, None]),
    ):
        reward = Correctness(exclude=exclude)
        monkeypatch.setattr(reward.verifier, "check", lambda pairs: verdicts)
        assert [score.value for score in reward.score(trajectories)] == values


def test_choice_problems_and_missing_answers_need_no_worker() -> None:
    reward = Correctness()
    batch = [trajectory(r"\boxed{A}", "A", ("x", "y")), trajectory("no box", "3"), trajectory("", "3")]
    assert [s.outcome for s in reward.score(batch)] == ["correct", "unparsed_prediction", "unparsed_prediction"]
    assert reward.score([]) == []
    assert reward.verifier.pids == []


def test_outcome_rates() -> None:
    scores = [Score(1.0, True, "correct"), Score(None, False, "timeout"), Score(0.0, False, "wrong")]
    rates = outcome_rates([*scores, Score(1.0, True, "correct")])
    assert rates == {
        "correct": 0.5, "wrong": 0.25, "unparsed_prediction": 0.0, "unparsed_gold": 0.0, "timeout": 0.25, "error": 0.0
    }  # fmt: skip
    assert outcome_rates([]) == dict.fromkeys(OUTCOMES, 0.0)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"exclude": ["late"]}, "reward.exclude"),
        ({"exclude": ["wrong"]}, "reward.exclude"),
        ({"exclude": "timeout"}, "reward.exclude"),
        ({"correct": 0.0}, "reward.correct"),
        ({"workers": 0}, "reward.workers"),
        ({"timeout_s": 0}, "reward.timeout_s"),
        ({"timeout_s": float("nan")}, "reward.timeout_s"),
        ({"timeout_s": 5, "wall_timeout_s": 1}, "reward.wall_timeout_s"),
        ({"memory_mb": 8}, "reward.memory_mb"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(arguments: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")) as caught:
        Correctness(**arguments)
    assert "\n" not in str(caught.value)
