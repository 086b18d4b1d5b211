"""Where runs come from: offline W&B files as the tracker writes them, a W&B server (a stand-in), states of the others.

Nothing here speaks to a W&B server: ``FakeApi`` answers as ``wandb.Api`` of wandb 0.31 does where the report asks.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from core_torl.config.errors import UserError
from core_torl.launch.record import now
from core_torl.reports.finished import Run
from core_torl.reports.sources import find_runs
from core_torl.reports.wandb_source import each_step_once
from core_torl.tracking.metrics import STEP
from core_torl.tracking.mirror import read_jsonl

from .pages import Page
from .test_comparing import write
from .test_states import began

MEASURES = ("gap/greedy/robust_accuracy", "gap/greedy/accuracy")
GAP = [(0.3, 0.2, 2), (0.3, 0.4, 2)]


def states(runs: list[Run]) -> dict[str, tuple[str, str]]:
    return {run.folder.name: (run.state, run.why) for run in runs}


# ---- offline W&B files -------------------------------------------------------------------------------------------


def track(folder: Path, config: dict[str, Any], run_id: str | None = None, finished: bool = True, exit_code: int = 0):
    """The rows of the folder's ``metrics.jsonl`` and its result files as the tracker of a training leaves them."""
    wandb_run = pytest.importorskip("core_torl.tracking.wandb_run")
    tracker = wandb_run.Tracker(dir=str(folder), system_metrics=False, run_id=run_id)
    tracker.log_config(config)
    for row in read_jsonl(folder / "metrics.jsonl"):
        tracker.log_metrics(row)
    if finished:
        tracker.log_files(folder)
    tracker.finish(exit_code)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cells of two seeds whose runs were logged to W&B as well."""
    top = tmp_path_factory.mktemp("tracked") / "sweep"
    for number, (label, seed) in enumerate([("base", 0), ("base", 1), ("core", 0), ("core", 1)]):
        folder = write(top / str(number), label, seed, [(0.3, 0.1 * number, 2), (0.3, 0.2, 2)], steps=4)
        track(folder, json.loads((folder / "results.json").read_text())["run"]["config"])
    return top


def only_wandb(top: Path, copy: Path) -> Path:
    """The same sweep without anything but its ``wandb`` folders."""
    for folder in sorted(p for p in top.iterdir() if p.is_dir()):
        shutil.copytree(folder / "wandb", copy / folder.name / "wandb", symlinks=True)
    return copy


def test_wandb_files_alone_give_the_same_report(tracked: Path, tmp_path: Path, front_door, capsys):
    copy = only_wandb(tracked, tmp_path / "sweep")
    assert not list(copy.rglob(".hydra")) and not list(copy.glob("*/results.json"))
    written = {}
    for name, top in (("folders", tracked), ("wandb", copy)):
        arguments = (f"runs={top}", "baseline=base", f"output={tmp_path / name}", f"hydra.run.dir={tmp_path / 'h'}")
        assert front_door("report", *arguments) == 0, capsys.readouterr().err
        written[name] = {f: (tmp_path / name / f).read_text() for f in ("table.md", "table.tex", "curves.csv")}
    assert written["folders"] == written["wandb"]
    assert "| core | 2 | 4 |" in written["wandb"]["table.md"]


def test_a_run_counts_once_where_it_has_its_own_results(tracked: Path):
    runs, unfinished = find_runs([tracked])
    assert len(runs) == 4 and not unfinished
    assert all((run.folder / "results.json").is_file() for run in runs)


def test_wandb_files_stand_in_for_results_that_are_lost(tracked: Path, tmp_path: Path):
    """A run folder without its results: still one run, and finished as W&B's copy says."""
    shutil.copytree(tracked / "2", tmp_path / "s" / "2", symlinks=True)
    (tmp_path / "s" / "2" / "results.json").unlink()
    (run,), unfinished = find_runs([tmp_path / "s"])
    assert not unfinished and run.folder.parent == tmp_path / "s" / "2" / "wandb"
    assert run.concepts("gap/greedy/robust_accuracy")["gap0"] == (0.2, 2) and len(run.rows()) == 4


