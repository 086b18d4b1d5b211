"""Pictures of a comparison: one row for each cell, and how the cells got there.

``comparison.png`` has up to three panels: the headline before (hollow) and after training (filled, with its interval,
single seeds small below it); what was kept of the mastered concepts; and the share of right answers in training against
the tokens sampled for it. A cell has one colour in all of them, Okabe and Ito's, and cells beyond the eight drawn as
curves are grey. ``line.png`` has the headline against a number of the runs, one line for each value of a name, and
``retained.png`` what is still solved with K irrelevant concepts in the prompt, one line a cell. Curves are labelled at
their ends, not in a legend, and labels are moved apart where ends lie close.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core_torl.tracking.estimate import Estimate
from core_torl.tracking.figures import STYLE, moving_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE, DARK, REST = "#000000", "#444444", "#8C8C8C"
# Blue, vermillion, green, purple, orange, sky blue, and their yellow darkened until it shows on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#A89A00")
CURVES = 8  # more curves than this in one panel cannot be told apart
WINDOW = 11  # RL steps in a moving mean, half of them before and half after
_LONGEST_LABEL = 44
_SMALL = 11.5  # points


@dataclass(frozen=True)
class CellPicture:
    """One cell: shares from 0 to 1; ``seeds`` and ``kept_seeds`` one value a run, ``curves`` (tokens, share) a run."""

    label: str
    before: Estimate | None
    after: Estimate
    seeds: Sequence[float]
    kept_before: Estimate | None = None
    kept: Estimate | None = None
    kept_seeds: Sequence[float] = ()
    curves: Sequence[Sequence[tuple[float, float]]] = field(default_factory=list)


def comparison_figure(
    cells: Sequence[CellPicture],
    path: str | os.PathLike[str],
    title: str,
    headline: str,
    baseline: str | None = None,
    confidence: float = 0.95,
) -> Path:
    """Draw all cells in their order to a PNG at ``path`` and an SVG beside it; returns the path of the PNG.

    ``headline`` names the measure in words. ``baseline`` is the label of a cell. Raises ValueError if there is no cell
    or ``path`` does not end in ``.png``.
    """
    if not cells:
        raise ValueError("nothing to draw: no cells")
    shown = curve_cells(cells, baseline)
    known = curve_colours(cells, baseline)
    colours = {c.label: known.get(c.label, BASELINE if c.label == baseline else REST) for c in cells}
    kept = any(c.kept is not None for c in cells)
    widths = [6.4, *([4.2] if kept else []), *([6.4] if shown else [])]
    height = max(5.4, 2.2 + 0.46 * len(cells))

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
        draw_rows(panels[0], [(c.label, c.before, c.after, c.seeds) for c in cells], colours, baseline)
        panels[0].set_title(words(headline), loc="left")
        panels[0].set_xlabel("share of test problems (%)")
        if kept:
            draw_kept(panels[1], cells, colours)
        if shown:
            draw_curves(panels[-1], shown, colours, height)
            having = [c for c in cells if has_curve(c)]
            others, all_others = (sum(c.label != baseline for c in some) for some in (shown, having))
            first, rest = ("the baseline and ", "others") if others < len(shown) else ("", "cells")
            note = f":\n{first}the {others} best of {all_others} {rest}" if len(having) > len(shown) else ""
            panels[-1].set_title(f"right answers in training{note}", loc="left")
        figure.legend(handles=_legend(confidence, baseline, kept), loc="outside lower left", ncols=5, fontsize=_SMALL)

    return save_figure(draw, path, title, (sum(widths) + 1.5, height))


def curve_cells(cells: Sequence[CellPicture], baseline: str | None) -> list[CellPicture]:
    """The cells whose curves are drawn, in their order: the baseline, and the highest headlines beside it."""
    return best_cells([c for c in cells if has_curve(c)], baseline)


def has_curve(cell: CellPicture) -> bool:
    """Whether there is something over sampled tokens: a cell that samples nothing has no curve."""
    return any(x > 0 for curve in cell.curves for x, _ in curve)


def best_cells(cells: Sequence[CellPicture], baseline: str | None) -> list[CellPicture]:
    """As many as can be told apart as curves, in their order: the baseline, and the highest headlines beside it."""
    best = sorted(cells, key=lambda c: (c.label != baseline, -c.after.value))
    # One colour is the baseline's alone.
    chosen = {c.label for c in best[: CURVES if best and best[0].label == baseline else CURVES - 1]}
    return [c for c in cells if c.label in chosen]


def curve_colours(cells: Sequence[CellPicture], baseline: str | None) -> dict[str, str]:
    """The colour of the baseline and of each cell whose curve is drawn, by label."""
    others = [c for c in curve_cells(cells, baseline) if c.label != baseline]
    found = {c.label: BASELINE for c in cells if c.label == baseline}
    return found | {c.label: COLOURS[i] for i, c in enumerate(others)}


def draw_rows(
    axes: Axes,
    rows: Sequence[tuple[str, Estimate | None, Estimate | None, Sequence[float]]],
    colours: Mapping[str, str],
    baseline: str | None,
) -> None:
    """One row a cell, in percent: hollow before, filled after with its whisker, small dots for the single seeds."""
    for place, (label, before, after, seeds) in enumerate(rows):
        colour = colours[label]
        if before is not None:
            axes.plot([100 * before.value], [place], "o", mfc="white", mec=colour, mew=1.6, ms=8.5, zorder=3)
        if after is None:
            continue
        _whisker(axes, place, after, colour)
        axes.plot([100 * s for s in seeds], [place + 0.3] * len(seeds), "o", color=colour, ms=3.6, alpha=0.6, mew=0)
        if label == baseline:
            axes.axvline(100 * after.value, color=BASELINE, linestyle="--", linewidth=1.1, zorder=1)
        _value(axes, place, after)
    axes.set_yticks(range(len(rows)), [cut(label) for label, *_ in rows], fontsize=_SMALL)
    _row_axes(axes, len(rows))


def draw_kept(axes: Axes, cells: Sequence[CellPicture], colours: Mapping[str, str]) -> None:
    """Accuracy on mastered concepts after training, and a dashed mark where it stood before."""
    for place, cell in enumerate(cells):
        if cell.kept is None:
            continue
        _whisker(axes, place, cell.kept, colours[cell.label])
        dots = [100 * s for s in cell.kept_seeds]
        axes.plot(dots, [place + 0.3] * len(dots), "o", color=colours[cell.label], ms=3.6, alpha=0.6, mew=0)
        if cell.kept_before is not None:
            axes.vlines(
                100 * cell.kept_before.value, place - 0.5, place + 0.5, colors=DARK, linestyles="--", linewidth=1.4
            )
        _value(axes, place, cell.kept)
    axes.set_yticks(range(len(cells)), [""] * len(cells))
    axes.set_title("mastered accuracy", loc="left")
    axes.set_xlabel("share of test problems (%)")
    _row_axes(axes, len(cells))


def draw_curves(axes: Axes, cells: Sequence[CellPicture], colours: Mapping[str, str], height: float) -> None:
    """Mean over seeds of the smoothed share of right answers against sampled tokens; the band is lowest to highest.

    Seeds that share no stretch of tokens are thin lines by themselves.
    """
    most = max(x for c in cells for curve in c.curves for x, _ in curve)
    scale, unit = (1e6, "millions") if most >= 2e6 else (1e3, "thousands")
    ends = []
    for cell in cells:
        colour, common = colours[cell.label], together(cell.curves)
        if common is None:
            alone = [smooth(curve) for curve in cell.curves]
            for x, y in alone:
                axes.plot(np.array(x) / scale, 100 * np.array(y), color=colour, linewidth=1.0, alpha=0.85)
            x, y = max(alone, key=lambda line: line[0][-1])
            ends.append((x[-1] / scale, 100 * y[-1], cut(cell.label), colour))
            continue
        grid, values = common
        mean = values.mean(axis=0)
        if len(values) > 1:
            axes.fill_between(
                grid / scale, 100 * values.min(axis=0), 100 * values.max(axis=0), color=colour, alpha=0.13, linewidth=0
            )
        marker = "o" if len(grid) == 1 else None
        axes.plot(grid / scale, 100 * mean, color=colour, linewidth=2.0, marker=marker)
        ends.append((float(grid[-1]) / scale, 100 * float(mean[-1]), cut(cell.label), colour))
    axes.set_xlabel(f"sampled tokens ({unit})")
    axes.set_ylabel(f"right answers (%), mean of {WINDOW} steps,\nband: lowest to highest seed")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    label_ends(axes, ends, height)


def together(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray] | None:
    """Smoothed curves on one grid of tokens that all of them reach: [points] and [curves, points].

    None where no stretch is common to all: a mean of different stretches would show a jump.
    """
    smoothed = [smooth(curve) for curve in curves]
    if len(smoothed) == 1:
        return np.array(smoothed[0][0]), np.array([smoothed[0][1]])
    first, last = max(x[0] for x, _ in smoothed), min(x[-1] for x, _ in smoothed)
    if first >= last:
        return None
    grid = np.linspace(first, last, 200)
    return grid, np.array([np.interp(grid, x, y) for x, y in smoothed])


def smooth(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """A run's curve in the order of its tokens, as a moving mean."""
    points = sorted(curve)
    return [x for x, _ in points], list(moving_mean([y for _, y in points], WINDOW))


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], height: float) -> None:
    """Write (x, y, label, colour) right of the panel, moved apart, with a dotted line to where each curve ends.

    ``height`` is that of the figure in inches, from which follows how far apart two lines of text must be.
    """
    low, high = axes.get_ylim()
    apart = (high - low) * _SMALL * 1.3 / (0.7 * height * 72)
    ends = sorted(ends, key=lambda end: end[1])
    leader = {"arrowstyle": "-", "linewidth": 0.8, "linestyle": ":", "shrinkA": 1, "shrinkB": 0}
    for (x, y, label, colour), place in zip(ends, spread([y for _, y, _, _ in ends], apart, high), strict=True):
        axes.annotate(
            label, (x, y), xytext=(1.04, place), textcoords=axes.get_yaxis_transform(), va="center", color=colour,
            fontsize=_SMALL, annotation_clip=False, arrowprops=leader | {"color": colour},
        )  # fmt: skip
    axes.set_ylim(low, high)


