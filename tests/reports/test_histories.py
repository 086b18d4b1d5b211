"""Curves and last values from run folders: smoothing, means over seeds, gaps, mistakes in one line; numbers by hand."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from core_torl.config.errors import UserError
from core_torl.evaluation.statistics import t_mean
from core_torl.reports.finished import Group, Run
from core_torl.reports.histories import (
    cell_lines,
    check_metrics,
    first_and_last,
    metric_lines,
    places_of,
    present,
    seed_mean,
    smooth,
    values_of,
)
from core_torl.tracking.metrics import STEP

from .test_comparing import write

NAME = "time/step_s"
T_975 = {1: 12.706205, 2: 4.302653, 3: 3.182446}  # from a table


def cell(label: str, seeds: Mapping[int, Mapping[int, float]], name: str = NAME):
    """A cell and its histories, one run for each seed."""
    runs = {s: Run(Path(f"/{label}/{s}"), {"run": {"seed": s}}) for s in seeds}
    rows = {runs[s].folder: [{STEP: k, name: v} for k, v in values.items()] for s, values in seeds.items()}
    return Group(label, {}, {}, runs), rows


# ---- curves ------------------------------------------------------------------------------------------------------


def test_smoothing_is_a_mean_over_steps_around_cut_at_the_ends():
    values = {1: 1.0, 2: 2.0, 3: 6.0, 4: 4.0, 5: 10.0}
    assert smooth(values, 1, values) == values
    assert smooth(values, 3, values) == pytest.approx({1: 1.5, 2: 3, 3: 4, 4: 20 / 3, 5: 7})
    assert smooth(values, 99, values) == pytest.approx(dict.fromkeys(values, 23 / 5))


def test_smoothing_counts_steps_and_leaves_gaps_open():
    values = {1: 1.0, 2: 3.0, 10: 5.0}
    assert smooth(values, 3, [1, 2, 3, 4, 9, 10, 11]) == {1: 2.0, 2: 2.0, 3: 3.0, 9: 5.0, 10: 5.0}
    assert smooth(values, 1, range(12)) == values, "without smoothing nothing is filled"


def test_a_mean_over_seeds_with_the_t_interval():
    one, rows = cell("a", {0: {1: 1.0, 2: 4.0}, 1: {1: 2.0, 2: 4.0}, 2: {1: 6.0, 2: 4.0}})
    (line,) = cell_lines(one, NAME, rows, 1, 0.95)
    assert (line.cell, line.seed, line.seeds, [step for step, _ in line.points]) == ("a", None, 3, [1, 2])
    first, second = (e for _, e in line.points)
    half = T_975[2] * math.sqrt(7 / 3)  # variance (4 + 1 + 9) / 2 = 7
    assert (first.value, first.low, first.high) == pytest.approx((3, max(0, 3 - half), 3 + half))
    assert (second.value, second.low, second.high, second.n) == (4, 4, 4, 3)


def test_runs_are_smoothed_before_they_are_averaged():
    """Seed 1 lacks step 2: its smoothed value there is (1 + 5) / 2, which averaging first would not give."""
    one, rows = cell("a", {0: {1: 0.0, 2: 9.0, 3: 0.0}, 1: {1: 1.0, 3: 5.0}, 2: {1: 2.0, 2: 2.0, 3: 2.0}})
    (line,) = cell_lines(one, NAME, rows, 3, 0.95)
    assert [step for step, _ in line.points] == [1, 2, 3]
    assert line.points[1][1].value == pytest.approx((3 + 3 + 2) / 3)
    (line,) = cell_lines(one, NAME, rows, 1, 0.95)
    assert [step for step, _ in line.points] == [1, 3], "a mean is over all seeds or there is none"


def test_means_end_where_the_shortest_run_ends():
    one, rows = cell("a", {s: dict.fromkeys(range(1, 11 - s), float(s)) for s in range(3)})
    notes: list[str] = []
    (line,) = metric_lines([one], [NAME], rows, 5, 0.95, notes)
    assert [step for step, _ in line.points] == list(range(1, 9)), "smoothing draws no run on after its end"
    assert {e.value for _, e in line.points} == {1.0}
    assert notes == ["curves: the runs of a end between RL steps 8 and 10; means end with the first of them."]


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_are_lines_of_their_own(seeds: int):
    one, rows = cell("a", {s: {k: float(k + s) for k in range(1, 4)} for s in range(seeds)})
    lines = cell_lines(one, NAME, rows, 1, 0.95)
    assert [(line.seed, line.seeds) for line in lines] == [(s, 1) for s in range(seeds)]
    assert [(k, e.value) for k, e in lines[-1].points] == [(k, k + seeds - 1) for k in range(1, 4)]
    assert all(math.isnan(e.low) and math.isnan(e.high) for line in lines for _, e in line.points)


def test_seeds_without_a_common_step_are_lines_of_their_own():
    one, rows = cell("a", {0: {1: 1.0}, 1: {50: 1.0}, 2: {90: 1.0}})
    notes: list[str] = []
    assert [line.seed for line in metric_lines([one], [NAME], rows, 5, 0.95, notes)] == [0, 1, 2]
    assert f"curves: a has no RL step with {NAME} in all its runs: no mean of it." in notes


def test_shares_keep_their_interval_between_0_and_1():
    one, rows = cell("a", {0: {1: 0.0}, 1: {1: 0.0}, 2: {1: 1.0}}, "reward/accuracy")
    ((_, point),) = cell_lines(one, "reward/accuracy", rows, 1, 0.95)[0].points
    assert point.value == pytest.approx(1 / 3) and (point.low, point.high) == (0.0, 1.0)


def test_values_of_rows_that_lack_it_or_repeat_a_step():
    rows = [{STEP: 1, NAME: 1.0}, {STEP: 1, "x": 2}, {NAME: 9.0}, {STEP: 2, NAME: math.nan}, {STEP: 1, NAME: 3.0}]
    assert values_of(rows, NAME) == {1: 3.0}


def test_notes_name_cells_and_runs_that_lack_a_metric_and_values_that_are_no_numbers():
    (one, rows), (two, more) = cell("a", {0: {1: 1.0, 2: math.nan}, 1: {1: math.inf}}), cell("b", {0: {1: 1.0}}, "x")
    notes: list[str] = []
    lines = metric_lines([one, two], [NAME, "x"], rows | more, 1, 0.95, notes)
    assert [(line.metric, line.cell) for line in lines] == [(NAME, "a"), ("x", "b")]
    assert notes == [
        f"curves: no {NAME} in b.",
        f"curves: {NAME} is in 1 of the 2 runs of a only.",
        f"curves: 2 values of {NAME} in a are nan or infinite, and left out.",
        "curves: no x in a.",
    ]


def test_a_metric_that_no_run_has_is_refused_with_the_nearest():
    _, rows = cell("a", {0: {1: 1.0}, 1: {1: math.nan}})
    check_metrics("curves", [NAME], rows)
    with pytest.raises(UserError, match=r"^curves: .*'time/steps'; the nearest that there is: 'time/step_s'$"):
        check_metrics("curves", [NAME, "time/steps"], rows)
    with pytest.raises(UserError, match=r"final: .* no run has logged anything"):
        check_metrics("final", [NAME], {})


# ---- first and last ----------------------------------------------------------------------------------------------


def test_first_and_last_by_hand():
    one, rows = cell("a", {s: {k: float(k + 2 * s) for k in range(0, 21)} for s in range(2)})
    notes: list[str] = []
    found = first_and_last([one], [NAME], rows, 10, 0.95, notes)
    assert found["steps"] == 10 and notes == []
    (row,) = found["metrics"][NAME]
    assert row["runs"] == {0: {"first": 5.5, "last": 15.5}, 1: {"first": 7.5, "last": 17.5}}, "step 0 is before it"
    half = T_975[1] * 1.0  # standard deviation sqrt(2) over sqrt(2)
    first, last = row["first"], row["last"]
    assert (first.value, first.low, first.high, first.n) == pytest.approx((6.5, max(0, 6.5 - half), 6.5 + half, 2))
    assert (last.value, last.high - last.value) == pytest.approx((16.5, half))


def test_first_and_last_of_one_seed_gaps_and_short_runs():
    one, rows = cell("a", {0: {1: 1.0, 5: 3.0}})
    two, more = cell("b", {0: {12: 1.0}, 1: {1: 1.0, 12: 5.0}})
    notes: list[str] = []
    a, b = first_and_last([one, two], [NAME], rows | more, 5, 0.95, notes)["metrics"][NAME]
    assert (a["first"].value, a["last"].value) == (2.0, 2.0) and math.isnan(a["first"].low)
    assert (b["first"].n, b["last"].n, b["last"].value) == (1, 2, 3.0)
    assert notes == [
        f"final: {NAME} has no value in the first 5 steps of some runs of b.",
        "final: first and last 5 RL steps have steps in common in a.",
    ]
    (row,) = first_and_last([two], [NAME], {f: r[-1:] for f, r in more.items()}, 5, 0.95, [])["metrics"][NAME]
    assert row["first"] is None


# ---- the front door ----------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three seeds of base and two of core, 20 steps: reward/accuracy is k / 40 in all of them, core alone uses tools."""
    top = tmp_path / "sweep"
    for number, (label, seed) in enumerate([("base", 0), ("base", 1), ("base", 2), ("core", 0), ("core", 1)]):
        folder = write(top / str(number), label, seed, [(0.3, 0.2, 2), (0.3, 0.4, 2)])
        if label == "core":
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for row in rows:
                row["rollout/length_mean"] = 1000.0 + row[STEP] + 2 * seed
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return top


