"""The JSON-lines mirror: after a resume each step stands in the file once, and a torn line does no harm."""

import math

import pytest

from core_torl.tracking.mirror import JsonlMirror, read_jsonl


def row(step: int, value: float) -> dict[str, float]:
    return {"train/rl_step": step, "reward/mean": value}


def test_rows_come_back_in_order_and_exact(tmp_path):
    mirror = JsonlMirror(tmp_path / "new" / "metrics.jsonl")
    rows = [row(i, 0.1 * i) for i in range(4)]
    for one in rows:
        mirror.append(one)
    assert read_jsonl(mirror.path) == rows


def test_resume_drops_later_rows_and_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlMirror(path)
    for step in range(1, 8):
        first.append(row(step, 0.0))
    second = JsonlMirror(path, resume_from_step=4)
    second.append(row(5, 1.0))
    assert [(r["train/rl_step"], r["reward/mean"]) for r in read_jsonl(path)] == [
        (1, 0.0),
        (2, 0.0),
        (3, 0.0),
        (4, 0.0),
        (5, 1.0),
    ]
    assert second.rewind(2) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_a_resume_step_nothing_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlMirror(path).append(row(9, 0.0))
    JsonlMirror(path).append(row(1, 0.0))
    assert [r["train/rl_step"] for r in read_jsonl(path)] == [9, 1]


def test_a_torn_last_line_is_dropped_before_the_next_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlMirror(path).append(row(1, 0.5))
    with path.open("a") as file:
        file.write('{"train/rl_step": 2, "rew')
    assert len(read_jsonl(path)) == 1
    JsonlMirror(path).append(row(2, 0.75))
    assert read_jsonl(path) == [row(1, 0.5), row(2, 0.75)]


def test_a_loss_that_diverged_stays_visible(tmp_path):
    mirror = JsonlMirror(tmp_path / "m.jsonl")
    mirror.append(row(1, math.nan))
    mirror.append(row(2, -math.inf))
    values = [r["reward/mean"] for r in read_jsonl(mirror.path)]
    assert math.isnan(values[0]) and values[1] == -math.inf


def test_damage_in_the_middle_is_told_with_its_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl(path)
