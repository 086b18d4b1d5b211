"""What every reward promises, and the six things that can be said of an answer.

A grader that only knows right and wrong must lie when it could not decide: it runs out of time, the gold answer makes
no sense, a worker dies. Here each of these has its own name, so that a reward can leave such a trajectory out of the
loss (``Score.value`` is None) and a log can show how often it happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

from core_torl.trajectory import Score, Trajectory

Outcome = Literal["correct", "wrong", "unparsed_prediction", "unparsed_gold", "timeout", "error"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@runtime_checkable
class Reward(Protocol):
    """Scores trajectories. It reads ``Trajectory.text``: what the policy wrote, never what a tool replied."""

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """One score per trajectory, in order. A problem with a single answer is an outcome, not an exception."""
        ...

    def close(self) -> None:
        """Give back processes and other resources. May be called twice."""
        ...


def outcome_rates(scores: Iterable[Score]) -> dict[str, float]:
    """The share (0 to 1) of each of the six outcomes among ``scores``; all six keys always, all 0.0 of no scores."""
    outcomes = [score.outcome for score in scores]
    return {outcome: outcomes.count(outcome) / max(len(outcomes), 1) for outcome in OUTCOMES}