def test_a_folder_of_offline_runs_and_a_single_one(tracked: Path, tmp_path: Path):
    parts = sorted(tracked.glob("*/wandb/offline-run-*"))
    for part in parts:
        shutil.copytree(part, tmp_path / "all" / part.name)
        shutil.copytree(part, tmp_path / "shared" / "wandb" / part.name)
    write(tmp_path / "all" / "run-2", "own", 0, GAP)  # a name like W&B's, and no folder of W&B
    runs, _ = find_runs([tmp_path / "all"])
    assert sorted((run.choices["experiment"], run.seed) for run in runs) == [
        ("base", 0), ("base", 1), ("core", 0), ("core", 1), ("own", 0)
    ]  # fmt: skip
    assert len(find_runs([tmp_path / "shared"])[0]) == 4, "runs that share a folder for their W&B files"
    (run,), unfinished = find_runs([tmp_path / "all" / parts[0].name, tmp_path / "all" / parts[0].name])
    assert run.rows()[-1]["train/rl_step"] == 4 and not unfinished


def test_a_run_that_ended_without_results_is_unfinished(tmp_path: Path):
    config = {"seed": 3, "rl_steps": 4, "choices": {"variant": "grpo"}}
    for name, code in (("failed", 1), ("ended", 0)):
        folder = write(tmp_path / name, "base", 3, GAP, steps=4)
        track(folder, config, finished=False, exit_code=code)
    evaluated = write(tmp_path / "evaluated", "base", 3, GAP, steps=4)
    track(evaluated, {"checkpoint": None}, finished=False)
    copy = only_wandb(tmp_path, tmp_path / "copy")
    runs, unfinished = find_runs([copy])
    found = {run.folder.parent.parent.name: (run.state, run.why) for run in unfinished}
    assert not runs
    assert found == {"failed": ("failed", "exit code 1"), "ended": ("unfinished", "no results.json")}
    assert {run.seed for run in unfinished} == {3} and len(unfinished[0].rows()) == 4
    assert {run.choices["variant"] for run in unfinished} == {"grpo"}


def test_the_parts_of_a_resumed_run_are_one_run(tmp_path: Path):
    """The second part does steps 3 and 4 again: its numbers count, and each step once."""
    folder = write(tmp_path / "run", "base", 0, GAP, steps=4)
    track(folder, {"rl_steps": 4}, run_id="same", finished=False)
    rows = [row | {"reward/accuracy": 0.75} for row in read_jsonl(folder / "metrics.jsonl")[2:]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first,) = (folder / "wandb").glob("offline-run-*")
    first.rename(first.with_name("offline-run-20200101_000000-same"))
    track(folder, {"rl_steps": 4}, run_id="same")
    (run,), unfinished = find_runs([only_wandb(tmp_path, tmp_path / "copy")])
    last = {row["train/rl_step"]: row["reward/accuracy"] for row in run.rows()}
    assert last == {1: 0.125, 2: 0.25, 3: 0.75, 4: 0.75} and not unfinished
    assert [row["train/rl_step"] for row in run.rows()] == [1, 2, 3, 4]


def test_results_of_an_earlier_part_are_not_those_of_the_run(tmp_path: Path):
    """It had ended, went on, and was killed; a part that logged nothing takes nothing away."""
    folder = write(tmp_path / "run", "base", 0, GAP, steps=4)
    track(folder, {"rl_steps": 4, "seed": 0}, run_id="same")
    (first,) = (folder / "wandb").glob("offline-run-*")
    first.rename(first.with_name("offline-run-20200101_000000-same"))
    track(folder, {"rl_steps": 4, "seed": 0}, run_id="same", finished=False)
    copy = only_wandb(tmp_path, tmp_path / "copy")
    runs, (left,) = find_runs([copy])
    assert not runs and (left.state, left.why, left.seed) == ("unfinished", "no results.json", 0)
    last = max(copy.rglob("run-same.wandb"))
    assert "20200101" not in str(last)
    last.write_bytes(last.read_bytes()[:7])
    (run,), unfinished = find_runs([copy])
    assert not unfinished and run.concepts("gap/greedy/accuracy")


