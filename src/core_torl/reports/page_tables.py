"""The tables of a page: the texts of ``table.md``, and behind each number its metric and its full value.

A page shows rounded numbers for people; what a program needs to hold them against the aggregate travels with them. The
texts come from ``tracking.comparison_table``, so that the page cannot say anything else than the table does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core_torl.evaluation.comparison import share
from core_torl.reports import page_facts
from core_torl.reports.finished import Run
from core_torl.reports.story import Story
from core_torl.tracking import comparison_table as tables

ABOVE, BELOW = "above", "below"  # how a cell lies to the baseline where the difference is significant
Getter = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Number:
    """A cell of a table: its text, and what it says in full where it is a number."""

    text: str
    metric: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def exact(self) -> str | None:
        """The value with all its digits; None where there is none."""
        return _exact(self.value)

    @property
    def ends(self) -> tuple[str, str] | None:
        low, high = _exact(self.low), _exact(self.high)
        return None if low is None or high is None else (low, high)


@dataclass(frozen=True)
class Row:
    """A row: the label of its cell, the numbers after it, and on which side of the baseline it significantly lies."""

    label: str
    numbers: Sequence[Number]
    side: str | None = None
    fixed: bool = False  # the row before training keeps its place when the table is sorted
    baseline: bool = False


def main_table(comparison: Mapping[str, Any]) -> tuple[list[str], list[Row]]:
    """Heads and rows of ``table.md``, each number with its metric and its full value."""
    heads, texts = tables.table(comparison)
    columns = [_column(head, comparison) for head in heads]
    cells, bases = list(comparison["cells"]), {comparison["baseline"], *tables.baselines(comparison)}
    found = []
    if len(texts) > len(cells):  # all cells start from the same numbers, which are the first row
        start, texts = texts[0], texts[1:]
        numbers = []
        for text, (metric, _) in zip(start[1:], columns[1:], strict=True):
            label = metric.removeprefix("after/")
            estimate = cells[0]["before"].get(label) if label != metric else None
            numbers.append(_estimate(text, f"before/{label}", estimate) if estimate is not None else Number(text))
        found.append(Row(start[0], numbers, fixed=True))
    for cell, own in zip(cells, texts, strict=True):
        numbers = [_number(text, metric, of(cell)) for text, (metric, of) in zip(own[1:], columns[1:], strict=True)]
        side = significant_side(cell, comparison["confidence"])
        found.append(Row(cell["label"], numbers, side, baseline=cell["label"] in bases))
    found += [Row(row[0], [Number(text) for text in row[1:]]) for row in tables.empty_rows(comparison, len(heads))]
    return heads, found


def significant_side(cell: Mapping[str, Any], confidence: float) -> str | None:
    """Where the cell lies to the baseline if Holm's p is below one minus the confidence; None where it is not."""
    paired = cell["paired"]
    # 1 - 0.95 is a little more than 0.05.
    if paired is None or paired.get("p_holm") is None or not paired["p_holm"] < round(1 - confidence, 12):
        return None
    return ABOVE if paired["difference"].value > 0 else BELOW


def _column(head: str, comparison: Mapping[str, Any]) -> tuple[str, Getter]:
    """The metric of a column by its head, and how a cell of the comparison tells it."""
    headline = comparison["headline"]
    decoding = comparison["decoding"]
    names = [label for name in comparison["sets"] for label in tables.measures(name, decoding)]
    known: dict[str, tuple[str, Getter]] = {
        f"{tables.measure_name(label)} (%)": (f"after/{label}", lambda cell, label=label: cell["after"].get(label))
        for label in [headline, *names]
    }
    known |= {
        "cell": ("cell", lambda cell: None),
        "seeds": ("seeds", lambda cell: len(cell["seeds"])),
        "RL steps": ("rl_steps", lambda cell: cell["rl_steps"]),
        "tokens (k)": ("sampled_tokens", lambda cell: cell["sampled_tokens"]),
        f"{tables.measure_name(headline)} before (%)": (
            f"before/{headline}",
            lambda cell: cell["before"].get(headline),
        ),
        tables.KEPT: ("retention", lambda cell: cell["retention"]),
        "difference (points)": ("difference", lambda cell: (cell["paired"] or {}).get("difference")),
        "p": ("p", lambda cell: (cell["paired"] or {}).get("p")),
        "p (Holm)": ("p_holm", lambda cell: (cell["paired"] or {}).get("p_holm")),
    }  # fmt: skip
    return known[head]


