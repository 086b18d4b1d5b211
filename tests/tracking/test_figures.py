"""The figure: both files, something on them, and the numbers in the text."""

import math
from dataclasses import dataclass

import pytest

from core_torl.tracking.figures import learning_curves_and_bars, moving_mean, series, window_for


@dataclass(frozen=True)
class Measured:
    value: float
    low: float
    high: float
    n: int = 200


HISTORY = [
    {
        "train/rl_step": k,
        "reward/accuracy": 0.3 + 0.004 * k + 0.05 * math.sin(7 * k),
        "group/all_wrong": 0.4 - 0.003 * k,
    }
    for k in range(1, 101)
]
BEFORE = {
    "math/standard/accuracy": Measured(0.412, 0.35, 0.48),
    "quizzes/robust/robust_accuracy": Measured(0.2, 0.15, 0.26),
}
AFTER = {
    "math/standard/accuracy": Measured(0.533, 0.47, 0.6),
    "quizzes/robust/robust_accuracy": Measured(1.0, 0.97, 1.0),
}


def pixels(path):
    import numpy as np
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def test_both_panels_are_drawn(tmp_path):
    png = learning_curves_and_bars(HISTORY, BEFORE, AFTER, tmp_path / "deep" / "figure.png", "a title")
    image = pixels(png)
    half = image.shape[1] // 2
    for panel in (image[:, :half], image[:, half:]):
        assert panel.std() > 0.05
        assert (abs(panel - (0.0, 0x72 / 255, 0xB2 / 255)).max(axis=2) < 0.2).sum() > 500  # the blue of curve and bars
    assert png.with_suffix(".svg").read_text().startswith("<?xml")


def test_more_bars_change_the_picture(tmp_path):
    one = learning_curves_and_bars(HISTORY, BEFORE, AFTER, tmp_path / "a.png", "t")
    two = learning_curves_and_bars(HISTORY, BEFORE, BEFORE, tmp_path / "b.png", "t")
    assert pixels(one).shape == pixels(two).shape and (pixels(one) != pixels(two)).any()


def test_numbers_ticks_and_axes(tmp_path):
    from matplotlib.figure import Figure

    from core_torl.tracking.figures import draw_bars, draw_curves

    left, right = Figure().subplots(1, 2)
    draw_bars(right, list(BEFORE), BEFORE, {"math/standard/accuracy": AFTER["math/standard/accuracy"]})
    assert [t.get_text() for t in right.texts] == ["41.2", "20.0", "53.3"]
    assert [round(p.get_width(), 3) for p in right.patches] == [41.2, 20.0, 53.3]
    assert right.get_yticklabels()[0].get_text() == "math\nstandard/accuracy\nn = 200"
    assert "%" in right.get_xlabel()
    draw_curves(left, HISTORY)
    raw = left.lines[0].get_ydata()
    assert raw[0] == pytest.approx(100 * HISTORY[0]["reward/accuracy"])
    assert "%" in left.get_ylabel() and "RL step" in left.get_xlabel()


@pytest.mark.parametrize(
    ("history", "before", "after"), [(HISTORY, {}, {}), ([], BEFORE, AFTER), (HISTORY[:1], {}, AFTER)]
)
def test_one_side_may_be_empty(tmp_path, history, before, after):
    assert learning_curves_and_bars(history, before, after, tmp_path / "f.png", "t").stat().st_size > 5000


def test_nothing_to_draw_and_wrong_ending_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        learning_curves_and_bars([], {}, {}, tmp_path / "f.png", "t")
    with pytest.raises(ValueError, match=r"\.png"):
        learning_curves_and_bars(HISTORY, {}, {}, tmp_path / "f.pdf", "t")


def test_series_leaves_out_what_is_no_number():
    rows = [{"train/rl_step": 1, "a": math.nan}, {"train/rl_step": 2, "a": 3}, {"train/rl_step": 3}, {"a": 1.0}]
    assert series(rows, "a") == ([2.0], [3.0])


def test_the_moving_mean_is_centred_and_keeps_a_line():
    assert moving_mean([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]
    assert moving_mean([1.0, 5.0], 1) == [1.0, 5.0]
    assert all(window_for(n) % 2 == 1 for n in range(1, 300)) and window_for(10) == 1
