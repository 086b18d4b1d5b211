"""Metrics over RL steps, samples or tokens, a small panel for each: ``curves.png``, and its numbers in ``curves.csv``.

A line is a cell: the mean over its seeds with the t-interval of that mean as a band. An interval from one or two seeds
would be made of nearly nothing, so such a cell shows its seeds themselves, as thin lines. A cell has the colour that it
has in ``comparison.png``, and its name stands where its line ends. Shares are drawn in percent; the file holds them as
they were logged, from 0 to 1.
"""

from __future__ import annotations

import csv
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_torl.tracking.comparison_figures import COLOURS, DARK, cut, label_ends, save_figure
from core_torl.tracking.estimate import Estimate
from core_torl.tracking.metrics import SHARE, STEP, find

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("metric", "cell", "seed", "step", "mean", "low", "high", "seeds")  # of curves.csv
# What a curve can be drawn over -> the metric that holds it.
AXES = {"rl_step": STEP, "samples": "train/samples", "sampled_tokens": "train/sampled_tokens"}
AXIS_WORDS = {"rl_step": "RL step", "samples": "sampled answer", "sampled_tokens": "sampled token"}
BAND_FROM = 3  # seeds that a band needs
FEW_POINTS = 12  # of a line over another axis than RL steps, whose points are then marked
WIDTH = 10.0  # inches of the picture without the names at the ends of lines
LETTER = 0.085  # inches of a letter of such a name
_UNITS = {"s": "seconds", "count": "number", "1": ""}
_SMALL = 11.5  # points


@dataclass(frozen=True)
class Line:
    """One line of one panel: the mean over the ``seeds`` of a cell, or with ``seed`` that run alone.

    ``points`` are (place on the axis, value) in ascending order, the axis being RL steps, samples or sampled tokens;
    the values of a lone run have no interval, its ends are nan.
    """

    metric: str
    cell: str
    seed: int | None
    seeds: int
    points: Sequence[tuple[float, Estimate]]


def write_numbers(lines: Sequence[Line], path: str | os.PathLike[str], axis: str = "rl_step") -> Path:
    """All points as CSV, in the metric's own unit; ``seed`` is empty for a mean, ``low`` and ``high`` for a lone run.

    The column ``step`` is named after the axis where that is another. Numbers are written in full, so that the picture
    can be made from the file.
    """
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS if axis == "rl_step" else [axis if name == "step" else name for name in COLUMNS])
        for line in lines:
            for step, estimate in line.points:
                ends = [repr(end) if math.isfinite(end) else "" for end in (estimate.low, estimate.high)]
                seed = "" if line.seed is None else line.seed
                place = int(step) if step == int(step) else step
                rows.writerow([line.metric, line.cell, seed, place, repr(estimate.value), *ends, line.seeds])
    return Path(path)


