"""Metrics over the RL steps of finished runs: a curve for each cell, and where it began against where it ended.

Everything comes from the rows that the runs logged. A run is smoothed first and averaged with the other seeds
afterwards, so that the spread between seeds is that of smoothed runs. A mean is taken only where every seed of the cell
that has the metric has a value: a seed that drops out of a mean would show as a step in it. Over samples or sampled
tokens, where seeds take steps of other lengths, each run is drawn straight from point to point and the mean is taken on
a grid that all seeds reach. What a reader would not expect of this becomes a note.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core_torl.config.errors import UserError
from core_torl.evaluation.statistics import Estimate, t_mean
from core_torl.reports.finished import COMPLETED, Group, Run
from core_torl.tracking.curves import AXES, BAND_FROM, Line
from core_torl.tracking.figures import series
from core_torl.tracking.metrics import NAT, SHARE, STEP, find

Histories = Mapping[Path, Sequence[Mapping[str, Any]]]  # folder of a run -> its logged rows

Rows = Sequence[Mapping[str, Any]]
# What is kept of each row, asked for or not: the axes, what comparison.png draws, and the seconds that a step took.
_ALWAYS = (*AXES.values(), "reward/accuracy", "time/step_s")

GRID = 200  # points of a mean over another axis than RL steps

_LINES = 3  # notes of one kind, of which more become one

_SIGNED = (NAT, "nat/token", "reward")  # units of numbers that may be negative


# ---- reading -----------------------------------------------------------------------------------------------------


class Kept(dict[Path, list[dict[str, Any]]]):
    """Folder of a run -> its logged rows with some of their metrics only: all of them may be gigabytes.

    ``names`` are all metrics that some run has a finite number for; ``last`` has for each run its last whole row of a
    training step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.last: dict[Path, dict[str, Any]] = {}


def read_each(
    runs: Iterable[Run], metrics: Iterable[str], notes: list[str], take: Callable[[Run, Rows], None] | None = None
) -> Kept:
    """Read the rows of each run once, hand them whole to ``take``, and keep ``metrics`` and the axes of them.

    A run without rows, or with rows that cannot be read, is missing; a note says so of a finished one, and of any that
    is broken.
    """
    kept = Kept()
    wanted = dict.fromkeys([*_ALWAYS, *metrics])
    for run in runs:
        try:
            _read_one(run, wanted, kept, take)
        except FileNotFoundError:
            if run.state == COMPLETED:
                notes.append(f"{run.name} has no metrics.jsonl: its learning curve is missing.")
        except UserError:  # a server that fails
            raise
        except ValueError as error:
            broken = str(error).removeprefix(f"{run.folder}/")
            notes.append(f"{run.name}: broken, its learning curve is missing ({broken}).")
    return kept


def _read_one(run: Run, wanted: Iterable[str], kept: Kept, take: Callable[[Run, Rows], None] | None) -> None:
    """A function of its own, so that the rows of a run are gone before those of the next are read."""
    rows = run.rows()
    if take is not None:
        take(run, rows)
    # The names as they are in `wanted`: each row has read its own.
    kept[run.folder] = [{name: row[name] for name in wanted if name in row} for row in rows]
    kept.names |= _finite(rows)
    kept.last[run.folder] = next((row for row in reversed(rows) if AXES["samples"] in row), {})


def present(key: str, names: Sequence[str], histories: Histories) -> list[str]:
    """``names`` without those that end in a question mark and that no run has; the marks are taken off.

    UserError for one without such a mark that no run has a number for.
    """
    there = logged(histories)
    chosen = [name.removesuffix("?") for name in names if not name.endswith("?") or name.removesuffix("?") in there]
    check_metrics(key, chosen, histories)
    return list(dict.fromkeys(chosen))


def logged(histories: Histories) -> set[str]:
    """The metrics that some run has a finite number for."""
    if isinstance(histories, Kept):
        return histories.names
    return _finite(row for own in histories.values() for row in own)


def _finite(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    return {k for row in rows for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)} - {STEP}


def check_metrics(key: str, names: Sequence[str], histories: Histories) -> None:
    """UserError for the first of ``names`` that no run has a number for; ``key`` is where the name was given."""
    there = logged(histories)  # without the axis itself
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, sorted(there), n=1, cutoff=0.0)
            hint = f"the nearest that there is: {near[0]!r}" if near else "no run has logged anything"
            raise UserError(f"{key}: no run has a number for the metric {name!r}; {hint}")