def test_the_report_draws_curves_and_writes_their_numbers(sweep: Path, report):
    metrics = ["reward/accuracy", "rollout/length_mean"]
    code, out, err, where = report(f"runs={sweep}", "baseline=base", f"curves=[{','.join(metrics)}]", "curves_window=3")
    assert (code, err) == (0, "")
    assert (where / "curves.png").stat().st_size > 10_000 and (where / "curves.svg").exists()
    rows = list(csv.DictReader((where / "curves.csv").open()))
    assert {(r["metric"], r["cell"], r["seed"]) for r in rows} == {
        ("reward/accuracy", "base", ""), ("reward/accuracy", "core", "0"), ("reward/accuracy", "core", "1"),
        ("rollout/length_mean", "core", "0"), ("rollout/length_mean", "core", "1"),
    }  # fmt: skip
    base = [r for r in rows if r["cell"] == "base"]
    assert [int(r["step"]) for r in base] == list(range(1, 21)) and {r["seeds"] for r in base} == {"3"}
    means = [1.5 / 40, *(k / 40 for k in range(2, 20)), 19.5 / 40]
    for key in ("mean", "low", "high"):
        assert [float(r[key]) for r in base] == pytest.approx(means)
    found = json.loads((where / "comparison.json").read_text())
    assert (
        found["curves"] == {"metrics": metrics, "axis": "rl_step", "window": 3, "drawn": ["base", "core"]}
        and "final" not in found
    )
    assert "curves: no rollout/length_mean in base." in found["notes"]
    assert "- curves: no rollout/length_mean in base." in (where / "table.md").read_text()
    assert "curves.png, curves.csv" in out.replace("\n", " ")


