"""Metric names: what is known passes, what is misspelt is named together with what was meant."""

import re

import pytest

from core_torl.tracking.metrics import METRICS, STEP, Metric, check_names, find, glossary_markdown


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