def test_steps_of_a_run_that_went_back_count_once():
    rows = [{STEP: k, "a": k} for k in (0, 1, 2, 3)] + [{STEP: 0, "b": 5}, {STEP: 3, "c": 6}, {STEP: 2, "a": 9}]
    found = each_step_once(rows)
    assert found == [{STEP: 0, "a": 0, "b": 5}, {STEP: 1, "a": 1}, {STEP: 2, "a": 9}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "killed before its config was logged"),
        (b":W&B\x00\x01\x00", "killed before its config was logged"),
        (b":W", "killed before its config was logged"),
        (b"something else", "run-x.wandb is no .wandb file"),
    ],
)
def test_a_wandb_run_that_died_early_is_not_hidden(tmp_path: Path, content: bytes, why: str):
    part = tmp_path / "wandb" / "offline-run-20260101_000000-x"
    part.mkdir(parents=True)
    (part / "run-x.wandb").write_bytes(content)
    runs, (left,) = find_runs([tmp_path])
    assert not runs and (left.state, left.why) == ("unfinished", why)


def test_wandb_results_of_an_earlier_attempt_are_not_those_of_the_run(tracked: Path, tmp_path: Path, dead):
    """The run was begun again in its folder, which takes its results away, and was killed while it loaded."""
    folder = tmp_path / "s" / "2"
    shutil.copytree(tracked / "2", folder, symlinks=True)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").unlink()
    saved = next(folder.rglob("files/results.json"))
    text = json.dumps(results | {"provenance": {"identity": "one"}, "compute": {"attempts": 1}})
    saved.unlink()
    saved.write_text(text)

    def found(identity: str, attempts: int) -> str:
        one = {"host": socket.gethostname(), "started": now(), **dead}
        record = {"app": "train", "state": "running", "identity": identity, "attempts": [one] * attempts}
        (folder / "run.json").write_text(json.dumps(record))
        runs, unfinished = find_runs([tmp_path / "s"])
        return [*runs, *unfinished][0].state

    (folder / ".hydra" / "config.yaml").write_text("rl_steps: 4\nseed: 0\n")
    assert [found("one", 1), found("one", 2), found("two", 1)] == ["completed", "killed", "killed"]


# ---- one run in several places -----------------------------------------------------------------------------------


def test_a_run_in_several_places_counts_once(server: FakeApi, tmp_path: Path):
    """Run 0 lies on the disk and on the server, unfinished run 4 as well; the folder counts."""
    (tmp_path / "local" / "0" / "run.json").write_text(json.dumps({"app": "train", "wandb_id": "id0"}))
    began(tmp_path / "local" / "4", "interrupted")
    record = json.loads((tmp_path / "local" / "4" / "run.json").read_text())
    (tmp_path / "local" / "4" / "run.json").write_text(json.dumps(record | {"wandb_id": "id4"}))
    for number in "123":
        shutil.rmtree(tmp_path / "local" / number)
    notes: list[str] = []
    runs, unfinished = find_runs(["wandb://me/project", tmp_path / "local"], notes)
    assert sorted(run.name for run in runs) == [
        str(tmp_path / "local" / "0"), *(f"wandb://me/project/id{n}" for n in (1, 2, 3))
    ]  # fmt: skip
    assert sum(run.state == "interrupted" for run in unfinished) == 1 and len(unfinished) == 3
    (note,) = notes
    assert note.startswith("2 runs were found in two places") and "wandb://me/project/id0" in note