def test_the_report_shows_first_and_last_values(sweep: Path, report):
    code, out, _, where = report(
        f"runs={sweep}", "final=[reward/accuracy,rollout/length_mean]", "final_steps=5", "curves=[]"
    )
    assert code == 0 and not (where / "curves.csv").exists()
    text = (where / "table.md").read_text().split("## Training metrics, first and last\n")[1]
    assert (
        "| cell | reward/accuracy (%) first | reward/accuracy (%) last | rollout/length_mean (tokens) first |" in text
    )
    assert "| base | 7.5 [7.5, 7.5] | 45.0 [45.0, 45.0] | – | – |" in text
    # 1003 and 1005, 1018 and 1020: 12.7 around their means
    assert "| core | 7.5 [7.5, 7.5] | 45.0 [45.0, 45.0] | 1,004 [991, 1,017] | 1,019 [1,006, 1,032] |" in text
    assert (
        "the first and the last 5 RL steps of each run" in text and "- final: no rollout/length_mean in base." in text
    )
    final = json.loads((where / "comparison.json").read_text())["final"]
    core = final["metrics"]["rollout/length_mean"][1]
    assert core["cell"] == "core" and core["runs"]["1"] == {"first": 1005, "last": 1020}
    assert core["last"]["value"] == 1019 and core["last"]["method"] == "t over 2 values"
    assert final["metrics"]["rollout/length_mean"][0]["first"] is None
    assert "last 5 steps" in out