def line_colours(cells: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """The colour of each cell to draw: that of ``known``; a cell without one gets a colour that no other cell has."""
    found = {cell: known[cell] for cell in cells if cell in known}
    free = [colour for colour in COLOURS if colour not in found.values()]
    missing = [cell for cell in cells if cell not in found]
    found |= {cell: (free or COLOURS)[i % len(free or COLOURS)] for i, cell in enumerate(missing)}
    return {cell: found[cell] for cell in cells}


def curves_figure(
    metrics: Sequence[str],
    lines: Sequence[Line],
    colours: Mapping[str, str],
    path: str | os.PathLike[str],
    title: str,
    window: int = 1,
    confidence: float = 0.95,
    axis: str = "rl_step",
) -> Path:
    """Draw the cells of ``colours``, a panel for each of ``metrics``, to a PNG at ``path`` and an SVG beside it.

    ``window`` is how many RL steps of a run a point was averaged over, ``axis`` one of ``AXES``. Raises ValueError if
    there is nothing to draw or ``path`` does not end in ``.png``.
    """
    lines = [line for line in lines if line.cell in colours and line.points]
    if not metrics or not lines:
        raise ValueError("nothing to draw: no lines")
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    entries = _legend(lines, confidence)
    width = WIDTH + columns * LETTER * max(len(cut(cell)) for cell in colours)
    legend_columns = max(1, int(10.5 * width) // (max(len(entry.get_label()) for entry in entries) + 7))
    legend_rows = math.ceil(len(entries) / legend_columns)
    tall = 4.2 if columns == 1 else 3.4
    height = 0.8 + tall * rows + 0.27 * legend_rows

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for place, axes in enumerate(panels.flat):
            if place >= len(metrics):
                axes.remove()
                continue
            own = [line for line in lines if line.metric == metrics[place]]
            draw_panel(axes, metrics[place], own, colours, 92 if columns == 1 else 42, tall, axis)
            # Below the last panel of each column, which is not in the last row where their number is odd.
            if place + columns >= len(metrics):
                words = "moving average of {} steps in each run" if axis == "rl_step" else "mean of {} RL steps"
                average = f" ({words.format(window)})" if window > 1 else ""
                axes.set_xlabel(f"{AXIS_WORDS[axis]}{'' if axis == 'rl_step' else 's'}{average}", loc="left")
                axes.tick_params(labelbottom=True)
        figure.legend(handles=entries, loc="outside lower left", ncols=legend_columns, fontsize=_SMALL)

    return save_figure(draw, path, title, (width, height))


def draw_panel(
    axes: Axes,
    metric: str,
    lines: Sequence[Line],
    colours: Mapping[str, str],
    wide: int,
    tall: float,
    axis: str = "rl_step",
) -> None:
    """One metric: what it says above the panel in at most two lines of ``wide`` letters, and its name below that.

    ``tall`` is the height of the panel in inches, with what stands around it.
    """
    from matplotlib.ticker import MaxNLocator

    known = find(metric)
    scale = 100.0 if known is not None and known.unit == SHARE else 1.0
    for line in lines:
        steps = [step for step, _ in line.points]
        colour, values = colours[line.cell], [scale * e.value for _, e in line.points]
        # Where values are rare it shows which points of the line are measured.
        rare = len(steps) <= FEW_POINTS if axis != "rl_step" else 2 * len(steps) <= steps[-1] - steps[0]
        rare = rare or len(steps) == 1
        thin = line.seed is not None
        axes.plot(
            steps, values, color=colour, linewidth=1.0 if thin else 2.0, alpha=0.85 if thin else 1.0,
            marker="o" if rare else None, markersize=2.5 if thin else 4, label=line.cell,
        )  # fmt: skip
        low, high = [scale * e.low for _, e in line.points], [scale * e.high for _, e in line.points]
        if not thin:
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    cells, all_cells = {line.cell for line in lines}, set(colours)
    some = f" ({len(cells)} of {len(all_cells)} cells)" if cells < all_cells else ""
    heading = metric if known is None else _heading(known.meaning, wide)
    if known is not None or some:
        axes.annotate(
            f"{metric}{some}" if known is not None else some.strip(), (0, 1), xytext=(0, 5), color=DARK,
            xycoords="axes fraction", textcoords="offset points", fontsize=_SMALL,
        )  # fmt: skip
    axes.set_title(heading, loc="left", fontsize=13, pad=24 if known is not None or some else 6)
    if known is not None:
        axes.set_ylabel("share (%)" if scale > 1 else _UNITS.get(known.unit, known.unit))
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    if axis != "rl_step":
        axes.xaxis.set_major_formatter("{x:,.0f}")
    label_ends(axes, [(x, scale * y, cut(cell), colours[cell]) for cell, (x, y) in _ends(lines).items()], tall)


def _ends(lines: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """Where the name of each cell points to: the end of its line, of lone runs that of the one in the middle."""
    ends: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        ends.setdefault(line.cell, []).append((line.points[-1][0], line.points[-1][1].value))
    return {cell: sorted(found, key=lambda end: end[1])[len(found) // 2] for cell, found in ends.items()}


def _heading(meaning: str, wide: int) -> str:
    """The glossary's words up to what it adds after a semicolon or a colon, in two lines at most."""
    short = meaning.split("; ")[0].split(": ")[0]
    return "\n".join(textwrap.wrap(short, wide, max_lines=2, placeholder=" …"))


def _legend(lines: Sequence[Line], confidence: float) -> list[Any]:
    """What bands and thin lines are; which cell a line belongs to stands at its end."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found: list[Any] = []
    if any(line.seed is None for line in lines):
        level = f"{100 * confidence:g} %"
        words = f"band: {level} t-interval of the mean over seeds"
        found.append(Patch(color=DARK, alpha=0.25, linewidth=0, label=words))
    if any(line.seed is not None for line in lines):
        words = f"thin line: one seed (no mean of fewer than {BAND_FROM})"
        found.append(Line2D([], [], color=DARK, linewidth=1.0, label=words))
    return found