def test_a_tracked_folder_and_its_wandb_files_are_one_run(tracked: Path, tmp_path: Path):
    copy = only_wandb(tracked, tmp_path / "copy")
    runs, unfinished = find_runs([copy, tracked])
    assert len(runs) == 4 and not unfinished
    assert all((run.folder / "results.json").is_file() for run in runs), "the run's own folder counts"


# ---- a W&B server (a stand-in) -----------------------------------------------------------------------------------


class FakeFile:
    def __init__(self, name: str, content: Any):
        self.name, self.content = name, content
        self.size = 0 if content is None else len(json.dumps(content))

    def download(self, root: str, replace: bool):
        path = Path(root) / self.name
        path.write_text(json.dumps(self.content))
        return path.open()


class FakeRun:
    def __init__(self, number: int, state: str, config: dict[str, Any], rows: list[dict[str, Any]], **files: Any):
        self.path, self.state, self.config, self.rows = ["me", "project", f"id{number}"], state, config, rows
        self.files = files

    def file(self, name: str) -> FakeFile:
        return FakeFile(name, self.files.get(name.removesuffix(".json")))

    def scan_history(self):
        noise = {"_step": 1, "_runtime": 2.0, "samples": {"_type": "table-file"}}
        return iter([*({**row, **noise} for row in self.rows), {"train/rl_step": 4, **noise}])


class FakeApi:
    def __init__(self, runs: list[FakeRun]):
        self.found, self.asked = runs, []

    def runs(self, path: str, filters: dict[str, Any]):
        self.asked.append((path, filters))
        if path.endswith("nowhere"):
            raise ValueError(f"Could not find project {path}")
        return self.found


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    wandb = pytest.importorskip("wandb")
    runs = []
    for number, (label, seed) in enumerate([("base", 0), ("base", 1), ("core", 0), ("core", 1)]):
        folder = write(tmp_path / "local" / str(number), label, seed, [(0.3, 0.1 * number, 2), (0.3, 0.2, 2)], steps=4)
        results = json.loads((folder / "results.json").read_text())
        rows = read_jsonl(folder / "metrics.jsonl")
        runs.append(FakeRun(number, "finished", results["run"]["config"], rows, results=results))
    runs.append(FakeRun(4, "crashed", {"rl_steps": 4, "seed": 7}, []))
    runs.append(FakeRun(5, "failed", {"rl_steps": 4}, [], run={"state": "failed", "error": "out of memory"}))
    runs.append(FakeRun(6, "running", {"rl_steps": 4}, []))
    runs.append(FakeRun(7, "finished", {"checkpoint": None}, [], results={"estimates": {}}))  # an evaluation
    runs.append(FakeRun(8, "finished", {"rl_steps": 4, "dry_run": True}, []))
    api = FakeApi(runs)
    monkeypatch.setattr(wandb, "Api", lambda: api)
    return api


def test_a_project_on_a_server_gives_the_same_report(server: FakeApi, tmp_path: Path, front_door, capsys):
    written = {}
    for name, place in (("local", tmp_path / "local"), ("server", "wandb://me/project")):
        code = front_door(
            "report", f"runs={place}", "baseline=base", "title=T", f"output={tmp_path / name}_",
            f"hydra.run.dir={tmp_path / 'h'}",
        )  # fmt: skip
        assert code == 0, capsys.readouterr().err
        files = {f: (tmp_path / f"{name}_" / f).read_text() for f in ("table.md", "curves.csv")}
        # The cell of the server's unfinished runs, which has no number.
        files["table.md"] = re.sub(r"\| experiment:none .*\n", "", files["table.md"])
        written[name] = {f: text.split("\n## Not in the table")[0].rstrip() for f, text in files.items()}
        rows = parquet.read_table(tmp_path / f"{name}_" / "runs.parquet").to_pylist()
        finished = [row for row in rows if row["state"] == "completed"]
        written[name]["runs"] = [{k: v for k, v in row.items() if k.startswith("after/")} for row in finished]
        page = Page(tmp_path / f"{name}_" / "report.html")
        assert len(finished) == 4 and {one["data-run"] for one in page.having("data-run")} == {
            r["run"] for r in finished
        }
        unfinished = {row["folder"] for row in rows if row["state"] != "completed"}
        assert {one["data-absent"] for one in page.having("data-absent")} == unfinished
        of_run = {(one["data-run"], one["data-metric"]): one["data-value"] for one in page.having("data-run")}
        assert all(float(of_run[r["run"], f"after/{m}"]) == r[f"after/{m}"] for r in finished for m in MEASURES)
    assert written["local"] == written["server"]
    absent = (tmp_path / "server_" / "table.md").read_text().split("## Not in the table\n\n")[1]
    assert absent.splitlines() == [
        "- wandb://me/project/id4 (cell experiment:none, seed 7): killed, crashed in W&B, no results.json",
        "- wandb://me/project/id5 (cell experiment:none): failed, out of memory",
        "- wandb://me/project/id6 (cell experiment:none): running, running in W&B, no results.json",
    ]


