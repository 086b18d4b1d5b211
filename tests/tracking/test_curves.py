"""Curves over RL steps: a panel for each metric, lines and bands as given, a file with the numbers that were drawn."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from core_torl.evaluation.statistics import Estimate
from core_torl.tracking import curves
from core_torl.tracking.comparison_figures import COLOURS
from core_torl.tracking.curves import Line, curves_figure, line_colours, write_numbers

from .test_comparison_figures import texts_overlap

METRICS = ["reward/accuracy", "core/primed_logprob_gap", "time/step_s", "policy/sampler_logprob_gap_max", "my/own"]


def mean(metric: str, cell: str, level: float, steps: int = 100) -> Line:
    rng = np.random.default_rng(int(1000 * level))
    values = [level * (1 - math.exp(-k / 30)) + 0.01 * rng.normal() for k in range(1, steps + 1)]
    points = [(k, Estimate(v, v - 0.03, v + 0.02, 5, "t")) for k, v in enumerate(values, start=1)]
    return Line(metric, cell, None, 5, points)


def seed(metric: str, cell: str, number: int, steps: tuple[int, ...]) -> Line:
    points = [(k, Estimate(k / 200 + 0.1 * number, math.nan, math.nan, 1, "one")) for k in steps]
    return Line(metric, cell, number, 1, points)


def look(cells: int) -> dict[str, str]:
    return line_colours([f"core/cell_{i}_with_a_longer_name" for i in range(cells)], {})


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved, to look at what is on them."""
    found: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (found.append(self), save(self, *a, **k))[1])
    return found


@pytest.mark.parametrize(("panels", "cells"), [(1, 1), (2, 5), (3, 7), (4, 5), (5, 2)])
def test_one_panel_for_each_metric_and_no_text_on_another(tmp_path: Path, drawn, panels: int, cells: int):
    colours = look(cells)
    metrics = METRICS[:panels]
    lines = [mean(m, cell, 0.2 + 0.1 * i) for m in metrics for i, cell in enumerate(colours)]
    png = curves_figure(metrics, lines, colours, tmp_path / "deep" / "curves.png", "a title", 5)
    image = np.asarray(imread(png))[..., :3]
    assert image.shape[1] > 1100 and image.std() > 0.02
    assert png.with_suffix(".svg").read_text().startswith("<?xml")
    figure = drawn[0]
    assert len(figure.axes) == panels
    for axes in figure.axes:
        assert [to_hex(line.get_color()).upper() for line in axes.lines] == list(colours.values())
        assert len(axes.collections) == cells, "a band for each mean"
    labelled = [axes for axes in figure.axes if axes.get_xlabel()]
    assert labelled == figure.axes[-min(2, panels) :]
    assert all(axes.get_xlabel() == "RL step (moving average of 5 steps in each run)" for axes in labelled)
    assert all(any(tick.get_visible() for tick in axes.get_xticklabels()) for axes in labelled)
    assert texts_overlap(figure) == []
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x1 <= figure.bbox.x1 and box.y0 >= figure.bbox.y0 - 1
    assert [t.get_text() for t in legend.get_texts()] == ["band: 95 % t-interval of the mean over seeds"]
    for axes in figure.axes:  # which line is whose stands at its end, in its colour
        names = {t.get_text(): to_hex(t.get_color()).upper() for t in axes.texts}
        assert names | colours == names


