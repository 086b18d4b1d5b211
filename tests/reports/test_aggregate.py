"""The table of all runs: what a row holds, in which order rows stand, and what a repetition may change in it."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from core_torl.reports.aggregate import gathered, is_clock, same_results
from core_torl.reports.finished import Run
from core_torl.reports.histories import logged
from core_torl.reports.sources import find_runs
from core_torl.tracking.mirror import read_jsonl

from . import test_comparing as helpers

GAP = [(0.3, 0.2, 2), (0.3, 0.4, 2)]


def change(folder: Path, **sections: Any) -> None:
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | sections))


def log(folder: Path, change_row: Any) -> None:
    rows = [change_row(dict(row)) for row in read_jsonl(folder / "metrics.jsonl")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def collected(top: Path, output: Path) -> list[dict[str, Any]]:
    runs, unfinished = find_runs([top])
    every = [*runs, *unfinished]
    with gathered(every, [str(top)], [], []) as found:
        found.write(output)
    return parquet.read_table(output / "runs.parquet").to_pylist()


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Folders in another order than configs; one run failed, one has not begun."""
    top = tmp_path / "sweep"
    for name, label, seed, lr in [
        ("a", "core", 0, 1e-3),
        ("b", "base", 10, 1),
        ("c", "base", 2, 1),
        ("d", "core", 0, 1),
    ]:
        helpers.write(top / name, label, seed, GAP, steps=3, variant={"lr": lr, "betas": [0.9, 1]}, n=seed or "auto")
    (top / "e" / ".hydra").mkdir(parents=True)
    (top / "e" / ".hydra" / "config.yaml").write_text("rl_steps: 3\nseed: 4\n")
    record = {
        "app": "train",
        "state": "failed",
        "error": "no memory",
        "attempts": [{}, {}],
        "choices": {"variant": "x"},
    }
    (top / "e" / "run.json").write_text(json.dumps(record))
    rows = [{"train/rl_step": k, "train/samples": 8 * k, "reward/accuracy": 0.5} for k in (1, 2)]
    (top / "e" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = [{"folder": "f", "state": "pending", "overrides": ["seed=9"]}]
    (top / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    return top


def test_rows_are_in_the_order_of_configs_and_none_is_missing(sweep: Path, tmp_path: Path):
    rows = collected(sweep, tmp_path / "out")
    assert [row["run"] for row in rows] == ["e", "c", "b", "a", "d", "f"], "seed 2 before 10, lr 0.001 before 1"
    assert [(row["state"], row["seed"]) for row in rows] == [
        ("failed", 4), ("completed", 2), ("completed", 10), ("completed", 0), ("completed", 0), ("pending", 9)
    ]  # fmt: skip
    moved = tmp_path / "moved" / "sweep"
    shutil.copytree(sweep, moved)
    for old, new in zip("abcd", "zyxw", strict=True):
        (moved / old).rename(moved / new)
    again = collected(moved, tmp_path / "again")
    assert [row["run"] for row in again] == ["e", "x", "y", "z", "w", "f"]
    assert same_results(tmp_path / "out", tmp_path / "again") == []


def test_a_row_holds_config_numbers_and_provenance(sweep: Path, tmp_path: Path):
    provenance = {
        "commit": "abc", "dirty": False, "version": "0.1.0", "data": {"gap": {"problems": 4, "sha256": "00ff"}},
    }  # fmt: skip
    compute = {
        "wall_s": 12.5,
        "train_s": 10,
        "cpus": 2,
        "gpus": ["A", "A"],
        "sampled_tokens": 9,
        "samples": 3,
        "attempts": 2,
    }
    gains = {"gap/greedy/accuracy": {"value": 0.2, "low": math.nan, "high": 0.3, "n": 4, "method": "x"}}
    last = {"train/rl_step": 3, "reward/accuracy": 0.5}
    change(sweep / "a", provenance=provenance, compute=compute, gains=gains, objective=0.25, last=last)
    rows = {row["run"]: row for row in collected(sweep, tmp_path / "out")}
    row = rows["a"]
    assert row["folder"] == str(sweep / "a") and row["why"] == ""
    assert row["group/experiment"] == "core" and row["group/variant"] == "grpo"
    assert row["config/variant.lr"] == 1e-3 and rows["b"]["config/variant.lr"] == 1.0
    assert row["config/variant.betas"] == "[0.9, 1]", "a list is JSON text"
    assert (row["config/n"], rows["b"]["config/n"]) == ('"auto"', "10"), "and so is what rows disagree about"
    assert row["config/rl_steps"] == 3 and isinstance(row["config/rl_steps"], int)
    assert row["before/gap/greedy/robust_accuracy"] == 0.05 and row["after/gap/greedy/accuracy"] == 0.3
    assert (row["after/gap/greedy/accuracy_low"], row["after/gap/greedy/accuracy_high"]) == (0.0, 1.0)
    assert row["gain/gap/greedy/accuracy"] == 0.2 and math.isnan(row["gain/gap/greedy/accuracy_low"])
    assert row["last/reward/accuracy"] == 0.5 and row["objective"] == 0.25
    assert [row[f"compute/{k}"] for k in compute] == [12.5, 10.0, 2, '["A", "A"]', 9, 3, 2]
    assert (row["provenance/commit"], row["provenance/dirty"], row["provenance/version"]) == ("abc", False, "0.1.0")
    assert (row["data/gap/problems"], row["data/gap/sha256"]) == (4, "00ff")
    older = rows["b"]
    assert {older[k] for k in ("objective", "compute/wall_s", "provenance/commit", "data/gap/sha256")} == {None}


def test_an_unfinished_run_has_no_number_to_average(sweep: Path, tmp_path: Path):
    rows = {row["run"]: row for row in collected(sweep, tmp_path / "out")}
    failed, pending = rows["e"], rows["f"]
    assert failed["why"] == "no memory" and failed["group/variant"] == "x" and failed["compute/attempts"] == 2
    assert failed["last/train/rl_step"] == 2 and failed["last/train/samples"] == 16, "how far it came"
    for row in (failed, pending):
        numbers = [k for k in row if k.startswith(("before/", "after/", "gain/", "objective"))]
        assert numbers and all(row[k] is None for k in numbers)
    assert pending["why"] == "not begun: seed=9" and pending["config/rl_steps"] is None


def test_curves_are_long_and_carry_all_three_axes(sweep: Path, tmp_path: Path):
    collected(sweep, tmp_path / "out")
    rows = parquet.read_table(tmp_path / "out" / "curves.parquet").to_pylist()
    assert list(rows[0]) == ["run", "rl_step", "samples", "sampled_tokens", "metric", "value"]
    assert [(r["run"], r["rl_step"]) for r in rows[:3]] == [("e", 1), ("e", 2), ("c", 1)]
    assert rows[1] == {
        "run": "e", "rl_step": 2, "samples": 16, "sampled_tokens": None, "metric": "reward/accuracy", "value": 0.5
    }  # fmt: skip
    assert [r["sampled_tokens"] for r in rows if r["run"] == "c"] == [1000, 2000, 3000]
    assert {r["metric"] for r in rows} == {"reward/accuracy"}


# ---- what a repetition may change --------------------------------------------------------------------------------


def repeated(sweep: Path, tmp_path: Path) -> Path:
    """The sweep once more, elsewhere: other clocks, places, attempts and commit, the same results."""
    again = tmp_path / "again" / "sweep"
    shutil.copytree(sweep, again)
    for folder in ("a", "b", "c", "d"):
        results = json.loads((again / folder / "results.json").read_text())
        config = results["run"]["config"] | {"paths": {"output_dir": "elsewhere"}, "resume": "auto"}
        change(
            again / folder, run=results["run"] | {"config": config}, provenance={"commit": "new", "dirty": True},
            compute={"wall_s": 9.0, "train_s": 1.0, "cpus": 64, "gpus": ["B"], "attempts": 2},
            last=results["last"] | {"time/step_s": 7.0, "rollout/tokens_per_s": 1.0},
        )  # fmt: skip
        log(again / folder, lambda row: row | {"time/step_s": 5.0})
    return again


@pytest.fixture
def twice(sweep: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    for folder in ("a", "b", "c", "d"):
        results = json.loads((sweep / folder / "results.json").read_text())
        config = results["run"]["config"] | {"resume": None}
        change(
            sweep / folder, run=results["run"] | {"config": config},
            compute={"wall_s": 1.0, "sampled_tokens": 5},
            last=results["last"] | {"time/step_s": 1.0, "rollout/tokens_per_s": 2.0},
        )  # fmt: skip
        log(sweep / folder, lambda row: row | {"time/step_s": 1.0})
    again = repeated(sweep, tmp_path)
    for folder in ("a", "b", "c", "d"):
        results = json.loads((again / folder / "results.json").read_text())
        change(again / folder, compute=results["compute"] | {"sampled_tokens": 5})
    collected(sweep, tmp_path / "one")
    return again, tmp_path / "one", tmp_path / "two"


def test_clocks_and_places_may_differ(twice: tuple[Path, Path, Path]):
    again, one, two = twice
    collected(again, two)
    assert same_results(one, two) == []
    first, second = (parquet.read_table(folder / "runs.parquet") for folder in (one, two))
    differ = {k for k in first.column_names if first[k].to_pylist() != second[k].to_pylist()}
    assert differ >= {
        "folder", "config/resume", "config/paths.output_dir", "compute/wall_s", "compute/cpus", "compute/gpus",
        "compute/attempts", "provenance/commit", "provenance/dirty", "last/time/step_s", "last/rollout/tokens_per_s",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda top: change(top / "a", objective=0.5), "runs.parquet, row 3: objective is None and 0.5"),
        (lambda top: change(top / "a", compute={"sampled_tokens": 6}), "row 3: compute/sampled_tokens is 5 and 6"),
        (lambda top: change(top / "b", after={}), "row 2: after/gap/greedy/accuracy is 0.3 and None"),
        (
            lambda top: log(top / "c", lambda r: r | {"reward/accuracy": 0.9} if r["train/rl_step"] == 2 else r),
            "curves.parquet, row 1 of runs.parquet, RL step 2: reward/accuracy is (None, 2000, 0.3333333333333333) and",
        ),
        (lambda top: log(top / "c", lambda r: r | {"new": 1.0}), "RL step 1: new is None and (None, 1000, 1.0)"),
        (lambda top: shutil.rmtree(top / "d"), "runs.parquet: 6 rows and 5"),
        (lambda top: (top / "a" / "results.json").unlink(), "state is 'failed' and 'unfinished'"),
    ],
    ids=["objective", "tokens", "accuracy", "curve", "metric", "run", "state"],
)  # fmt: skip
def test_results_may_not_differ(twice: tuple[Path, Path, Path], spoil: Any, says: str):
    again, one, two = twice
    spoil(again)
    collected(again, two)
    assert any(says in line for line in same_results(one, two)), same_results(one, two)


@pytest.mark.parametrize(
    ("column", "clock"),
    [
        ("last/time/step_s", True), ("last/rollout/tokens_per_s", True), ("last/tool/latency_p50_s", True),
        ("last/reward/accuracy", False), ("last/train/sampled_tokens", False), ("after/x/greedy/accuracy", False),
        ("run", True), ("why", True), ("state", False), ("seed", False), ("config/paths.root", True),
        ("config/logger.name", True), ("config/variant.lr", False), ("compute/samples", False),
        ("compute/attempts", True), ("provenance/commit", True), ("data/gap/sha256", False),
    ],
)  # fmt: skip
def test_what_is_a_clock(column: str, clock: bool):
    assert is_clock(column) is clock


def test_integers_too_long_for_a_column_and_numbers_of_two_kinds():
    def run(name: str, **config: Any) -> Run:
        return Run(Path(f"/{name}"), {"run": {"seed": 0, "config": config, "choices": {}}}, history=list)

    both = [run("a", long=2**70, mixed=1, flag=True), run("b", long=1, mixed=0.5, flag=None)]
    with gathered(both, [], [], []) as found:
        rows = {row["folder"]: row for row in found.table.to_pylist()}
    assert rows["/a"]["config/long"] == str(2**70) and rows["/a"]["config/mixed"] == 1.0
    assert rows["/a"]["config/flag"] is True and rows["/b"]["config/flag"] is None


def test_each_run_is_read_once_and_only_what_is_shown_is_kept(tmp_path: Path):
    """What all runs logged may be gigabytes: never are the rows of two runs in memory at a time."""
    read: list[weakref.ref[Any]] = []

    class Rows(list[Any]):
        pass

    def history() -> list[dict[str, Any]]:
        assert not [ref for ref in read if ref() is not None], "the rows of the run before are still there"
        rows = Rows({"train/rl_step": k, "reward/accuracy": 0.5, "a": 1.0, "b": 2.0, "c": math.nan} for k in (1, 2))
        read.append(weakref.ref(rows))
        return rows

    runs = [
        Run(Path(f"/{seed}"), {"run": {"seed": seed, "config": {}, "choices": {}}}, history=history)
        for seed in range(3)
    ]
    with gathered(runs, [], ["a"], []) as found:
        found.write(tmp_path)
    assert len(read) == 3
    assert set(found.histories[Path("/1")][0]) == {"train/rl_step", "reward/accuracy", "a"}
    assert logged(found.histories) == {"reward/accuracy", "a", "b"}, "names are known of all metrics"
    rows = parquet.read_table(tmp_path / "curves.parquet").to_pylist()
    assert len(rows) == 3 * 2 * 4 and {row["metric"] for row in rows} == {"reward/accuracy", "a", "b", "c"}
