"""The picture that says whether training worked: the curves on the left, before and after on the right.

Left, the share of right answers and the share of groups in which every answer is wrong, step by step: the raw value
light, a moving mean dark. Right, each measure before and after training with its interval, the number written beside
it. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_torl.tracking.estimate import Estimate, split_label
from core_torl.tracking.metrics import STEP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, VERMILLION, GREY = "#0072B2", "#E69F00", "#D55E00", "#8C8C8C"  # grey is ours
CURVES = (("reward/accuracy", "right answers", BLUE), ("group/all_wrong", "groups all wrong", VERMILLION))
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 14,
    "legend.frameon": False,
    "svg.hashsalt": "core-torl",  # ids inside the SVG do not change from run to run
}


def series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric; rows that lack it or hold no finite number are left out."""
    pairs = [(row[STEP], row[name]) for row in history if STEP in row and isinstance(row.get(name), int | float)]
    pairs = [(float(x), float(y)) for x, y in pairs if math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over ``window`` values around each one (odd window); fewer at the ends, where the window is cut."""
    half = window // 2
    cuts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(cut) / len(cut) for cut in cuts]


def window_for(count: int) -> int:
    """An odd number of steps, about a twentieth of the curve: enough to calm it, too few to hide a turn."""
    return 2 * (count // 40) + 1


def learning_curves_and_bars(
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, Estimate],
    after: Mapping[str, Estimate],
    path: str | os.PathLike[str],
    title: str,
) -> Path:
    """Draw the two panels to a PNG at ``path`` and an SVG beside it; returns the path of the PNG.

    ``before`` and ``after`` map ``set/protocol/measure`` to a share from 0 to 1 with its interval. Raises ValueError if
    ``path`` does not end in ``.png`` or there is nothing to draw.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, and always the Agg canvas for PNG
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    png = Path(path)
    if png.suffix != ".png":
        raise ValueError(f"the figure's path must end in .png: {png}")
    labels = list(dict.fromkeys([*before, *after]))
    if not history and not labels:
        raise ValueError("nothing to draw: neither history nor estimates")
    png.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, max(5.2, 2.0 + 0.95 * len(labels))), layout=ConstrainedLayoutEngine(wspace=0.06))
        left, right = figure.subplots(1, 2, width_ratios=[1.0, 1.1])
        figure.suptitle(title, fontsize=16, x=0.01, ha="left")
        draw_curves(left, history)
        draw_bars(right, labels, before, after)
        figure.savefig(png, dpi=110)
        figure.savefig(png.with_suffix(".svg"), metadata={"Date": None})
    return png


def draw_curves(axes: Axes, history: Sequence[Mapping[str, Any]]) -> None:
    """Right answers and all-wrong groups in percent against the RL step."""
    windows = []
    for name, label, colour in CURVES:
        steps, values = series(history, name)
        if not steps:
            continue
        shares = [100 * v for v in values]
        windows.append(window_for(len(shares)))
        axes.plot(steps, shares, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, moving_mean(shares, windows[-1]), color=colour, linewidth=2.4, label=label)
    note = f" (dark: mean of {max(windows)} steps)" if windows and max(windows) > 1 else ""
    axes.set(xlabel=f"RL step{note}", ylabel="share of the step (%)", ylim=(0, 100))
    axes.margins(x=0.01)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    if windows:
        _legend_above(axes)


def draw_bars(axes: Axes, labels: Sequence[str], before: Mapping[str, Estimate], after: Mapping[str, Estimate]) -> None:
    """Two bars a label with their intervals in percent, the value written at the end of the whisker."""
    thick = 0.36
    for data, name, colour, shift in ((before, "before", GREY, -0.5), (after, "after", BLUE, 0.5)):
        rows = [(i + shift * thick, data[label]) for i, label in enumerate(labels) if label in data]
        if not rows:
            continue
        places = [y for y, _ in rows]
        values = [100 * e.value for _, e in rows]
        # An interval of another method than the value may exclude it by a rounding; a whisker has no negative length.
        below = [max(0.0, 100 * (e.value - e.low)) for _, e in rows]
        above = [max(0.0, 100 * (e.high - e.value)) for _, e in rows]
        axes.barh(places, values, height=thick * 0.94, color=colour, alpha=0.85, label=name)
        axes.errorbar(values, places, xerr=[below, above], fmt="none", ecolor="#222222", elinewidth=1.4, capsize=3.5)
        for (place, estimate), value in zip(rows, values, strict=True):
            axes.annotate(
                f"{value:.1f}",
                (100 * max(estimate.high, estimate.value), place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
            )
    axes.set_yticks(range(len(labels)), [_tick(label, before, after) for label in labels])
    # Downwards, and with room for three labels at least, so that a lone pair of bars stays slim.
    spare = max(0.0, 3 - len(labels)) / 2
    axes.set_ylim(len(labels) - 0.5 + spare, -0.5 - spare)
    axes.tick_params(axis="y", length=0)
    # Room right of 100 % for the number beside a full bar.
    axes.set(xlabel="share of problems (%), whisker: 95% interval", xlim=(0, 118), xticks=range(0, 101, 20))
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    if labels:
        _legend_above(axes)


def _tick(label: str, before: Mapping[str, Estimate], after: Mapping[str, Estimate]) -> str:
    name, measure = split_label(label)
    counts = sorted({data[label].n for data in (before, after) if label in data})
    return "\n".join(filter(None, [name, measure, "n = " + " / ".join(map(str, counts))]))


def _legend_above(axes: Axes) -> None:
    # Above the panel, where it can cover no data.
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2, handlelength=1.4)
