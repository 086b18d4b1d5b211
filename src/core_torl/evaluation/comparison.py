"""Is one way of training better than another: means over seeds, and differences paired by seed and by concept.

A result has two sources of chance: the seed of the run and the concepts that happen to be in the test set. All seeds
meet the same concepts, so both are drawn with replacement, crossed (Owen, "The pigeonhole bootstrap", 2007). Two cells
are compared on the seeds and concepts that both have, under the same draws: what makes a concept hard, or a seed lucky,
then cancels. A few seeds say little about the spread of all seeds: a bootstrap of n of them takes their variance
(n - 1) / n as large as it is, and knows nothing of t's heavy tails. What the drawn seeds add is therefore stretched by
``sqrt(n / (n - 1)) * t / z``, 1.6 for five seeds at 95 %. The paper CORE compares single runs.

A cell is ``seed -> concept -> (share, problems)``, shares between 0 and 1. Wrong input is a ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from core_torl.evaluation.statistics import Estimate, holm

# What is retained of sampled answers counts a problem by the share that was right: its weight need not be whole.
ConceptShares = Mapping[str, tuple[float, float]]
Cell = Mapping[int, ConceptShares]

_SAME = 1e-12  # differences of shares closer than this are equal: what is left is rounding


@dataclass(frozen=True, slots=True)
class Paired:
    """Cell minus baseline over the seeds and concepts that both have; ``left_out_*`` counts what only one of them has.

    ``p`` is None where a paired t-test has nothing to go by; ``test`` names the test, or says why there is none.
    """

    difference: Estimate
    seeds: list[int]
    concepts: int
    left_out_seeds: int
    left_out_concepts: int
    p: float | None
    test: str


def share(concepts: ConceptShares) -> float:
    """The mean over problems: each concept's share weighted by its number of problems."""
    problems = sum(n for _, n in concepts.values())
    if problems <= 0:
        raise ValueError("share: no problems; needs at least one concept with one problem")
    return sum(value * n for value, n in concepts.values()) / problems


def cell_mean(cell: Cell, confidence: float = 0.95, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean over seeds of the share over problems, with a percentile interval over drawn seeds and concepts.

    ``n`` counts the seeds, or the concepts where there is one seed; ``method`` says what was drawn. With one seed and
    one concept nothing can be drawn: the ends are nan.
    """
    _check(cell, confidence, resamples)
    seeds, concepts = sorted(cell), sorted({c for rows in cell.values() for c in rows})
    value = float(np.mean([share(cell[s]) for s in seeds]))
    drawn = _Draws(len(seeds), len(concepts), seed, resamples)
    means = drawn.means(drawn.shares(*_table(cell, seeds, concepts)), confidence)
    return drawn.estimate(value, means.clip(0, 1), confidence)


def paired(cell: Cell, baseline: Cell, confidence: float = 0.95, seed: int = 0, resamples: int = 2000) -> Paired:
    """Mean over common seeds of ``cell - baseline`` on the concepts that both have under that seed.

    Both sides of a resample are computed from the same drawn seeds and concepts. Raises ValueError if no seed is common
    with at least one concept.
    """
    _check(cell, confidence, resamples)
    _check(baseline, confidence, resamples)
    both = {s: set(cell[s]) & set(baseline[s]) for s in sorted(set(cell) & set(baseline))}
    seeds = [s for s, concepts in both.items() if concepts]
    if not seeds:
        raise ValueError(
            f"no seed with common concepts: one side has seeds {_listed(cell)}, the other {_listed(baseline)}"
        )
    one = {s: {c: cell[s][c] for c in both[s]} for s in seeds}
    two = {s: {c: baseline[s][c] for c in both[s]} for s in seeds}
    concepts = sorted(set().union(*(both[s] for s in seeds)))
    everything = {c for side in (cell, baseline) for s in seeds for c in side[s]}
    differences = np.array([share(one[s]) - share(two[s]) for s in seeds])
    drawn = _Draws(len(seeds), len(concepts), seed, resamples)
    by_seed = drawn.shares(*_table(one, seeds, concepts)) - drawn.shares(*_table(two, seeds, concepts))
    p, test = _t_test(differences)
    return Paired(
        difference=drawn.estimate(float(differences.mean()), drawn.means(by_seed, confidence).clip(-1, 1), confidence),
        seeds=seeds,
        concepts=len(concepts),
        left_out_seeds=len(set(cell) | set(baseline)) - len(seeds),
        left_out_concepts=len(everything) - len(concepts),
        p=p,
        test=test,
    )


def holm_of_known(pvalues: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm-adjusted p-values under the same names; a test without a p-value stays None and is not counted."""
    known = {name: p for name, p in pvalues.items() if p is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True)) if known else {}
    return {name: adjusted.get(name) for name in pvalues}