def spread(values: Sequence[float], apart: float, high: float) -> list[float]:
    """Ascending ``values`` moved to lie ``apart``; those that this pushed above ``high`` come down again, and push."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + apart) if places else value)
    over = high
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], over)
        over = places[i] - apart
    return places


def line_figure(
    lines: Mapping[str, Sequence[tuple[float, Estimate]]],
    path: str | os.PathLike[str],
    title: str,
    x_name: str,
    headline: str,
    confidence: float = 0.95,
) -> Path:
    """``headline`` in percent against x, one line a name with its interval as a band; a PNG at ``path`` and an SVG.

    An x from ``before/`` or ``after/`` is a share and is shown in percent. Raises ValueError if there is no point.
    """
    if not any(lines.values()):
        raise ValueError("nothing to draw: no points")
    percent = 100.0 if x_name.startswith(("before/", "after/")) else 1.0
    height = 6.0

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(lines)}
        ends = _draw_lines(axes, lines, colours, percent)
        every = [p for points in lines.values() for p, _ in points]
        if min(every) > 0 and max(every) / min(every) >= 50:
            axes.set_xscale("log")
        axes.set_xlabel(f"{x_name} (%)" if percent > 1 else x_name)
        axes.set_ylabel(f"{words(headline)} after training (%)\nband: {100 * confidence:g} % interval")
        label_ends(axes, ends, height)

    return save_figure(draw, path, title, (10.5, height))


def retained_figure(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Estimate]]]],
    path: str | os.PathLike[str],
    title: str,
    colours: Mapping[str, str],
    confidence: float = 0.95,
) -> Path:
    """CORE's Figure 3: a panel for each test set, in it (K, share still solved with K distractors) of each cell.

    Raises ValueError if there is no point.
    """
    if not any(points for lines in panels.values() for points in lines.values()):
        raise ValueError("nothing to draw: no points")
    height = 6.0

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        for axes, (name, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            ends = _draw_lines(axes, lines, colours)
            axes.set_title(words(f"{name}: problems that are solved with K = 0"), loc="left")
            axes.set_xlabel("K, irrelevant concepts before the question")
            axes.set_ylabel(f"still solved with them (%)\nband: {100 * confidence:g} % interval")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            label_ends(axes, ends, height)

    return save_figure(draw, path, title, (10.5 * len(panels), height))


def _draw_lines(
    axes: Axes, lines: Mapping[str, Sequence[tuple[float, Estimate]]], colours: Mapping[str, str], percent: float = 1.0
) -> list[tuple[float, float, str, str]]:
    """Each line with its interval as a band, in percent; returns where each ends, its label and its colour."""
    ends = []
    for number, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda p: p[0])
        x, y = [percent * p for p, _ in points], [100 * e.value for _, e in points]
        low, high = [100 * e.low for _, e in points], [100 * e.high for _, e in points]
        colour = colours[name]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        style = ("-", "--", ":")[number // len(COLOURS) % 3]
        axes.plot(x, y, style, marker="o", ms=5, color=colour, linewidth=2.0)
        if len(points) == 1 and math.isfinite(points[0][1].low):  # a band of one point has no area
            axes.vlines(x, low, high, colors=colour, linewidth=2.0, alpha=0.4)
        if name:
            ends.append((x[-1], y[-1], cut(name), colour))
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    return ends


def save_figure(draw: Any, path: str | os.PathLike[str], title: str, size: tuple[float, float]) -> Path:
    """What ``draw(figure)`` draws under ``title``, ``size`` in inches: a PNG at ``path`` and an SVG beside it."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, and always the Agg canvas for PNG
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    png = Path(path)
    if png.suffix != ".png":
        raise ValueError(f"the figure's path must end in .png: {png}")
    png.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.05))
        figure.suptitle(words(title), fontsize=16, x=0.01, ha="left")
        draw(figure)
        figure.savefig(png, dpi=110)
        figure.savefig(png.with_suffix(".svg"), metadata={"Date": None})
    return png


