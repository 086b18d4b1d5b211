"""A comparison of cells as one table, from the same numbers that ``comparison.json`` holds: in Markdown and for rich.

Shares are in percent with their interval in brackets, differences in percentage points; a dash is a number that there
is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from core_torl.tracking.estimate import Interval, percent
from core_torl.tracking.metrics import SHARE, find

NONE = "–"
KEPT = "mastered kept (%)"
BEFORE = "before training"
PRIMED = "_primed"  # how the name of a test set ends that holds the concept in its prompts


def measure_name(label: str) -> str:
    """``gap/greedy/robust_accuracy`` as ``gap robust accuracy``; another way of decoding than greedy is named."""
    name, decoding, measure = label.split("/")
    middle = "" if decoding == "greedy" else f" {decoding}"
    return f"{name}{middle} {measure}".replace("_", " ")


def shown(estimate: Interval | None, signed: bool = False) -> str:
    """``percent``, without the brackets where no interval is known."""
    if estimate is None or math.isnan(estimate.low):
        return NONE if estimate is None else f"{100 * estimate.value:{'+.1f' if signed else '.1f'}}"
    return percent(estimate, signed)


def probability(p: float | None) -> str:
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and one row of texts for each cell; columns that no cell fills are left out.

    Where all cells start from the same numbers these are the first row, otherwise a column of the headline.
    """
    headline, compared = comparison["headline"], comparison["baseline"] is not None
    measures = [
        label
        for name in comparison["sets"]
        for measure in (["accuracy"] if name.endswith(PRIMED) else ["accuracy", "robust_accuracy"])
        if any((label := f"{name}/{comparison['decoding']}/{measure}") in cell["after"] for cell in comparison["cells"])
    ]
    if headline not in measures:
        measures.insert(0, headline)
    kept = any(cell["retention"] is not None for cell in comparison["cells"])
    starts = [{label: cell["before"].get(label) for label in measures} for cell in comparison["cells"]]
    one_start = all(_alike(start, starts[0]) for start in starts)
    heads = ["cell", "seeds", "RL steps", "tokens (k)"]
    heads += [] if one_start else [f"{measure_name(headline)} before (%)"]
    heads += [f"{measure_name(label)} (%)" for label in measures] + ([KEPT] if kept else [])
    heads += ["difference (points)", "p", "p (Holm)"] if compared else []
    rows = []
    if one_start:
        row = [BEFORE, "", "0", "0", *(shown(starts[0][label]) for label in measures)]
        rows.append(row + [""] * (len(heads) - len(row)))
    for cell in comparison["cells"]:
        before, tokens, paired = cell["before"].get(headline), cell["sampled_tokens"], cell["paired"]
        row = [cell["label"], str(len(cell["seeds"])), f"{cell['rl_steps']:g}"]
        row += [NONE if tokens is None else f"{tokens / 1000:,.1f}"]
        if not one_start:
            row.append(NONE if before is None else f"{100 * before.value:.1f}")
        row += [shown(cell["after"].get(label)) for label in measures]
        if kept:
            row.append(NONE if cell["retention"] is None else f"{100 * cell['retention']:.1f}")
        if compared and paired is None:
            row += ["(baseline)", "", ""]
        elif compared:
            row += [shown(paired["difference"], signed=True), probability(paired["p"]), probability(paired["p_holm"])]
        rows.append(row)
    return heads, rows


def _alike(one: Mapping[str, Interval | None], two: Mapping[str, Interval | None]) -> bool:
    """Whether two cells began with the same values; not if one of them is unknown."""
    return all(a is not None and (b := two[k]) is not None and a.value == b.value for k, a in one.items())


