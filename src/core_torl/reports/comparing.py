"""A comparison of finished runs: one table, the numbers behind it, and its pictures.

A cell holds the runs that differ in nothing but their seed; see ``reports.finished`` for how they are found. Accuracies
come from the rows per concept in ``results.json``, so that seeds and concepts can both be drawn; see
``evaluation.comparison``. Metrics of the training itself come from ``metrics.jsonl``; see ``reports.histories``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.text import Text

from core_torl.config.errors import UserError, nearest
from core_torl.evaluation.comparison import Cell, cell_mean, holm_of_known, paired, share
from core_torl.evaluation.statistics import Estimate
from core_torl.reports.finished import Group, check_sets, find_runs, group, x_of
from core_torl.reports.histories import Histories, first_and_last, metric_lines, read_histories
from core_torl.tracking.comparison_figures import (
    CellPicture,
    best_cells,
    comparison_figure,
    curve_colours,
    line_figure,
)
from core_torl.tracking.comparison_table import absent, legend, markdown, measure_name, rich_tables
from core_torl.tracking.console import make_console
from core_torl.tracking.curves import Line, curves_figure, line_colours, write_numbers

MASTERED = "mastered"  # the test set of what the model could do before


def report(cfg: DictConfig) -> None:
    """Write ``table.md``, ``comparison.json``, ``comparison.png`` and what was asked for beside; print the table.

    ``x`` asks for ``line.png``, ``curves`` for ``curves.png`` and ``curves.csv``, ``final`` for a second table.
    """
    folders = [Path(f) for f in ([cfg.runs] if isinstance(cfg.runs, str) else cfg.runs)]
    runs, unfinished = find_runs(folders)
    if not runs:
        also = f"; {len(unfinished)} unfinished" if unfinished else ""
        raise UserError(f"runs={cfg.runs}: no finished training run (a results.json of core-torl-train) in it{also}")
    groups = group(runs, list(cfg.by))
    labels = {g.label for g in groups}
    if cfg.baseline is not None and cfg.baseline not in labels:
        hint = nearest(cfg.baseline, labels)
        raise UserError(f"baseline={cfg.baseline}: no such cell.{hint} Cells: {', '.join(sorted(labels))}")
    groups.sort(key=lambda g: (g.label != cfg.baseline, _natural(g.label)))
    check_sets(runs, list(cfg.sets), cfg.decoding, cfg.headline)
    comparison = compare(groups, cfg.headline, list(cfg.sets), cfg.decoding, cfg.baseline, cfg.confidence, cfg.seed)
    comparison |= {
        "title": cfg.title or ", ".join(f.resolve().name for f in folders), "by": list(cfg.by), "x": cfg.x,
        "unfinished": unfinished,
    }  # fmt: skip
    notes = comparison["notes"]
    histories = read_histories(groups, notes)
    pictures = [
        picture(one, cell, cfg.headline, f"{MASTERED}/{cfg.decoding}/accuracy", histories)
        for one, cell in zip(groups, comparison["cells"], strict=True)
    ]
    lines = {} if cfg.x is None else lines_over(cfg.x, cfg.line, groups, comparison)
    curves = metric_lines(groups, list(cfg.curves), histories, cfg.curves_window, cfg.confidence, notes)
    colours = _colours(curves, pictures, cfg.baseline, notes)
    if cfg.curves:
        comparison["curves"] = {"metrics": list(cfg.curves), "window": cfg.curves_window, "drawn": list(colours)}
    if cfg.final:
        comparison["final"] = first_and_last(
            groups, list(cfg.final), histories, cfg.final_steps, cfg.confidence, notes
        )  # fmt: skip
    output = Path(cfg.output)
    output.mkdir(parents=True, exist_ok=True)
    written = ["table.md", "comparison.json", "comparison.png"]
    if cfg.x is not None:
        line_figure(lines, output / "line.png", comparison["title"], cfg.x, measure_name(cfg.headline), cfg.confidence)
        written.append("line.png")
    if cfg.curves:
        write_numbers(curves, output / "curves.csv")
        curves_figure(
            list(cfg.curves), curves, colours, output / "curves.png", comparison["title"], cfg.curves_window,
            cfg.confidence,
        )  # fmt: skip
        written += ["curves.png", "curves.csv"]
    comparison_figure(
        pictures, output / "comparison.png", comparison["title"], measure_name(cfg.headline), cfg.baseline,
        cfg.confidence,
    )  # fmt: skip
    (output / "table.md").write_text(markdown(comparison))
    (output / "comparison.json").write_text(json.dumps(_plain(comparison), indent=1) + "\n")
    console = make_console()
    for table in rich_tables(comparison):
        console.print(table)
    for line in [*legend(comparison), *(f"Note: {note}" for note in comparison["notes"])]:
        console.print(Text(line))
    for line in absent(comparison):
        console.print(Text(f"Not in the table: {line}", style="red"))
    console.print(Text(f"Wrote {', '.join(written)} in {output}"))


# ---- numbers -----------------------------------------------------------------------------------------------------


def compare(
    groups: Sequence[Group], headline: str, sets: Sequence[str], decoding: str, baseline: str | None,
    confidence: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """All numbers of the comparison, estimates as ``Estimate``; ``notes`` says what a reader would not expect."""
    labels = [headline, *(f"{s}/{decoding}/{m}" for s in sets for m in ("accuracy", "robust_accuracy"))]
    labels = list(dict.fromkeys(labels))
    reference = next((g.cell(headline) for g in groups if g.label == baseline), None)
    notes: list[str] = []
    cells = []
    for one in groups:
        after = {label: cell_mean(c, confidence, seed) for label in labels if (c := one.cell(label))}
        before = {label: e for label in labels if (e := _before(one, label, confidence, seed))}
        kept = f"{MASTERED}/{decoding}/accuracy"
        few = {len(c) for label in labels if (c := one.cell(label))} - {len(one.runs)}
        if few:
            notes.append(f"{one.label}: some test sets are those of {min(few)} of its {len(one.runs)} runs only.")
        tokens = [run.tokens for run in one.runs.values() if run.tokens is not None]
        cells.append({
            "label": one.label, "by": one.by, "seeds": sorted(one.runs),
            "rl_steps": sum(run.steps for run in one.runs.values()) / len(one.runs),
            "sampled_tokens": sum(tokens) / len(tokens) if tokens else None,
            "before": before, "after": after,
            "retention": after[kept].value / before[kept].value
            if kept in after and kept in before and before[kept].value > 0 else None,
            "paired": None if reference is None or one.label == baseline
            else _paired(one, reference, headline, baseline, confidence, seed, notes),
            "runs": [
                {"folder": str(run.folder), "seed": s, "rl_steps": run.steps, "sampled_tokens": run.tokens,
                 "headline": share(run.concepts(headline))}
                for s, run in sorted(one.runs.items())
            ],
        })  # fmt: skip
    compared = [c for c in cells if c["paired"] is not None]
    for name, p in holm_of_known({c["label"]: c["paired"]["p"] for c in compared}).items():
        next(c for c in compared if c["label"] == name)["paired"]["p_holm"] = p
    notes += [note for label in labels if (note := _weights(groups, label))]
    return {
        "headline": headline, "sets": list(sets), "decoding": decoding, "baseline": baseline, "confidence": confidence,
        "seed": seed, "cells": cells, "notes": notes,
    }  # fmt: skip


def _before(one: Group, label: str, confidence: float, seed: int) -> Estimate | None:
    """From the rows per concept before training; from the estimates, without an interval, where those are absent."""
    cell = one.cell(label, "per_concept_before")
    if len(cell) == len(one.runs):
        return cell_mean(cell, confidence, seed)
    values = [run.results["before"][label]["value"] for run in one.runs.values() if label in run.results["before"]]
    if len(values) < len(one.runs):
        return None
    return Estimate(sum(values) / len(values), math.nan, math.nan, len(values), "no interval: no rows per concept")


def _paired(
    one: Group, reference: Cell, headline: str, baseline: str | None, confidence: float, seed: int, notes: list[str]
) -> dict[str, Any]:
    try:
        found = paired(one.cell(headline), reference, confidence, seed)
    except ValueError as error:
        raise UserError(f"{one.label} against {baseline}: {error}") from error
    if found.left_out_seeds or found.left_out_concepts:
        notes.append(
            f"{one.label} against {baseline}: paired over {len(found.seeds)} common seeds and {found.concepts} common "
            f"concepts; {found.left_out_seeds} seeds and {found.left_out_concepts} concepts have no partner."
        )
    if found.p is None:
        notes.append(f"{one.label} against {baseline}: no p-value, {found.test.removeprefix('none: ')}.")
    return dataclasses.asdict(found) | {"difference": found.difference}


def _weights(groups: Sequence[Group], label: str) -> str | None:
    """Where only some problems of a concept were permuted, a mean over rows per concept is not that over problems."""
    runs = [run for one in groups for run in one.runs.values() if label in run.results["after"] and run.concepts(label)]
    off = [run for run in runs if abs(share(run.concepts(label)) - run.results["after"][label]["value"]) > 1e-6]
    if not off:
        return None
    return f"{label}: concepts are weighted by all their problems; {len(off)} runs have another value in results.json."


# ---- pictures ----------------------------------------------------------------------------------------------------


def picture(one: Group, cell: Mapping[str, Any], headline: str, kept: str, histories: Histories) -> CellPicture:
    """What the figure shows of a cell; a run without ``metrics.jsonl`` has no curve."""
    curves = []
    for run in one.runs.values():
        points = [
            (row.get("train/sampled_tokens"), row.get("reward/accuracy")) for row in histories.get(run.folder, [])
        ]
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


def _colours(
    curves: Sequence[Line], pictures: Sequence[CellPicture], baseline: str | None, notes: list[str]
) -> dict[str, str]:
    """The cells that ``curves.png`` draws and their colours; a note names those that would be too many."""
    having = [cell for cell in pictures if cell.label in {line.cell for line in curves}]
    drawn = [cell.label for cell in best_cells(having, baseline)]
    if len(drawn) < len(having):
        rest = ", ".join(cell.label for cell in having if cell.label not in drawn)
        notes.append(f"curves.png: the {len(drawn)} cells that can be told apart; only in curves.csv: {rest}.")
    return line_colours(drawn, curve_colours(pictures, baseline))


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


# ---- small things ------------------------------------------------------------------------------------------------


def _natural(label: str) -> list[Any]:
    """Sorts replaced:4 before replaced:16."""
    return [
        (0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", label))
    ]


def _plain(value: Any) -> Any:
    """As JSON can hold it: estimates as dicts, what is not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
