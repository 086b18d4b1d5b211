"""What every problem source hands over: problems to train on, named sets to test on, and a report of how it got them.

The report travels with the data so that a run's log says which rows were left out and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from core_torl.problem import Problem


@dataclass(frozen=True)
class ProblemSets:
    """Problems to train on, test sets by name, and counts for the log (plain values only: it can go to JSON).

    ``redraw(problem, seed)``, where a source has it, asks a training problem's concept anew with operands that no test
    problem has: a pure function of both, and the new uid starts with the old one.
    """

    train: list[Problem]
    test: dict[str, list[Problem]]
    report: dict[str, object]
    redraw: Callable[[Problem, int], Problem] | None = None


class ProblemSource(Protocol):
    """An option of the config group ``data``."""

    def load(self) -> ProblemSets:
        """Read or make the problems. Raises a one-line error that names the config key at fault."""
        ...