def final_table(comparison: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of training metrics, first and last, with its legend; None where it was not asked for."""
    if "final" not in comparison:
        return None
    heads, texts = tables.final_table(comparison)
    metrics = comparison["final"]["metrics"]
    names = [(f"{end}/{name}", name, end) for name in metrics for end in ("first", "last")]
    rows = []
    for own in texts:
        of_cell = {name: next(one for one in cells if one["cell"] == own[0]) for name, cells in metrics.items()}
        numbers = [
            _number(text, metric, of_cell[name][end]) for text, (metric, name, end) in zip(own[1:], names, strict=True)
        ]
        rows.append(Row(own[0], numbers))
    return {"heads": heads, "rows": rows, "legend": tables.final_legend(comparison)}


def run_tables(story: Story) -> list[dict[str, Any]]:
    """For each cell its runs, a row each: seed, folder, state, steps, tokens and the measures of the main table."""
    comparison = story.comparison
    heads, _ = tables.table(comparison)
    metrics = [metric for head in heads if (metric := _column(head, comparison)[0]).startswith("after/")]
    aggregate = _by_folder(story)
    found = []
    for one in story.groups:
        rows = []
        for seed, run in sorted(one.runs.items()):
            known = aggregate.get(run.name, {})
            numbers = [
                Number(f"{run.steps:g}", "rl_steps", run.steps),
                Number(
                    tables.NONE if run.tokens is None else f"{run.tokens / 1000:,.1f}", "sampled_tokens", run.tokens
                ),
            ]
            for metric in metrics:
                value = _run_value(run, known, metric)
                numbers.append(Number(tables.NONE if value is None else f"{100 * value:.1f}", metric, value))
            rows.append({"name": known.get("run") or run.name, "seed": seed, "state": run.state, "numbers": numbers})
        at = metrics.index(f"after/{comparison['headline']}") + 2
        shown = [row["numbers"][at].value for row in rows]
        shown = [value for value in shown if value is not None]
        found.append({
            "label": one.label, "rows": rows,
            "heads": ["seed", "run", "state", "RL steps", "tokens (k)"]
            + [f"{tables.measure_name(m.removeprefix('after/'))} (%)" for m in metrics],
            "range": _range(shown),
        })  # fmt: skip
    return found


def _range(shares: Sequence[float]) -> str:
    """From the lowest to the highest in percent; one number where there is one."""
    ends = dict.fromkeys(f"{100 * end:.1f}" for end in (min(shares), max(shares))) if shares else {}
    return f"{' to '.join(ends)} %" if ends else tables.NONE


def compute_table(story: Story) -> dict[str, Any]:
    """What the runs cost, by cell and together; numbers that no run recorded are named instead of shown."""
    costs = page_facts.compute(story)
    kinds = {
        "wall_s": ("wall time", page_facts.duration), "train_s": ("training", page_facts.duration),
        "steps_s": ("RL steps", page_facts.duration), "sampled_tokens": ("sampled tokens", page_facts.count),
        "samples": ("samples", page_facts.count), "attempts": ("attempts", page_facts.count),
    }  # fmt: skip
    known = [key for key in kinds if any(getattr(one, key) is not None for one in costs)]
    hardware = any(one.hardware != page_facts.NOT_RECORDED for one in costs)
    rows = []
    for i, one in enumerate(costs, start=1):
        numbers = [Number(kinds[key][1](getattr(one, key)), key, getattr(one, key)) for key in known]
        numbers += [Number(one.hardware)] if hardware else []
        rows.append({"label": one.label, "runs": one.runs, "numbers": numbers, "total": i == len(costs)})
    return {
        "columns": [{"head": kinds[key][0], "numeric": True} for key in known]
        + ([{"head": "hardware of a run", "numeric": False}] if hardware else []),
        "rows": rows,
        "missing": [name for key, (name, _) in kinds.items() if key not in known] + ([] if hardware else ["hardware"]),
    }


def _run_value(run: Run, known: Mapping[str, Any], metric: str) -> float | None:
    """The run's value as the aggregate has it; from the run itself where the aggregate has no such column."""
    if metric in known:
        return known[metric]
    concepts = run.concepts(metric.removeprefix("after/"))
    return share(concepts) if concepts else None


def absent_rows(story: Story) -> list[dict[str, str]]:
    """The runs that are in no cell with their state and why, those that only the aggregate knows among them."""
    aggregate = _by_folder(story)
    found = {}
    for run in story.comparison["unfinished"]:
        state = aggregate.get(run["folder"], {}).get("state") or run.get("state") or "unfinished"
        found[run["folder"]] = {
            "folder": run["folder"],
            "state": str(state),
            "why": ", ".join(filter(None, (run["why"], tables.place(run)))),
        }
    inside = {run.name for run in page_facts.all_runs(story)}
    for folder, row in aggregate.items():
        if folder not in inside and folder not in found:
            why = row.get("why") or row.get("error") or "in no cell of this comparison"
            found[folder] = {"folder": folder, "state": str(row.get("state") or "unknown"), "why": str(why)}
    return list(found.values())


def _by_folder(story: Story) -> dict[str, dict[str, Any]]:
    """Name of a run, which is its folder or its address in W&B -> its row of the aggregate."""
    if "folder" not in story.runs.column_names:
        return {}
    return {str(row["folder"]): row for row in story.runs.to_pylist()}


def _number(text: str, metric: str, value: Any) -> Number:
    if value is None:
        return Number(text)
    if isinstance(value, int | float):
        return Number(text, metric, value)
    return _estimate(text, metric, value)


def _estimate(text: str, metric: str, estimate: Any) -> Number:
    return Number(text, metric, estimate.value, estimate.low, estimate.high)


def _exact(value: float | None) -> str | None:
    """A number so that reading it gives the same number; None where it is none or not finite."""
    return None if value is None or not math.isfinite(value) else repr(value)