def test_words_units_and_values_are_those_of_the_glossary(tmp_path: Path, drawn):
    colours = {"a": "#000000", "b": "#0072B2"}
    lines = [mean("reward/accuracy", "a", 0.5), mean("reward/accuracy", "b", 0.5), mean("time/step_s", "a", 0.5)]
    lines += [mean("my/own", "a", 0.5), mean("my/own", "b", 0.5)]
    curves_figure(["reward/accuracy", "time/step_s", "my/own"], lines, colours, tmp_path / "c.png", "t", 1)
    share, seconds, own = drawn[0].axes
    assert share.get_title(loc="left") == "judged trajectories whose answer is right"
    assert [t.get_text() for t in share.texts] == ["reward/accuracy", "a", "b"] and share.get_ylabel() == "share (%)"
    assert list(share.lines[0].get_ydata()) == pytest.approx([100 * e.value for _, e in lines[0].points])
    assert seconds.get_ylabel() == "seconds" and [t.get_text() for t in seconds.texts] == [
        "time/step_s (1 of 2 cells)",
        "a",
    ]
    assert list(seconds.lines[0].get_ydata()) == pytest.approx([e.value for _, e in lines[2].points])
    assert own.get_title(loc="left") == "my/own" and own.get_ylabel() == ""
    assert [t.get_text() for t in own.texts] == ["a", "b"]
    assert seconds.get_xlabel() == "RL step", "no smoothing, no word of it"


def test_seeds_are_thin_lines_without_a_band_and_rare_values_have_markers(tmp_path: Path, drawn):
    lines = [seed("my/own", "a", 0, (10, 20, 30)), seed("my/own", "a", 1, (1, 2, 3, 5, 6)), mean("my/own", "b", 0.4)]
    lines += [seed("my/own", "a", 2, (7,))]
    curves_figure(["my/own"], lines, {"a": COLOURS[0], "b": COLOURS[1]}, tmp_path / "c.png", "t")
    (axes,) = drawn[0].axes
    assert [line.get_linewidth() for line in axes.lines] == [1.0, 1.0, 2.0, 1.0]
    assert [line.get_marker() for line in axes.lines] == ["o", "None", "None", "o"]
    assert list(axes.lines[0].get_xdata()) == [10, 20, 30] and len(axes.collections) == 1
    entries = [t.get_text() for t in drawn[0].legends[0].get_texts()]
    assert entries[-1] == "thin line: one seed (no mean of fewer than 3)" and len(entries) == 2


def test_the_file_holds_what_was_drawn(tmp_path: Path, drawn):
    lines = [mean("reward/accuracy", "a", 0.3), seed("reward/accuracy", "b", 7, (1, 2, 9))]
    write_numbers(lines, tmp_path / "curves.csv")
    curves_figure(["reward/accuracy"], lines, look(0) | {"a": "#000000", "b": "#0072B2"}, tmp_path / "c.png", "t")
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert tuple(rows[0]) == curves.COLUMNS and len(rows) == 103
    for line, cell in zip(drawn[0].axes[0].lines, ("a", "b"), strict=True):
        own = [row for row in rows if row["cell"] == cell]
        assert [int(row["step"]) for row in own] == list(line.get_xdata())
        assert [100 * float(row["mean"]) for row in own] == list(line.get_ydata()), "in full, not rounded"
    band = drawn[0].axes[0].collections[0].get_paths()[0].vertices
    assert {100 * float(row[end]) for row in rows[:100] for end in ("low", "high")} <= set(band[:, 1])
    assert (rows[0]["seed"], rows[0]["seeds"]) == ("", "5")
    assert [rows[-1][k] for k in ("seed", "low", "high", "seeds")] == ["7", "", "", "1"]


def test_colours_are_those_of_the_comparison_and_never_twice():
    known = {"a": "#000000", "b": COLOURS[0], "left out": COLOURS[1]}
    assert line_colours(["a", "new", "b"], known) == {"a": "#000000", "new": COLOURS[1], "b": COLOURS[0]}


def test_nothing_to_draw_and_wrong_ending_are_refused(tmp_path: Path):
    line = mean("my/own", "a", 0.3)
    with pytest.raises(ValueError, match="nothing to draw"):
        curves_figure(["my/own"], [], {"a": "#000000"}, tmp_path / "c.png", "t")
    with pytest.raises(ValueError, match="nothing to draw"):
        curves_figure(["my/own"], [line], {}, tmp_path / "c.png", "t")
    with pytest.raises(ValueError, match=r"\.png"):
        curves_figure(["my/own"], [line], {"a": "#000000"}, tmp_path / "c.pdf", "t")
