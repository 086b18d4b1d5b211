"""Which problems an RL step trains on: a pure function of (seed, step), so a resumed run meets the same ones.

Each pass over the problems is a permutation made from the seed and the pass. No state has to be stored, a changed
number of workers changes nothing, and every variant with the same seed gets the same problems in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class PromptStream:
    """``size`` problems, ``per_step`` of them in each RL step, in endless seeded passes."""

    def __init__(self, size: int, per_step: int, seed: int) -> None:
        if size < 1 or per_step < 1:
            raise ValueError(f"prompts_per_step={per_step} of {size} problems: both must be at least 1")
        self.size, self.per_step, self.seed = size, per_step, seed
        self._pass: tuple[int, np.ndarray] | None = None

    def _order(self, number: int) -> np.ndarray:
        if self._pass is None or self._pass[0] != number:
            self._pass = (number, np.random.default_rng([self.seed, number]).permutation(self.size))
        return self._pass[1]

    def at(self, step: int) -> list[int]:
        """Indices of the problems of RL step ``step`` (counted from 0)."""
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [int(self._order(p // self.size)[p % self.size]) for p in places]

    def epoch(self, step: int) -> float:
        """Passes over the problems that are complete after ``step`` steps."""
        return step * self.per_step / self.size


class StepIndices:
    """A loader that hands out RL step numbers, from ``start`` to ``total``. Its length is ``total``, resumed or not."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        yield from range(self.start, self.total)
