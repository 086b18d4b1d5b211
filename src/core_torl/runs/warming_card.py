"""What every card of a warm-started policy says: how the policy was made, and what it could do before any reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core_torl.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Made:
    """A policy that has just been trained: its size, the steps of stage 1, the minutes it took, and its figures."""

    architecture: str
    parameters: int
    vocabulary: int
    drilled: int
    minutes: float
    measured: Mapping[str, Estimate] = field(default_factory=dict)


def rows(measured: Mapping[str, Estimate]) -> str:
    """The figures as rows of a table: measure, share, interval, n, method."""
    return "\n".join(
        f"| {n} | {100 * e.value:.1f} % | {100 * e.low:.1f} to {100 * e.high:.1f} | {e.n} | {e.method} |"
        for n, e in measured.items()
    )
