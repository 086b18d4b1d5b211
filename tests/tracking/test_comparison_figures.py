"""The pictures of a comparison: the files, something drawn in every panel, labels that do not lie on each other."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from core_torl.evaluation.statistics import Estimate
from core_torl.tracking import comparison_figures as figures
from core_torl.tracking.comparison_figures import CellPicture, comparison_figure, curve_cells, line_figure, spread


def estimate(value: float, half: float = 0.05) -> Estimate:
    return Estimate(value, value - half, value + half, 5, "x")


def cell(number: int, curves: bool = True, kept: bool = True) -> CellPicture:
    level = 0.2 + 0.04 * number
    runs = [[(1000.0 * k + 10 * s, level * k / 40 + 0.01 * s) for k in range(1, 41)] for s in range(3)]
    return CellPicture(
        label=f"core/cell_{number}", before=estimate(0.05), after=estimate(level),
        seeds=[level - 0.02, level, level + 0.02], kept_before=estimate(0.97) if kept else None,
        kept=estimate(0.95) if kept else None, kept_seeds=[0.94, 0.96] if kept else [], curves=runs if curves else [],
    )  # fmt: skip


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved, to look at what is on them."""
    found: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (found.append(self), save(self, *a, **k))[1])
    return found


def texts_overlap(figure: Figure) -> list[tuple[str, str]]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [t for a in figure.axes for t in (*a.texts, *a.get_yticklabels(), a.xaxis.label, a.yaxis.label, a.title)]
    boxes = [(t.get_text(), Text.get_window_extent(t, renderer)) for t in texts if t.get_text() and t.get_visible()]
    inside = figure.bbox
    assert all(b.x0 >= inside.x0 - 2 and b.x1 <= inside.x1 + 2 for _, b in boxes), "text leaves the picture"
    return [
        (a, b)
        for i, (a, one) in enumerate(boxes)
        for b, two in boxes[i + 1 :]
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 2
    ]


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_every_panel_is_drawn_and_no_text_lies_on_another(tmp_path: Path, drawn, count: int):
    png = comparison_figure(
        [cell(i) for i in range(count)], tmp_path / "deep" / "c.png", "a title", "gap robust accuracy", "core/cell_0"
    )
    assert png.stat().st_size > 10_000 and png.with_suffix(".svg").read_text().startswith("<?xml")
    figure = drawn[0]
    rows, kept, curves = figure.axes
    # A row: hollow, filled, and three seeds; the baseline's vertical line once.
    assert len(rows.containers) == count and len(kept.containers) == count
    assert sum(line.get_linestyle() == "--" for line in rows.lines) == 1
    assert len(kept.collections) >= count
    assert len(curves.lines) == min(count, figures.CURVES) == len(curves.texts)
    assert [t.get_text() for t in rows.get_yticklabels()] == [f"core/cell_{i}" for i in range(count)]
    assert all("%" in axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)
    assert "tokens (thousands)" in curves.get_xlabel()
    assert texts_overlap(figure) == []
    image = np.asarray(imread(png))[..., :3]
    for panel in np.array_split(image, 3, axis=1):
        assert panel.std() > 0.02


def test_labels_of_equal_curves_are_moved_apart(tmp_path: Path, drawn):
    cells = [CellPicture(f"cell {i}", None, estimate(0.3), [0.3], curves=cell(1).curves) for i in range(8)]
    comparison_figure(cells, tmp_path / "c.png", "t", "h", "cell 0")
    assert texts_overlap(drawn[0]) == []
    assert len(drawn[0].axes) == 2, "no panel for what no cell has"


def test_numbers_and_positions(tmp_path: Path, drawn):
    comparison_figure([cell(0), cell(5)], tmp_path / "c.png", "t", "h", "core/cell_5")
    rows, kept, curves = drawn[0].axes
    assert [t.get_text() for t in rows.texts if t.get_text() != "after"] == ["20.0", "40.0"]
    assert [t.get_text() for t in kept.texts if t.get_text() != "after"] == ["95.0", "95.0"]
    (dashed,) = [line for line in rows.lines if line.get_linestyle() == "--"]
    assert list(dashed.get_xdata()) == pytest.approx([40.0, 40.0])
    last = curves.lines[1].get_ydata()[-1]
    # The last value of a moving mean over 11 is that of the last 6 steps; the three seeds differ by 0.01.
    assert last == pytest.approx(100 * (0.4 * 37.5 / 40 + 0.01), rel=0.01)


def test_cells_may_lack_everything_but_the_value(tmp_path: Path, drawn):
    bare = CellPicture("bare", None, Estimate(0.4, math.nan, math.nan, 1, "no interval"), [0.4])
    comparison_figure([bare, cell(1, curves=False)], tmp_path / "c.png", "t", "h")
    assert len(drawn[0].axes) == 2
    one_step = CellPicture("short", None, estimate(0.4), [0.4], curves=[[(10.0, 0.5)]])
    comparison_figure([one_step], tmp_path / "d.png", "t", "h")


def test_at_most_eight_curves_the_baseline_among_them():
    cells = [cell(i) for i in range(12)]
    chosen = [c.label for c in curve_cells(cells, "core/cell_0")]
    assert chosen == ["core/cell_0", *(f"core/cell_{i}" for i in range(5, 12))]
    assert [c.label for c in curve_cells(cells, None)] == [f"core/cell_{i}" for i in range(5, 12)]
    assert curve_cells([cell(1, curves=False)], None) == []


