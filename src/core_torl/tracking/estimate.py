"""How a measured share is read here: a value with an interval around it, and a label that says of what.

A label is ``set/protocol/measure``, as in the metric ``eval/{set}/{protocol}/{measure}``. Values are shares from 0 to 1
and are shown in percent; a difference of two shares is shown in percentage points.
"""

from __future__ import annotations

from typing import Protocol


class Interval(Protocol):
    """A share, or a difference of shares, with the ends of its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Estimate(Interval, Protocol):
    """A share measured on ``n`` problems."""

    @property
    def n(self) -> int: ...


def split_label(label: str) -> tuple[str, str]:
    """``"math/standard/accuracy"`` as ``("math", "standard/accuracy")``; the second is empty without a slash."""
    name, _, measure = label.partition("/")
    return name, measure


def percent(estimate: Interval | None, signed: bool = False) -> str:
    """``41.0 [36.2, 45.9]`` in percent (or points, with a sign); a dash for None."""
    if estimate is None:
        return "–"
    style = "+.1f" if signed else ".1f"
    value, low, high = (f"{100 * x:{style}}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"