def values_of(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """RL step -> value, finite ones only; the last one counts where a step was logged twice."""
    return {int(step): value for step, value in zip(*series(rows, name), strict=True)}


def _of_seeds(one: Group, name: str, histories: Histories) -> dict[int, dict[int, float]]:
    """seed -> RL step -> value, of the runs that have the metric."""
    found = {seed: values_of(histories.get(run.folder, []), name) for seed, run in sorted(one.runs.items())}
    return {seed: values for seed, values in found.items() if values}


# ---- curves ------------------------------------------------------------------------------------------------------


def smooth(values: Mapping[int, float], window: int, steps: Iterable[int]) -> dict[int, float]:
    """At each of ``steps``, the mean of the values in the ``window`` of RL steps around it (odd, cut at the ends).

    A step whose window holds no value stays out, and so does one before the first value or after the last: a run that
    has ended is not drawn on.
    """
    half, found = window // 2, {}
    for step in steps:
        near = [values[k] for k in range(step - half, step + half + 1) if k in values]
        if near and min(values) <= step <= max(values):
            found[step] = math.fsum(near) / len(near)
    return found


def cell_lines(
    one: Group, name: str, histories: Histories, window: int, confidence: float, axis: str = "rl_step"
) -> list[Line]:
    """The mean over seeds where a band can be drawn around it, otherwise a line for each seed; [] without values."""
    seeds = _of_seeds(one, name, histories)
    # Some metrics have a value in few steps, others in each run: a seed counts where its window reaches one.
    every = sorted({step for values in seeds.values() for step in values})
    curves: dict[int, dict[float, float]] = {}
    for seed, values in seeds.items():
        smoothed = smooth(values, window, every)
        places = {k: k for k in smoothed} if axis == "rl_step" else places_of(histories[one.runs[seed].folder], axis)
        # Of steps at one place (no tokens were sampled in between) the last counts.
        curves[seed] = {places[k]: v for k, v in smoothed.items() if k in places}
    if axis != "rl_step" and len(curves) >= BAND_FROM:
        curves = _on_one_grid(curves) or curves
    points = sorted({place for curve in curves.values() for place in curve})
    common = [place for place in points if all(place in curve for curve in curves.values())]
    if len(curves) >= BAND_FROM and common:
        means = [(place, seed_mean(name, [c[place] for c in curves.values()], confidence)) for place in common]
        return [Line(name, one.label, None, len(curves), means)]
    return [
        Line(
            name, one.label, seed, 1, [(place, seed_mean(name, [value], confidence)) for place, value in curve.items()]
        )
        for seed, curve in curves.items()
    ]


def places_of(rows: Sequence[Mapping[str, Any]], axis: str) -> dict[int, float]:
    """RL step -> where it lies on the axis; a step whose row does not say lies where the step before it does."""
    steps = sorted({int(row[STEP]) for row in rows if STEP in row})
    known, found, last = values_of(rows, AXES[axis]), {}, None
    for step in steps:
        last = known.get(step, 0.0 if step == 0 else last)
        if last is not None:
            found[step] = last
    return found


def _on_one_grid(curves: Mapping[int, Mapping[float, float]]) -> dict[int, dict[float, float]]:
    """Each curve, straight from point to point, at places that all of them reach; {} where there is no such stretch."""
    if not all(curves.values()):
        return {}
    first, last = max(min(curve) for curve in curves.values()), min(max(curve) for curve in curves.values())
    if first > last:
        return {}
    same = len({tuple(curve) for curve in curves.values()}) == 1
    points = min(GRID, max(len(curve) for curve in curves.values()))
    grid = list(next(iter(curves.values()))) if same else np.linspace(first, last, points).tolist()
    return {
        seed: dict(zip(grid, np.interp(grid, list(curve), list(curve.values())).tolist(), strict=True))
        for seed, curve in curves.items()
    }


def metric_lines(
    groups: Sequence[Group], names: Sequence[str], histories: Histories, window: int, confidence: float,
    notes: list[str], axis: str = "rl_step",
) -> list[Line]:  # fmt: skip
    """All lines of the picture, by metric and cell. UserError for a metric that no run has."""
    check_metrics("curves", names, histories)
    found: list[Line] = []
    for name in names:
        for one in groups:
            own = cell_lines(one, name, histories, window, confidence, axis)
            if own and own[0].seed is not None and len(own) >= BAND_FROM:
                where = "RL step" if axis == "rl_step" else f"stretch of {axis}"
                notes.append(f"curves: {one.label} has no {where} with {name} in all its runs: no mean of it.")
            found += own
    if axis == "rl_step":
        _note_ends(groups, histories, notes)
    _note_gaps("curves", groups, names, histories, notes)
    return found


# ---- first and last ----------------------------------------------------------------------------------------------


def first_and_last(
    groups: Sequence[Group], names: Sequence[str], histories: Histories, steps: int, confidence: float,
    notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Means over the first and over the last ``steps`` RL steps of each run, then over seeds.

    A value from before training, at step 0, belongs to neither. UserError for a metric that no run has.
    """
    check_metrics("final", names, histories)
    metrics: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        metrics[name] = []
        for one in groups:
            seeds = {
                seed: _ends(values, _last_step(histories[one.runs[seed].folder]), steps)
                for seed, values in _of_seeds(one, name, histories).items()
            }
            row: dict[str, Any] = {"cell": one.label}
            for place, end in enumerate(("first", "last")):
                known = [both[place] for both in seeds.values()]
                known = [value for value in known if value is not None]
                row[end] = seed_mean(name, known, confidence) if known else None
                if 0 < len(known) < len(seeds):
                    notes.append(f"final: {name} has no value in the {end} {steps} steps of some runs of {one.label}.")
            row["runs"] = {seed: {"first": first, "last": last} for seed, (first, last) in seeds.items()}
            metrics[name].append(row)
    short = [
        one.label
        for one in groups
        if any(_last_step(histories[run.folder]) < 2 * steps for run in one.runs.values() if run.folder in histories)
    ]
    if short:
        notes.append(f"final: first and last {steps} RL steps have steps in common in {', '.join(short)}.")
    _note_gaps("final", groups, names, histories, notes)
    return {"steps": steps, "metrics": metrics}


def _ends(values: Mapping[int, float], last: int, steps: int) -> tuple[float | None, float | None]:
    """Mean over RL steps 1 to ``steps``, and over as many up to ``last``; None where a stretch has no value."""
    stretches = (range(1, steps + 1), range(max(1, last - steps + 1), last + 1))
    found = [[values[step] for step in stretch if step in values] for stretch in stretches]
    first, second = (math.fsum(known) / len(known) if known else None for known in found)
    return first, second


# ---- small things ------------------------------------------------------------------------------------------------


def seed_mean(name: str, values: Sequence[float], confidence: float) -> Estimate:
    """Mean over seeds with its t-interval, which ends where such values do: no share above 1, no time below 0."""
    found, known = t_mean(values, confidence), find(name)
    if known is None or known.unit in _SIGNED or not math.isfinite(found.low):
        return found
    highest = 1.0 if known.unit == SHARE else math.inf
    return dataclasses.replace(found, low=max(0.0, found.low), high=min(highest, found.high))


def _last_step(rows: Sequence[Mapping[str, Any]]) -> int:
    return int(max((row[STEP] for row in rows if STEP in row), default=0))


def _note_ends(groups: Sequence[Group], histories: Histories, notes: list[str]) -> None:
    """Cells whose means end before their longest run does; one line for all where they are many."""
    found = {}
    for one in groups:
        ends = [_last_step(histories[run.folder]) for run in one.runs.values() if run.folder in histories]
        if len(ends) >= BAND_FROM and min(ends) < max(ends):
            found[one.label] = (min(ends), max(ends))
    if len(found) > _LINES:
        apart = max(last - first for first, last in found.values())
        notes.append(
            f"curves: in {len(found)} cells runs end at different RL steps, up to {apart} apart; means end with the "
            "first of them."
        )
        return
    notes += [
        f"curves: the runs of {label} end between RL steps {first} and {last}; means end with the first of them."
        for label, (first, last) in found.items()
    ]


def _note_gaps(key: str, groups: Sequence[Group], names: Sequence[str], histories: Histories, notes: list[str]) -> None:
    """Cells that lack a metric, runs that lack one which others of their cell have, values that are no numbers."""
    for name in names:
        lacking = [one.label for one in groups if not _of_seeds(one, name, histories)]
        if lacking:
            notes.append(f"{key}: no {name} in {', '.join(lacking)}.")
        for one in groups:
            have, runs = len(_of_seeds(one, name, histories)), len(one.runs)
            if 0 < have < runs:
                notes.append(f"{key}: {name} is in {have} of the {runs} runs of {one.label} only.")
            rows = [row for run in one.runs.values() for row in histories.get(run.folder, [])]
            odd = sum(isinstance(v := row.get(name), float) and not math.isfinite(v) for row in rows)
            if odd:
                notes.append(f"{key}: {odd} values of {name} in {one.label} are nan or infinite, and left out.")
