"""Is the final answer right? The one reward that every experiment of the project rests on.

The answer is the last box of what the policy wrote. Choice problems are decided here, by letter; open problems by the
verifier's worker processes. Whatever could not be decided gets ``Score.value = None`` by default: the trajectory then
leaves the loss and the statistics of its group, instead of teaching the policy that a slow check is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from core_torl.problem import Problem
from core_torl.reward.answers import last_box, option_letter
from core_torl.reward.base import OUTCOMES, Outcome
from core_torl.reward.verifier import Verifier
from core_torl.trajectory import Score, Trajectory

EXCLUDABLE = tuple(outcome for outcome in get_args(Outcome) if outcome not in ("correct", "wrong"))


class Correctness:
    """``correct`` for a right answer, ``incorrect`` for any other; None for the outcomes in ``exclude``.

    The other arguments are the verifier's: ``timeout_s`` in CPU seconds and ``wall_timeout_s`` in seconds on the
    clock for one answer, ``memory_mb`` in MiB for one worker.

    Raises:
        ValueError: an argument is out of range; the message names its config key and the fix.
    """

    def __init__(
        self,
        correct: float = 1.0,
        incorrect: float = 0.0,
        exclude: Sequence[str] = ("timeout", "error", "unparsed_gold"),
        workers: int = 1,
        timeout_s: float = 5.0,
        wall_timeout_s: float = 60.0,
        memory_mb: int = 2048,
    ) -> None:
        if isinstance(exclude, str):
            raise ValueError(f"reward.exclude is the string {exclude!r}; write a list: [{exclude}]")
        for outcome in exclude:
            if outcome not in EXCLUDABLE:
                raise ValueError(f"reward.exclude contains {outcome!r}; use some of {', '.join(EXCLUDABLE)}")
        if not correct > incorrect:
            raise ValueError(f"reward.correct ({correct}) is not above reward.incorrect ({incorrect}); raise it")
        self.correct, self.incorrect, self.exclude = float(correct), float(incorrect), frozenset(exclude)
        self.verifier = Verifier(workers, timeout_s, wall_timeout_s, memory_mb)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """One score per trajectory, in order; ``parts`` holds "correctness" unless the value is None."""
        outcomes: list[Outcome | None] = []
        pairs: list[tuple[str, str]] = []
        for trajectory in trajectories:
            problem, text = trajectory.problem, trajectory.text
            if problem.is_choice:
                outcomes.append(grade_choice(problem, text))
            elif not (answer := last_box(text)):
                outcomes.append("unparsed_prediction")
            else:
                outcomes.append(None)
                pairs.append((problem.answer, answer))
        verdicts = iter(self.verifier.check(pairs))
        return [self._score(outcome or next(verdicts).outcome) for outcome in outcomes]

    def _score(self, outcome: Outcome) -> Score:
        assert outcome in OUTCOMES
        right = outcome == "correct"
        if outcome in self.exclude:
            return Score(None, right, outcome)
        value = self.correct if right else self.incorrect
        return Score(value, right, outcome, {"correctness": value})

    def close(self) -> None:
        """End the verifier's processes."""
        self.verifier.close()


def grade_choice(problem: Problem, text: str) -> Outcome:
    """The outcome of a choice problem; it needs no worker. The key must be one of the problem's own letters."""
    if len(problem.answer) != 1 or problem.answer not in problem.letters:
        return "unparsed_gold"
    letter = option_letter(text, problem.options, problem.letters)
    if letter is None:
        return "unparsed_prediction"
    return "correct" if letter == problem.answer else "wrong"
