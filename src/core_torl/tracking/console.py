"""What a person reads in the terminal: the config as a tree, the results as a table.

The steps as they pass are in ``progress.py``: that one needs Lightning, whose import takes seconds, and a front door
prints the config before anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from core_torl.tracking.estimate import Estimate, Interval, percent, split_label


def make_console() -> Console:
    """A console for people; wide enough for the tables where the output is no terminal (a log, a pipe)."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def results_table(
    before: Mapping[str, Estimate], after: Mapping[str, Estimate], differences: Mapping[str, Interval]
) -> Table:
    """Before, after and gain of each ``set/protocol/measure``: percent with interval, the gain in percentage points."""
    table = Table(title="before and after training (%, 95% interval)", title_justify="left")
    for column in ("set", "measure"):
        table.add_column(column, no_wrap=True)
    for column in ("n", "before", "after", "gain (points)"):
        table.add_column(column, justify="right", no_wrap=True)
    for label in dict.fromkeys([*before, *after]):
        one, two = before.get(label), after.get(label)
        counts = sorted({e.n for e in (one, two) if e is not None})
        gain = differences.get(label)
        # Plain Text: the brackets of an interval are no markup.
        cells = [*split_label(label), " / ".join(map(str, counts)), percent(one), percent(two)]
        # Green or red only where the whole interval lies on one side of nothing.
        style = "" if gain is None or gain.low <= 0 <= gain.high else "green" if gain.low > 0 else "red"
        table.add_row(*(Text(cell) for cell in cells), Text(percent(gain, signed=True), style=style))
    return table


def estimates_table(estimates: Mapping[str, Estimate]) -> Table:
    """One evaluation as a table: set, measure, n and value with its interval, in percent."""
    table = Table(title="held-out accuracy (%, interval)")
    for column, justify in (("set", "left"), ("measure", "left"), ("n", "right"), ("value", "right")):
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for label, estimate in estimates.items():
        table.add_row(*(Text(cell) for cell in (*split_label(label), str(estimate.n), percent(estimate))))
    return table


def print_config_tree(config: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a nested config as a tree, one leaf a line, in the order of its keys."""
    tree = Tree("[bold]config")
    _grow(tree, config)
    (console or Console()).print(tree)


def _grow(tree: Tree, config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            _grow(tree.add(f"[bold cyan]{escape(str(key))}"), value)
        else:
            tree.add(f"{escape(str(key))}: [green]{escape(str(value))}")