def seed_stretch(seeds: int, confidence: float) -> float:
    """What a bootstrap over so few seeds is too narrow by: 1 for a lone one (nothing is drawn), towards 1 for many."""
    if seeds < 2:
        return 1.0
    quantile = 0.5 + confidence / 2
    t_over_z = stats.t.ppf(quantile, seeds - 1) / stats.norm.ppf(quantile)
    return math.sqrt(seeds / (seeds - 1)) * float(t_over_z)


class _Draws:
    """How often each seed and each concept is drawn in each resample; a lone one is always taken once."""

    def __init__(self, seeds: int, concepts: int, seed: int, resamples: int) -> None:
        rng = np.random.default_rng(seed)
        self.seeds, self.concepts = seeds, concepts
        self._seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # [resamples, seeds]
        self._concept_counts = rng.multinomial(concepts, np.full(concepts, 1 / concepts), size=resamples)

    def shares(self, sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """[resamples, seeds] from right answers and problems [seeds, concepts]; nan where no problem was drawn."""
        problems = (self._concept_counts @ sizes.T).astype(float)
        right = self._concept_counts @ sums.T
        return np.divide(right, problems, out=np.full_like(problems, np.nan), where=problems > 0)

    def means(self, by_seed: np.ndarray, confidence: float) -> np.ndarray:
        """[resamples]: the mean over the drawn seeds, those without a drawn problem left out.

        Its distance from the mean over all seeds, under the same drawn concepts, is stretched (see above).
        """
        known = np.isfinite(by_seed)
        everyone = np.where(known.any(axis=1), np.nansum(by_seed, axis=1), np.nan) / known.sum(axis=1).clip(min=1)
        weights = (self._seed_counts * known).sum(axis=1).astype(float)
        total = (self._seed_counts * np.where(known, by_seed, 0.0)).sum(axis=1)
        drawn = np.divide(total, weights, out=np.full_like(weights, np.nan), where=weights > 0)
        return everyone + seed_stretch(self.seeds, confidence) * (drawn - everyone)

    def estimate(self, value: float, means: np.ndarray, confidence: float) -> Estimate:
        n = self.seeds if self.seeds > 1 else self.concepts
        if self.seeds == self.concepts == 1:
            return Estimate(value, math.nan, math.nan, n, "no interval: one seed and one concept")
        low, high = np.nanquantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
        units = [f"{count} {name}" for count, name in ((self.seeds, "seeds"), (self.concepts, "concepts")) if count > 1]
        lone = ", one seed" if self.seeds == 1 else ", one concept" if self.concepts == 1 else ""
        flat = " (degenerate)" if high - low < _SAME else ""
        return Estimate(
            value, float(low), float(high), n, f"percentile bootstrap over {' and '.join(units)}{lone}{flat}"
        )


def _table(cell: Cell, seeds: list[int], concepts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Right answers and problems, both [seeds, concepts]; a concept that a seed lacks has 0 problems."""
    rows = [[cell[s].get(c, (0.0, 0)) for c in concepts] for s in seeds]
    values, sizes = np.array([[v for v, _ in row] for row in rows]), np.array([[n for _, n in row] for row in rows])
    return values * sizes, sizes


def _t_test(differences: np.ndarray) -> tuple[float | None, str]:
    if len(differences) < 2:
        return None, "none: one common seed"
    if np.ptp(differences) < _SAME:
        if abs(differences[0]) < _SAME:
            return 1.0, f"no seed of {len(differences)} differs"
        return None, f"none: all {len(differences)} seeds differ by the same"
    n = len(differences)
    t = float(differences.mean() / (differences.std(ddof=1) / math.sqrt(n)))
    return float(2 * stats.t.sf(abs(t), n - 1)), f"paired t over {n} seeds"


def _check(cell: Cell, confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: use a share between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: use 1 or more")
    if not cell or not all(cell.values()):
        raise ValueError("a cell needs at least one seed, and each seed at least one concept")
    for seed, rows in cell.items():
        for concept, (value, n) in rows.items():
            if n <= 0 or not 0 <= value <= 1:
                raise ValueError(f"seed {seed}, {concept}: share {value} of {n} problems; needs 0 to 1 of more than 0")


def _listed(cell: Cell) -> str:
    return ", ".join(map(str, sorted(cell)))