def test_the_best_cells_are_those_of_the_cells_with_a_curve(tmp_path: Path, drawn):
    """The best headline may belong to a cell without a curve, as supervised training that samples no tokens."""
    sft = CellPicture("sft", None, estimate(0.9), [0.9], curves=[[(0.0, 0.1), (0.0, 0.2)]])
    comparison_figure([*(cell(i) for i in range(12)), sft], tmp_path / "c.png", "t", "h", "core/cell_0")
    assert drawn[0].axes[-1].get_title("left").endswith(":\nthe baseline and the 7 best of 11 others")
    comparison_figure([*(cell(i) for i in range(12)), sft], tmp_path / "c.png", "t", "h")
    assert drawn[2].axes[-1].get_title("left").endswith(":\nthe 7 best of 12 cells")
    comparison_figure([*(cell(i) for i in range(7)), sft], tmp_path / "c.png", "t", "h")
    assert drawn[4].axes[-1].get_title("left") == "right answers in training"


def test_seeds_without_a_common_stretch_are_drawn_by_themselves(tmp_path: Path, drawn):
    apart = [[(0.0, 0.0), (1000.0, 1.0)], [(5000.0, 0.5), (6000.0, 0.5)]]
    one = CellPicture("apart", None, estimate(0.5), [0.5], curves=apart)
    comparison_figure([one, cell(2)], tmp_path / "c.png", "t", "h")
    first, second, mean = drawn[0].axes[-1].lines
    assert [line.get_linewidth() for line in (first, second, mean)] == [1.0, 1.0, 2.0]
    assert list(second.get_xdata()) == [5.0, 6.0] and list(first.get_xdata()) == [0.0, 1.0]
    assert [t.get_text() for t in drawn[0].axes[-1].texts] == ["core/cell_2", "apart"]


def test_a_dollar_is_no_formula(tmp_path: Path, drawn):
    """Half a formula of matplotlib's would end the report."""
    one = CellPicture(r"a $\frac$ b", None, estimate(0.5), [0.5], curves=cell(1).curves)
    comparison_figure([one], tmp_path / "c.png", r"for $5 \oops$", r"h $\x$", one.label)
    line_figure({one.label: [(1.0, estimate(0.3))]}, tmp_path / "line.png", "$a_$", "config/x", "$h_$")
    assert texts_overlap(drawn[0]) == []


def test_what_is_retained_over_k(tmp_path: Path, drawn):
    lines = {"core/kl": [(k, estimate(0.6 - 0.1 * k)) for k in (3, 1, 2)], "base": [(1, estimate(0.2))]}
    colours = {"core/kl": figures.COLOURS[2], "base": figures.BASELINE}
    png = figures.retained_figure({"gap": lines, "mastered": lines}, tmp_path / "retained.png", "t", colours)
    assert png.exists() and png.with_suffix(".svg").exists()
    assert [a.get_title("left") for a in drawn[0].axes] == [
        f"{name}: problems that are solved with K = 0" for name in ("gap", "mastered")
    ]  # fmt: skip
    axes = drawn[0].axes[0]
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([50, 40, 30])
    assert [line.get_color() for line in axes.lines] == list(colours.values())
    assert all(float(tick).is_integer() for tick in axes.get_xticks()) and texts_overlap(drawn[0]) == []
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.retained_figure({"gap": {"a": []}}, tmp_path / "r.png", "t", {})


def test_curves_meet_on_what_all_seeds_reached():
    common = figures.together([[(0.0, 0.0), (10.0, 1.0)], [(2.0, 0.5), (20.0, 0.5)]])
    assert common is not None
    grid, values = common
    assert (grid[0], grid[-1]) == (2.0, 10.0) and values.shape == (2, 200)
    assert figures.together([[(0.0, 0.0), (1.0, 1.0)], [(5.0, 0.5), (6.0, 0.5)]]) is None


def test_spread_keeps_order_and_distance():
    assert spread([1.0, 5.0, 9.0], 2.0, 10.0) == [1.0, 5.0, 9.0]
    assert spread([5.0, 5.0, 5.0], 2.0, 10.0) == [5.0, 7.0, 9.0]
    assert spread([8.0, 9.0, 9.5], 2.0, 10.0) == [6.0, 8.0, 10.0]


def test_the_line_picture(tmp_path: Path, drawn):
    lines = {"core": [(0.4, estimate(0.6)), (0.1, estimate(0.3))], "grpo": [(0.1, estimate(0.2)), (0.4, estimate(0.2))]}
    png = line_figure(lines, tmp_path / "line.png", "t", "before/gap/sampled/accuracy", "gap robust accuracy")
    (axes,) = drawn[0].axes
    assert png.exists() and png.with_suffix(".svg").exists()
    assert [list(line.get_xdata()) for line in axes.lines] == [[10, 40], [10, 40]]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([30, 60])
    assert [t.get_text() for t in axes.texts] == ["grpo", "core"] and len(axes.collections) == 2
    assert axes.get_xlabel() == "before/gap/sampled/accuracy (%)" and axes.get_xscale() == "linear"
    line_figure({"": [(0.01, estimate(0.3)), (1.0, estimate(0.4))]}, tmp_path / "log.png", "t", "config/e", "h")
    assert drawn[-1].axes[0].get_xscale() == "log"


def test_nothing_to_draw_and_wrong_ending_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to draw"):
        comparison_figure([], tmp_path / "c.png", "t", "h")
    with pytest.raises(ValueError, match="nothing to draw"):
        line_figure({"a": []}, tmp_path / "c.png", "t", "x", "h")
    with pytest.raises(ValueError, match=r"\.png"):
        comparison_figure([cell(1)], tmp_path / "c.pdf", "t", "h")