def legend(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader must know about the table, a sentence a line."""
    level, label = f"{100 * comparison['confidence']:g} %", measure_name(comparison["headline"])
    lines = [
        f"Accuracies after training are means over seeds, with the {level} interval over drawn seeds and concepts, "
        "stretched for so few seeds (see core_torl.evaluation.comparison); tokens are those sampled in training.",
    ]
    if any(cell["retention"] is not None for cell in comparison["cells"]):
        lines.append("Kept: accuracy on mastered concepts after training, divided by that before.")
    if comparison["baseline"] is not None:
        tests = sum(cell["paired"] is not None and cell["paired"]["p"] is not None for cell in comparison["cells"])
        text = f"Differences are in {label} to {comparison['baseline']}, paired by seed and by concept"
        if tests:
            text += (
                "; p is that of a paired t-test over seeds, concepts taken as given, so that it may disagree with the "
                f"interval; Holm's is adjusted for {tests} {'test' if tests == 1 else 'tests'}"
            )
        lines.append(f"{text}.")
    return lines


def final_table(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The metrics of ``final``: two columns each, at the beginning and at the end, and a row for each cell."""
    metrics = comparison["final"]["metrics"]
    heads, rows = ["cell"], [[cell["label"]] for cell in comparison["cells"]]
    for name, cells in metrics.items():
        known = find(name)
        unit = "" if known is None or known.unit in ("1", "count") else f" ({known.unit})"
        share = known is not None and known.unit == SHARE
        heads += [f"{name}{' (%)' if share else unit} {end}" for end in ("first", "last")]
        of_cell = {one["cell"]: one for one in cells}
        for row in rows:
            row += [shown(of_cell[row[0]][end]) if share else plain(of_cell[row[0]][end]) for end in ("first", "last")]
    return heads, rows


def final_legend(comparison: Mapping[str, Any]) -> str:
    """What a reader must know about ``final_table``."""
    return (
        f"First and last: means over the first and the last {comparison['final']['steps']} RL steps of each run, then "
        f"over seeds, with the {100 * comparison['confidence']:g} % t-interval over seeds where there are two or more."
    )


def plain(estimate: Interval | None) -> str:
    """Three digits of a number that is no share, with its interval where there is one."""
    if estimate is None:
        return NONE

    def digits(value: float) -> str:
        if 1000 <= abs(value) < 1e9:
            return f"{value:,.0f}"
        # Zeros at the end of 0.000100 would not say more.
        return f"{value:#.3g}".rstrip(".") if abs(value) >= 0.001 else f"{value:.3g}"

    ends = "" if math.isnan(estimate.low) else f" [{digits(estimate.low)}, {digits(estimate.high)}]"
    return f"{digits(estimate.value)}{ends}"


def markdown(comparison: Mapping[str, Any]) -> str:
    """The whole ``table.md``: title, table, legend, notes and the runs that are not in it."""
    heads, rows = table(comparison)
    lines = [f"# {comparison['title']}", ""]
    lines += [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1)), *(_line(row) for row in rows), ""]
    lines += legend(comparison)
    if "final" in comparison:
        heads, rows = final_table(comparison)
        lines += ["", "## Training metrics, first and last", ""]
        lines += [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1)), *(_line(row) for row in rows), ""]
        lines.append(final_legend(comparison))
    for name, items in (("Notes", comparison["notes"]), ("Not in the table", absent(comparison))):
        if items:
            lines += ["", f"## {name}", "", *(f"- {item}" for item in items)]
    return "\n".join(lines) + "\n"


def rich_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """The same for a terminal, in tables that are narrow enough for one: accuracies, everything else, metrics."""
    heads, rows = table(comparison)
    accuracies = [i for i, head in enumerate(heads) if head.endswith("accuracy (%)")]
    found = []
    for title, columns in (
        (f"{comparison['title']}: after training", accuracies),
        ("before training, cost and comparison", [i for i in range(1, len(heads)) if i not in accuracies]),
    ):
        result = Table(title=title, title_justify="left")
        result.add_column(heads[0], overflow="fold", min_width=min(40, max(len(row[0]) for row in rows)))
        for i in columns:
            # As wide as its numbers, so that heads are broken and numbers are not.
            width = max(len(text) for text in (*heads[i].split(), *(row[i] for row in rows)))
            result.add_column(heads[i], justify="right", width=width)
        for row in rows:
            result.add_row(*(Text(row[i]) for i in (0, *columns)))  # plain Text: brackets are no markup here
        found.append(result)
    if "final" in comparison:
        heads, rows = final_table(comparison)
        # A table for each metric: all of them side by side would not fit.
        for first in range(1, len(heads), 2):
            result = Table(title=heads[first].removesuffix(" first"), title_justify="left")
            result.add_column("cell", overflow="fold")
            for end in ("first", "last"):
                result.add_column(f"{end} {comparison['final']['steps']} steps", justify="right")
            for row in rows:
                result.add_row(*(Text(text) for text in (row[0], row[first], row[first + 1])))
            found.append(result)
    return found


def absent(comparison: Mapping[str, Any]) -> list[str]:
    """The runs that are in no cell, how they stand, and why."""
    return [
        f"{run['folder']}: {', '.join(filter(None, (run['state'], run['why'])))}" for run in comparison["unfinished"]
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