def test_results_of_a_run_that_goes_on_are_not_counted(server: FakeApi):
    """It had ended, and was resumed under its id: the server still has what it wrote then."""
    server.found[0].state, server.found[1].state = "running", "crashed"
    runs, unfinished = find_runs(["wandb://me/project"])
    assert [run.name[-1] for run in runs] == ["2", "3"]
    found = {run.name[-3:]: (run.state, run.why) for run in unfinished}
    assert found["id0"] == ("running", "running in W&B, its results.json is of an earlier attempt")
    assert found["id1"][0] == "killed"


def test_a_step_that_a_server_has_twice_counts_once(server: FakeApi):
    server.found[0].rows += [{STEP: 3, "reward/accuracy": 0.75}]
    run = next(run for run in find_runs(["wandb://me/project"])[0] if run.name.endswith("id0"))
    assert [(row[STEP], row["reward/accuracy"]) for row in run.rows()] == [(1, 0.125), (2, 0.25), (3, 0.75)]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("wandb://me/project", ("me/project", {})),
        ("wandb://me/project/a/group", ("me/project", {"group": "a/group"})),
        ("wandb:///project", ("project", {})),
    ],
)
def test_project_and_group_are_asked_for(server: FakeApi, source: str, asked: Any):
    assert len(find_runs([source, source])[0]) == 4, "the same project given twice counts once"
    assert server.asked[0] == asked


def test_mistakes_about_a_server_are_one_line(server: FakeApi, monkeypatch: pytest.MonkeyPatch):
    import wandb
    from wandb.errors import AuthenticationError, CommError, UsageError

    def refused(error: Exception):
        def api():
            raise error

        return api

    with pytest.raises(UserError, match=r"wandb://me/nowhere: W&B has no such project"):
        find_runs(["wandb://me/nowhere"])
    for source in ("wandb://project", "wandb://", "wandb://me/"):
        with pytest.raises(UserError, match="write wandb://entity/project"):
            find_runs([source])
    (run, *_), _ = find_runs(["wandb://me/project"])
    monkeypatch.setattr(FakeRun, "scan_history", lambda self: refused(CommError("gone"))())
    with pytest.raises(UserError, match=r"wandb://me/project/id0: W&B does not answer \(gone\)$"):
        run.rows()
    monkeypatch.setattr(server, "runs", lambda path, filters: refused(CommError("timed out\nlong story"))())
    with pytest.raises(UserError, match=r"W&B does not answer \(timed out\)$"):
        find_runs(["wandb://me/project"])
    for error in (UsageError("No authentication configured."), AuthenticationError("bad key")):
        monkeypatch.setattr(wandb, "Api", refused(error))
        with pytest.raises(UserError, match=r"not logged in to W&B \((No auth|bad key).*\): run `wandb login`"):
            find_runs(["wandb://me/project"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs the package wandb"):
        find_runs(["wandb://me/project"])
