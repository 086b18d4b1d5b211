"""Metric names: what is known passes, what is misspelt is named together with what was meant."""

import re
from pathlib import Path

import pytest

from core_torl.tracking.artifacts import ARTIFACTS, RESULT_FILES, RUN_FILES
from core_torl.tracking.metrics import (
    AXES,
    KEPT,
    METRICS,
    STEP,
    Metric,
    check_kept,
    check_names,
    find,
    glossary_markdown,
    kept_markdown,
)
from core_torl.tracking.rollouts import COLUMNS


def test_every_plain_name_is_known_to_itself():
    for name in METRICS:
        if "{" not in name:
            check_names({name: 0.0})


@pytest.mark.parametrize(
    "name", ["reward/outcome/wrong_format", "eval/core_quizzes/robust/robust_accuracy", "eval/math-500/pass_at_k/n"]
)
def test_a_family_takes_its_members(name):
    check_names({name: 1.0, STEP: 3})


@pytest.mark.parametrize(
    "name",
    [
        "reward/outcome",  # no segment for the field
        "reward/outcome/",  # an empty one
        "reward/outcome/a/b",  # a field is one segment, not two
        "eval/math/standard/f1",  # no such measure
        "reward/outcome/{outcome}",  # the pattern itself is no metric
        "eval/{set}/{protocol}/n",
        "Reward/mean",
    ],
)
def test_what_is_no_metric_is_refused(name):
    if "{" in name:
        assert METRICS[name].matches("reward/outcome/x") or METRICS[name].matches("eval/a/b/n")
    else:
        with pytest.raises(ValueError, match=re.escape(repr(name))):
            check_names({name: 1.0})


def test_the_error_is_one_line_and_names_the_nearest():
    with pytest.raises(ValueError) as caught:
        check_names({"reward/mean": 0.0, "reward/acuracy": 0.5})
    assert "\n" not in str(caught.value)
    assert "'reward/acuracy'" in str(caught.value) and "'reward/accuracy'" in str(caught.value)
    with pytest.raises(ValueError, match="'eval/math/standard/truncated'"):
        check_names({"eval/math/standard/trunkated": 0.5})


def test_find_gives_the_unit():
    metric = find("eval/math/standard/n")
    assert metric is not None and metric.unit == "count"
    assert find("time/step") is None


def test_dots_in_a_name_are_no_wildcards():
    assert not Metric("a.b/{c}", "count", "").matches("axb/c")


def test_glossary_has_one_row_a_metric_with_three_cells():
    header, rule, *rows = glossary_markdown().splitlines()
    assert header == "| metric | unit | meaning |" and rule.count("|") == 4
    assert len(rows) == len(METRICS)
    for row, metric in zip(rows, METRICS.values(), strict=True):
        cells = re.split(r"(?<!\\)\|", row)[1:-1]
        assert [c.strip() for c in cells[:2]] == [f"`{metric.name}`", metric.unit]
        assert len(cells) == 3 and cells[2].strip()


def test_the_docs_have_every_table_and_file_and_the_axes():
    """The table of metrics is held by tests/test_docs.py."""
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert kept_markdown().strip() in text
    assert all(f"`{axis}`" in text and axis in METRICS for axis in AXES)


def test_what_is_kept_is_what_the_code_makes():
    """Both ways: each kind of rollouts, artifact and result file has its row, and no row speaks of another."""

    def named(kind):
        return {k.name for k in KEPT.values() if k.kind == kind}

    assert named("table") == {f"rollouts/{kind}" for kind in COLUMNS} | {"per_concept"}
    assert named("artifact") == {f"{kind}-{{run}}" for kind in ARTIFACTS}
    assert named("file") == {*RESULT_FILES, *RUN_FILES}
    assert all(name in KEPT["results-{run}"].meaning for name in RESULT_FILES)
    with pytest.raises(ValueError, match="unknown table 'results'") as caught:  # a picture, not a table
        check_kept("results", "table")
    assert "\n" not in str(caught.value)