def test_more_cells_than_can_be_told_apart_are_in_the_file_only(tmp_path: Path, report):
    for i in range(9):
        write(tmp_path / "s" / str(i), f"cell{i}", 0, [(0.3, 0.1 * i, 2)])
    _, _, _, where = report(f"runs={tmp_path / 's'}", "baseline=cell0", "curves=[reward/accuracy]")
    found = json.loads((where / "comparison.json").read_text())
    assert found["curves"]["drawn"] == ["cell0", *(f"cell{i}" for i in range(2, 9))]
    assert "curves.png: the 8 cells that can be told apart; only in curves.csv: cell1." in found["notes"]
    assert ",cell1," in (where / "curves.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["curves=[reward/acuracy]"], "curves: no run has a number for the metric 'reward/acuracy'; the nearest that "
         "there is: 'reward/accuracy'"),
        (["final=[reward/acuracy]"], "final: no run has a number for the metric 'reward/acuracy'"),
        (["curves=reward/accuracy"], "curves"),
        (["curves=[reward/accuracy,reward/accuracy]"], "a metric stands there twice"),
        (["final=[reward/accuracy,reward/accuracy]"], "a metric stands there twice"),
        (["curves_window=4"], "curves_window=4: an odd number"),
        (["curves_window=0"], "curves_window=0: must be larger than 0"),
        (["final_steps=0"], "final_steps=0: must be larger than 0"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)  # fmt: skip
def test_mistakes_read_as_one_line(sweep: Path, report, arguments, says):
    code, out, err, where = report(f"runs={sweep}", *arguments)
    assert (code, out) == (2, "")
    assert says in err and err.startswith("core-torl: ") and err.count("\n") == 1
    assert not where.exists()


@pytest.mark.parametrize(
    ("name", "values", "low", "high"),
    [
        ("time/step_s", [0.1, 5.0, 0.1], 0.0, None),
        ("tool/code_ratio", [0.0, 1.0, 0.9], 0.0, 1.0),
        ("tool/calls_per_response", [0.1, 3.0, 0.1], 0.0, None),
        ("reward/mean", [-1.0, 1.0, -0.9], None, None),
        ("loss/policy", [-0.1, 0.1, 0.0], None, None),
    ],
)
def test_an_interval_ends_where_such_values_do(name, values, low, high):
    free, bound = t_mean(values), seed_mean(name, values, 0.95)
    assert free.low < 0 and free.high > max(values) and bound.value == free.value
    assert bound.low == (free.low if low is None else low) and bound.high == (free.high if high is None else high)


# ---- other axes --------------------------------------------------------------------------------------------------

TOKENS = "train/sampled_tokens"


