"""A comparison of cells as one table, from the same numbers that ``comparison.json`` holds: in Markdown and for rich.

Shares are in percent with their interval in brackets, differences in percentage points; a dash is a number that there
is not.
"""

from __future__ import annotations

import math
import re
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
_DISTRACTED = re.compile(r"(.+)_distractors(\d+)")
# What Markdown would take for markup; an underline between letters, and a < before a number, is none.
_MARKUP = re.compile(r"[\\*`~]|(?<![^\W_])_|_(?![^\W_])|<(?=[\w/!?])|\[(?=[^\]]*\]\()|&(?=#?\w+;)")

_WIDE = 4  # columns of accuracies with intervals that a terminal has room for
_OF_A_SET = re.compile(r"(accuracy|retained)( with \d+ irrelevant concepts?)? \(%\)$")  # the head of such a column


def distracted(name: str) -> tuple[str, int] | None:
    """``gap_distractors2`` as the set behind it and K, the irrelevant concepts in its prompts; None for other sets."""
    found = _DISTRACTED.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def measures(name: str, decoding: str) -> list[str]:
    """The labels that a table shows of a test set: with distractors only what they leave of what was solved."""
    of_it = ["accuracy"] if name.endswith(PRIMED) else ["accuracy", "robust_accuracy"]
    return [f"{name}/{decoding}/{measure}" for measure in (["retained"] if distracted(name) else of_it)]


def measure_name(label: str) -> str:
    """``gap/greedy/robust_accuracy`` as ``gap robust accuracy``; another way of decoding than greedy is named."""
    name, decoding, measure = label.split("/")
    middle = "" if decoding == "greedy" else f" {decoding}"
    if (found := distracted(name)) is not None:
        concepts = f"{found[1]} irrelevant concept{'' if found[1] == 1 else 's'}"
        return f"{found[0]}{middle} {measure} with {concepts}".replace("_", " ")
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
    headline, bases = comparison["headline"], baselines(comparison)
    compared = bool(bases) or comparison["baseline"] is not None
    columns = [
        label
        for name in comparison["sets"]
        for label in measures(name, comparison["decoding"])
        if any(label in cell["after"] for cell in comparison["cells"])
    ]
    if headline not in columns:
        columns.insert(0, headline)
    kept = any(cell["retention"] is not None for cell in comparison["cells"])
    starts = [{label: cell["before"].get(label) for label in columns} for cell in comparison["cells"]]
    one_start = all(_alike(start, starts[0]) for start in starts)
    heads = ["cell", "seeds", "RL steps", "tokens (k)"]
    heads += [] if one_start else [f"{measure_name(headline)} before (%)"]
    heads += [f"{measure_name(label)} (%)" for label in columns] + ([KEPT] if kept else [])
    heads += ["difference (points)", "p", "p (Holm)"] if compared else []
    rows = []
    if one_start:
        row = [BEFORE, "", "0", "0", *(shown(starts[0][label]) for label in columns)]
        rows.append(row + [""] * (len(heads) - len(row)))
    for cell in comparison["cells"]:
        before, tokens, paired = cell["before"].get(headline), cell["sampled_tokens"], cell["paired"]
        row = [cell["label"], cell["seeds_text"], f"{cell['rl_steps']:.1f}".removesuffix(".0")]
        row += [NONE if tokens is None else f"{tokens / 1000:,.1f}"]
        if not one_start:
            row.append(NONE if before is None else f"{100 * before.value:.1f}")
        row += [shown(cell["after"].get(label)) for label in columns]
        if kept:
            row.append(NONE if cell["retention"] is None else f"{100 * cell['retention']:.1f}")
        if compared and paired is None:
            row += ["(baseline)", "", ""]
        elif compared:
            row += [shown(paired["difference"], signed=True), probability(paired["p"]), probability(paired["p_holm"])]
        rows.append(row)
    return heads, rows


def baselines(comparison: Mapping[str, Any]) -> list[str]:
    """The cells that others are compared with, in their order."""
    named = {cell["baseline"] for cell in comparison["cells"] if cell["paired"] is not None}
    return [cell["label"] for cell in comparison["cells"] if cell["label"] in named]


def empty_rows(comparison: Mapping[str, Any], columns: int) -> list[list[str]]:
    """A row of dashes for each cell of which no run is finished; ``columns`` are those of ``table``."""
    return [[one["label"], one["seeds"], *[NONE] * (columns - 2)] for one in comparison["empty"]]


def _whole(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    heads, rows = table(comparison)
    return heads, rows + empty_rows(comparison, len(heads))


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
    if any("/retained" in label for cell in comparison["cells"] for label in cell["after"]):
        lines.append(
            "Retained with K irrelevant concepts: of the problems solved without them, the share that is still solved "
            "with them before the question (RUD_K)."
        )
    if comparison["baseline"] is not None or baselines(comparison):
        tests = sum(cell["paired"] is not None and cell["paired"]["p"] is not None for cell in comparison["cells"])
        to = comparison["baseline"]
        if to is None:
            pairs = [f"{c['label']} to {c['baseline']}" for c in comparison["cells"] if c["paired"] is not None]
            to = f"a baseline of the same kind ({'; '.join(pairs)})"
        text = f"Differences are in {label} to {to}, paired by seed and by concept"
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
    """The whole ``table.md``: title, table, legend, notes and the runs that are not in it; no text becomes markup."""
    heads, rows = _whole(comparison)
    lines = [f"# {escape(' '.join(comparison['title'].split()))}", ""]
    lines += [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1)), *(_line(row) for row in rows), ""]
    lines += [escape(line) for line in legend(comparison)]
    if "final" in comparison:
        heads, rows = final_table(comparison)
        lines += ["", "## Training metrics, first and last", ""]
        lines += [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1)), *(_line(row) for row in rows), ""]
        lines.append(final_legend(comparison))
    for name, items in (("Notes", comparison["notes"]), ("Not in the table", absent(comparison))):
        if items:
            lines += ["", f"## {name}", "", *(f"- {escape(item)}" for item in items)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Plain text as Markdown shows it."""
    return _MARKUP.sub(r"\\\g<0>", text)


def rich_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """The same for a terminal, in tables that are narrow enough for one: accuracies, everything else, metrics."""
    heads, rows = _whole(comparison)
    accuracies = [i for i, head in enumerate(heads) if _OF_A_SET.search(head)]
    found = []
    parts = [accuracies[i : i + _WIDE] for i in range(0, len(accuracies), _WIDE)]
    for title, columns in (
        *((f"{comparison['title']}: after training{' (more)' if i else ''}", own) for i, own in enumerate(parts)),
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
    """The runs that are in no cell, how they stand, why, and where they belong as far as that is known."""
    return [
        f"{run['folder']}{f' ({where})' if (where := place(run)) else ''}: "
        f"{', '.join(filter(None, (run['state'], run['why'])))}"
        for run in comparison["unfinished"]
    ]


def place(run: Mapping[str, Any]) -> str:
    """``cell core/kl, seed 3`` of an unfinished run, as far as it is known."""
    return ", ".join(f"{name} {run[name]}" for name in ("cell", "seed") if run.get(name) is not None)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape(cell).replace("|", "\\|") for cell in cells) + " |"