def _whisker(axes: Axes, place: float, estimate: Estimate, colour: str) -> None:
    value = 100 * estimate.value
    # An unknown interval has no whisker, and one that excludes its value by a rounding no negative length.
    ends = [[max(0.0, value - 100 * estimate.low)], [max(0.0, 100 * estimate.high - value)]]
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    axes.errorbar([value], [place], xerr=ends if known else None, fmt="o", color=colour, ms=8, capsize=3.5, zorder=4)


def _value(axes: Axes, place: float, estimate: Estimate) -> None:
    # Beside the panel, where it covers no mark.
    axes.annotate(
        f"{100 * estimate.value:.1f}", (1.01, place), xycoords=axes.get_yaxis_transform(), va="center",
        fontsize=_SMALL, annotation_clip=False,
    )  # fmt: skip


def _row_axes(axes: Axes, rows: int) -> None:
    # Downwards, and with room for four rows at least, so that a lone one stays slim.
    spare = max(0.0, 4 - rows) / 2
    axes.set_ylim(rows - 0.4 + spare, -0.6 - spare)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.06)
    low, high = axes.get_xlim()
    if low > 85:  # all of them nearly perfect: an axis around them would end beyond 100 %
        low, high = 85.0, 100.8
    axes.set_xlim(max(low, -4.0), min(high, 104.0))
    axes.annotate("after", (1.01, 1.0), xycoords="axes fraction", va="bottom", fontsize=_SMALL, annotation_clip=False)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(confidence: float, baseline: str | None, kept: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    def entry(label: str, **look: Any) -> Line2D:
        return Line2D([], [], label=label, **{"color": DARK, "linestyle": "none", **look})

    found = [
        entry("before training", marker="o", markerfacecolor="white", markeredgewidth=1.6, markersize=8.5),
        entry(f"after, {100 * confidence:g} % interval", marker="o", linestyle="-", markersize=8),
        entry("one seed", marker="o", markersize=3.6),
    ]
    if baseline is not None:
        found.append(entry(f"after, baseline ({cut(baseline)})", linestyle="--", color=BASELINE, linewidth=1.1))
    if kept:
        found.append(entry("mastered, before training", linestyle="--", linewidth=1.4))
    return found


def cut(label: str) -> str:
    """A label that has room beside a panel."""
    return words(label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…")


def words(text: str) -> str:
    """Somebody's text for matplotlib, which would read formulas between dollar signs."""
    return text.replace("$", r"\$")