def test_steps_without_tokens_of_their_own_lie_where_the_step_before_lies():
    rows = [{STEP: 0, "x": 1}, {STEP: 1, TOKENS: 10.0}, {STEP: 2, "x": 1}, {STEP: 3, TOKENS: 30.0}, {STEP: 3, "x": 2}]
    assert places_of(rows, "sampled_tokens") == {0: 0.0, 1: 10.0, 2: 10.0, 3: 30.0}
    assert places_of(rows, "samples") == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
    assert places_of(rows[1:], "samples") == {}, "where a run begins without them nothing is known"
    assert places_of(rows, "rl_step") == {0: 0, 1: 1, 2: 2, 3: 3}


def spent(tokens: Mapping[int, Mapping[int, float]]):
    """A cell of seeds that spend other numbers of tokens a step; the metric is a hundredth of the tokens."""
    one, _ = cell("a", tokens)
    rows = {
        one.runs[s].folder: [{STEP: k, TOKENS: t, NAME: t / 100} for k, t in values.items()]
        for s, values in tokens.items()
    }
    return one, rows


def test_a_mean_over_tokens_is_taken_where_all_seeds_are():
    """The metric depends on the tokens alone: over tokens all seeds agree, over steps they do not."""
    one, rows = spent({0: {1: 10, 2: 20, 3: 40}, 1: {1: 20, 2: 40, 3: 80}, 2: {1: 5, 2: 35, 3: 65}})
    (line,) = cell_lines(one, NAME, rows, 1, 0.95, "sampled_tokens")
    assert line.seeds == 3 and [x for x, _ in line.points] == [20, 30, 40], "from the last first to the first last"
    assert [e.value for _, e in line.points] == pytest.approx([0.2, 0.3, 0.4])
    assert all(e.high - e.low < 1e-9 for _, e in line.points)
    (by_step,) = cell_lines(one, NAME, rows, 1, 0.95)
    assert all(e.high - e.low > 0.1 for _, e in by_step.points)


def test_equal_steps_keep_their_own_places():
    one, rows = spent({s: {1: 8, 2: 16, 3: 64} for s in range(3)})
    (line,) = cell_lines(one, NAME, rows, 1, 0.95, "sampled_tokens")
    assert [x for x, _ in line.points] == [8, 16, 64]


def test_seeds_without_a_common_stretch_are_lines_of_their_own_over_tokens():
    one, rows = spent({0: {1: 1, 2: 2}, 1: {1: 5, 2: 6}, 2: {1: 8, 2: 9}})
    lines = cell_lines(one, NAME, rows, 1, 0.95, "sampled_tokens")
    assert [(line.seed, [x for x, _ in line.points]) for line in lines] == [(0, [1, 2]), (1, [5, 6]), (2, [8, 9])]
    notes: list[str] = []
    metric_lines([one], [NAME], rows, 1, 0.95, notes, "sampled_tokens")
    assert notes == [f"curves: a has no stretch of sampled_tokens with {NAME} in all its runs: no mean of it."]


def test_optional_metrics_are_left_out_where_no_run_has_them():
    _, rows = cell("a", {0: {1: 1.0}})
    assert present("curves", [NAME, f"{NAME}?", "core/trigger_rate?"], rows) == [NAME]
    with pytest.raises(UserError, match="no run has a number for the metric 'core/trigger_rate'"):
        present("curves", ["core/trigger_rate"], rows)


def test_many_cells_that_end_apart_are_one_note():
    found = [cell(f"c{i}", {s: dict.fromkeys(range(1, 5 + s), 1.0) for s in range(3)}) for i in range(4)]
    rows = {folder: own for _, part in found for folder, own in part.items()}
    notes: list[str] = []
    metric_lines([one for one, _ in found], [NAME], rows, 1, 0.95, notes)
    assert notes == [
        "curves: in 4 cells runs end at different RL steps, up to 2 apart; means end with the first of them."
    ]
