"""The pictures of a comparison, drawn from its numbers: each as a PNG and as an SVG.

``comparison`` is always drawn, ``line`` where there is an ``x``, ``retained`` where test sets have distractors, and
``curves`` where metrics were named. A cell has one colour in all of them but ``line``, whose lines are not cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from core_torl.evaluation.comparison import share
from core_torl.evaluation.statistics import Estimate
from core_torl.reports.finished import Group, x_of
from core_torl.reports.histories import Histories
from core_torl.tracking.comparison_figures import (
    CellPicture,
    best_cells,
    comparison_figure,
    curve_cells,
    curve_colours,
    line_figure,
    retained_figure,
    together,
)
from core_torl.tracking.comparison_table import distracted, measure_name
from core_torl.tracking.curves import AXIS_WORDS, Line, curves_figure, line_colours, write_numbers
from core_torl.tracking.metrics import STEP

Lines = Mapping[str, Sequence[tuple[float, Estimate]]]


def picture(one: Group, cell: Mapping[str, Any], headline: str, kept: str, histories: Histories) -> CellPicture:
    """What the figure shows of a cell; a run without ``metrics.jsonl`` has no curve."""
    curves = []
    for run in one.runs.values():
        # A step that was repeated after a restart counts as it was logged last.
        rows = {row.get(STEP, -1 - i): row for i, row in enumerate(histories.get(run.folder, []))}
        points = [(row.get("train/sampled_tokens"), row.get("reward/accuracy")) for row in rows.values()]
        curves.append([(float(x), float(y)) for x, y in points if x is not None and y is not None and math.isfinite(y)])
    return CellPicture(
        label=cell["label"],
        before=cell["before"].get(headline),
        after=cell["after"][headline],
        seeds=[share(rows) for rows in one.cell(headline).values()],
        kept_before=cell["before"].get(kept),
        kept=cell["after"].get(kept),
        kept_seeds=[share(rows) for rows in one.cell(kept).values()] if kept in cell["after"] else [],
        curves=[curve for curve in curves if curve],
    )


def cell_colours(
    curves: Sequence[Line], pictures: Sequence[CellPicture], baseline: str | None, notes: list[str]
) -> dict[str, str]:
    """The cells that ``curves.png`` draws and their colours; a note names those that would be too many."""
    having = [cell for cell in pictures if cell.label in {line.cell for line in curves}]
    drawn = [cell.label for cell in best_cells(having, baseline)]
    if len(drawn) < len(having):
        rest = ", ".join(cell.label for cell in having if cell.label not in drawn)
        notes.append(f"curves.png: the {len(drawn)} cells that can be told apart; only in curves.csv: {rest}.")
    return line_colours(drawn, curve_colours(pictures, baseline))


def apart(pictures: Sequence[CellPicture], baseline: str | None) -> list[str]:
    """A note for each cell whose seeds cannot be averaged in ``comparison.png``."""
    return [
        f"comparison.png: the seeds of {cell.label} have no stretch of sampled tokens in common, and are drawn by "
        "themselves as thin lines."
        for cell in curve_cells(pictures, baseline)
        if together(cell.curves) is None
    ]


def retained_over(comparison: Mapping[str, Any], cells: Sequence[str]) -> Mapping[str, Lines]:
    """Test set -> cell -> (K, share still solved with K distractors), of the sets that the table has."""
    found: dict[str, dict[str, list[tuple[float, Estimate]]]] = {}
    for name in comparison["sets"]:
        if (parts := distracted(name)) is None:
            continue
        for cell in comparison["cells"]:
            estimate = cell["after"].get(f"{name}/{comparison['decoding']}/retained")
            if estimate is not None and cell["label"] in cells:
                found.setdefault(parts[0], {}).setdefault(cell["label"], []).append((parts[1], estimate))
    return found


def lines_over(
    x: str, line: str | None, groups: Sequence[Group], comparison: dict[str, Any]
) -> dict[str, list[tuple[float, Estimate]]]:
    """(x, headline) of each cell under the name of its line; x is the mean over the cell's runs, noted in the cell."""
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for one, cell in zip(groups, comparison["cells"], strict=True):
        cell["x"] = sum(x_of(run, x) for run in one.runs.values()) / len(one.runs)
        points = lines.setdefault("" if line is None else one.words[line], [])
        if cell["x"] in {place for place, _ in points}:
            comparison["notes"].append(f"line.png: {one.label} is a second cell of its line at x = {cell['x']:g}.")
        points.append((cell["x"], cell["after"][comparison["headline"]]))
    return lines


def draw(
    cfg: DictConfig, comparison: Mapping[str, Any], pictures: Sequence[CellPicture], lines: Lines,
    curves: Sequence[Line], colours: Mapping[str, str], output: Path,
) -> dict[str, Path]:  # fmt: skip
    """Draw all pictures into ``output``, and ``curves.csv``; returns the SVG of each under its caption."""
    title, headline, confidence = comparison["title"], measure_name(comparison["headline"]), comparison["confidence"]
    found: dict[str, Path] = {}
    comparison_figure(pictures, output / "comparison.png", title, headline, comparison["baseline"], confidence)
    found[f"{headline} before and after training, what was kept, and how it got there"] = output / "comparison.svg"
    if lines:
        line_figure(lines, output / "line.png", title, cfg.x, headline, confidence)
        found[f"{headline} after training against {cfg.x}"] = output / "line.svg"
    best = [cell.label for cell in best_cells(pictures, comparison["baseline"])]
    if retained := retained_over(comparison, best):
        cells = line_colours(best, curve_colours(pictures, comparison["baseline"]))
        if len(best) < len(pictures):
            comparison["notes"].append(f"retained.png: {len(best)} of {len(pictures)} cells, as in comparison.png.")
        retained_figure(retained, output / "retained.png", title, cells, confidence)
        found["what is still solved with irrelevant concepts before the question"] = output / "retained.svg"
    if "curves" in comparison:
        metrics, axis = comparison["curves"]["metrics"], cfg.curves_axis
        write_numbers(curves, output / "curves.csv", axis)
        curves_figure(metrics, curves, colours, output / "curves.png", title, cfg.curves_window, confidence, axis)
        found[f"training over {AXIS_WORDS[axis]}s"] = output / "curves.svg"
    return found
