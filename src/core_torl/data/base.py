"""What every problem source hands over: problems to train on, named sets to test on, and a report of how it got them.

The report travels with the data so that a run's log says which rows were left out and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from core_torl.problem import Problem


@dataclass(frozen=True)
class ProblemSets:
    """Problems to train on, test sets by name, and counts for the log (plain values only: it can go to JSON)."""

    train: list[Problem]
    test: dict[str, list[Problem]]
    report: dict[str, object]


class ProblemSource(Protocol):
    """An option of the config group ``data``."""

    def load(self) -> ProblemSets:
        """Read or make the problems. Raises a one-line error that names the config key at fault."""
        ...
