"""How sure a measured number is: intervals for shares, means and differences, and tests for pairs of runs.

Two policies are compared on the same problems, so all comparisons are paired. Problems of one concept stand or fall
together; where the concept of each problem is known the bootstrap draws whole concepts, otherwise the interval would be
too narrow. All functions are pure; random ones take a seed. The paper CORE reports single numbers without intervals.

Shares lie between 0 and 1; ``confidence`` is the coverage of a two-sided interval. Wrong input is a ``ValueError``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

_BATCH_NUMBERS = 2_000_000  # of resampled values held at once: 16 MB


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval. ``n`` counts the independent units behind it: items, or clusters where given.

    ``method`` names the interval. "percentile (degenerate)" has no width because all units agree (or there is only one
    of them): it then says nothing about the spread, and a share is better given by ``wilson``.
    """

    value: float
    low: float
    high: float
    n: int
    method: str


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval for a share of ``successes`` in ``n`` trials; sound at 0 and at n successes as well.

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927). With z the normal quantile:
    ``(p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``.
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes in {n} trials; needs n >= 1 and 0 <= successes <= n")
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the bound is exactly 0 or 1; rounding must not push it past.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Estimate(p, low, high, n, "Wilson")


def bootstrap_mean(values: Sequence[float], confidence: float = 0.95, seed: int = 0, resamples: int = 2000) -> Estimate:
    """Mean of ``values`` with a BCa bootstrap interval (percentile where BCa is not defined, and said so)."""
    numbers = _numbers("bootstrap_mean: values", values)
    return _bootstrap((numbers,), _mean, numbers, confidence, seed, resamples, "items")


def t_mean(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of a few independent ``values``, such as one for each seed, with Student's t-interval.

    A bootstrap of three or five values is too narrow; t is exact where they are normal. One value has no interval: the
    ends are nan.
    """
    _check_confidence(confidence)
    numbers = _numbers("t_mean: values", values)
    value, n = float(numbers.mean()), len(numbers)
    if n == 1:
        return Estimate(value, math.nan, math.nan, n, "no interval: one value")
    half = _t_quantile(n - 1, 0.5 + confidence / 2) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return Estimate(value, value - half, value + half, n, f"t over {n} values")


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """Mean of ``after - before`` item by item; above 0 where ``after`` is larger. Both scores in the same units.

    ``clusters`` gives each item's group (its concept): whole groups are drawn, and a drawn group brings all its items,
    so the value stays the mean over items.
    """
    first, second = _numbers("paired_difference: before", before), _numbers("paired_difference: after", after)
    _check_lengths("paired_difference", before=first, after=second)
    differences = second - first
    if clusters is None:
        return _bootstrap((differences,), _mean, differences, confidence, seed, resamples, "items")
    _check_lengths("paired_difference", before=first, clusters=clusters)
    number_of = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    places = np.array([number_of[cluster] for cluster in clusters])
    sums = np.bincount(places, weights=differences)  # [clusters]
    sizes = np.bincount(places).astype(float)  # [clusters]
    return _bootstrap((sums, sizes), _ratio, sums / sizes, confidence, seed, resamples, "clusters")


def ratio_of_sums(
    parts: Sequence[float],
    wholes: Sequence[float],
    clusters: Sequence[Hashable],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """``sum(parts) / sum(wholes)``, such as the share that is kept of what there was; ``wholes`` must be above 0.

    Whole clusters are drawn, and a drawn one brings all its items to both sums.
    """
    over, under = _numbers("ratio_of_sums: parts", parts), _numbers("ratio_of_sums: wholes", wholes)
    _check_lengths("ratio_of_sums", parts=over, wholes=under)
    _check_lengths("ratio_of_sums", parts=over, clusters=clusters)
    if np.any(under <= 0):
        raise ValueError("ratio_of_sums: wholes must be above 0; leave the other items out")
    number_of = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    places = np.array([number_of[cluster] for cluster in clusters])
    top, bottom = np.bincount(places, weights=over), np.bincount(places, weights=under)  # [clusters]
    return _bootstrap((top, bottom), _ratio, top / bottom, confidence, seed, resamples, "clusters")


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact p-value for "``after`` solves as many items as ``before``", on the items where they differ.

    McNemar (1947) with the binomial distribution instead of its approximation; 1.0 where no item changed.
    """
    first, second = _bools("mcnemar: before", before), _bools("mcnemar: after", after)
    _check_lengths("mcnemar", before=first, after=second)
    won, lost = int(np.sum(second & ~first)), int(np.sum(first & ~second))
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def holm(pvalues: Sequence[float]) -> list[float]:
    """p-values adjusted for testing several hypotheses at once, in the order given.

    Holm, "A simple sequentially rejective multiple test procedure" (1979): the i-th smallest of m is multiplied by
    m - i + 1, never falls below a smaller one's adjusted value, and stops at 1.
    """
    numbers = _numbers("holm: pvalues", pvalues)
    if np.any((numbers < 0) | (numbers > 1)):
        raise ValueError("holm: pvalues must lie between 0 and 1")
    order = np.argsort(numbers, kind="stable")
    steps = numbers[order] * np.arange(len(numbers), 0, -1)
    adjusted = np.empty_like(numbers)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


@cache
def _t_quantile(freedom: int, share: float) -> float:
    return float(stats.t.ppf(share, freedom))  # kept: a curve asks for the same one at each of its points


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    return values.mean(axis=axis)


def _ratio(sums: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis=axis) / sizes.sum(axis=axis)


def _bootstrap(
    units: tuple[np.ndarray, ...],
    statistic: Callable[..., np.ndarray],
    unit_values: np.ndarray,
    confidence: float,
    seed: int,
    resamples: int,
    unit_name: str,
) -> Estimate:
    """Interval of ``statistic`` when the rows of ``units`` are drawn with replacement, all arrays by the same draw."""
    _check_confidence(confidence)
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: use 1 or more")
    n = len(unit_values)
    if np.ptp(unit_values) == 0:  # every resample has this value; the bias correction of BCa would divide 0 by 0
        value = float(unit_values[0])
        return Estimate(value, value, value, n, "percentile (degenerate)")

    def interval(method: str) -> tuple[float, float]:
        with warnings.catch_warnings():
            # Where BCa is undefined scipy warns and returns nan; the nan is acted upon below.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            found = stats.bootstrap(
                units,
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=resamples,
                batch=max(1, _BATCH_NUMBERS // n),
                confidence_level=confidence,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        return float(found.low), float(found.high)

    value = float(statistic(*units, axis=0))
    low, high = interval("BCa")
    if math.isfinite(low) and math.isfinite(high):
        return Estimate(value, low, high, n, f"BCa bootstrap over {unit_name}")
    low, high = interval("percentile")
    return Estimate(value, low, high, n, f"percentile bootstrap over {unit_name}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: use a share between 0 and 1, such as 0.95")


def _check_lengths(where: str, **columns: Sequence[Hashable] | np.ndarray) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"{where}: {listed} values; give one of each for every item, in the same order")


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or numbers.size == 0:
        raise ValueError(f"{name}: needs a flat sequence of at least one number, got shape {numbers.shape}")
    if not np.all(np.isfinite(numbers)):
        raise ValueError(f"{name}: holds nan or infinity at place {int(np.argmin(np.isfinite(numbers)))}")
    return numbers


def _bools(name: str, values: Sequence[bool]) -> np.ndarray:
    numbers = _numbers(name, values)
    if not np.all((numbers == 0) | (numbers == 1)):
        raise ValueError(f"{name}: needs true or false for every item (or 1 and 0)")
    return numbers.astype(bool)
