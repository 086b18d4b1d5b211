"""Runs without results, and results that are not the run's: each is told apart by its state, and none is hidden."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from core_torl.launch.record import birth, now
from core_torl.reports.finished import Run
from core_torl.reports.sources import find_runs

from .test_comparing import write

MEASURES = ("gap/greedy/robust_accuracy", "gap/greedy/accuracy")
GAP = [(0.3, 0.2, 2), (0.3, 0.4, 2)]


def states(runs: list[Run]) -> dict[str, tuple[str, str]]:
    return {run.folder.name: (run.state, run.why) for run in runs}


def began(folder: Path, state: str, *, app: str = "train", **attempt: Any) -> Path:
    """A run folder without results and with ``run.json``."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(
        "rl_steps: 4\nseed: 5\npaths:\n  output_dir: ${hydra:runtime.output_dir}\n  root: out\nfull: ${paths.root}/x\n"
        "inside: ${paths.output_dir}/y\n"
    )
    one = {"host": socket.gethostname(), "pid": os.getpid(), "birth": birth(os.getpid()), "started": now(), **attempt}
    error = "CUDA is not there" if state == "failed" else None
    record = {"app": app, "state": state, "error": error, "choices": {"variant": "grpo"}, "attempts": [one]}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def hydra_of_another_run():
    """As in the report's own command, which is a Hydra app that knows its own folder."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    here = HydraConfig.instance()
    before, here.cfg = here.cfg, OmegaConf.create({"hydra": {"runtime": {"output_dir": "/the/report"}}})
    yield
    here.cfg = before


def test_unfinished_runs_are_told_apart(tmp_path: Path, dead: dict[str, Any], hydra_of_another_run: None):
    began(tmp_path / "running", "running")
    began(tmp_path / "killed", "running", **dead)
    began(tmp_path / "elsewhere", "running", host="other-host", **dead)
    began(tmp_path / "failed", "failed")
    began(tmp_path / "stopped", "interrupted")
    began(tmp_path / "ended", "completed")
    began(tmp_path / "evaluation", "running", app="evaluate")
    (tmp_path / "old" / ".hydra").mkdir(parents=True)
    runs, unfinished = find_runs([tmp_path])
    assert runs == []
    assert states(unfinished) == {
        "running": ("running", f"process {os.getpid()}"),
        "killed": ("killed", f"process {dead['pid']} is gone"),
        "elsewhere": ("running", "on other-host, as its run.json says"),
        "failed": ("failed", "CUDA is not there"),
        "stopped": ("interrupted", "no results.json"),
        "ended": ("unfinished", "it ended, and left no results.json"),
        "old": ("unfinished", "no results.json"),
    }
    known = next(run for run in unfinished if run.folder.name == "failed")
    assert known.seed == 5 and known.choices == {"variant": "grpo"}
    assert known.results["run"]["config"]["full"] == "out/x", "what can be resolved is"
    assert known.results["run"]["config"]["paths"]["output_dir"] == "${hydra:runtime.output_dir}"
    assert known.results["run"]["config"]["inside"] == "${hydra:runtime.output_dir}/y"


def test_jobs_of_a_sweep_that_have_no_folder_are_pending(tmp_path: Path, dead: dict[str, Any]):
    top = tmp_path / "sweep"
    write(top / "0", "base", 0, GAP)
    began(top / "1", "running", **dead)
    (top / "2" / ".hydra").mkdir(parents=True)
    told = [(0, "completed", 0), (1, "timeout", -9), (2, "failed", 1), (3, "pending", None), (4, "completed", 0)]
    jobs = [
        {"number": n, "folder": str(n), "overrides": ["variant=grpo", f"seed={n}"], "state": s, "returncode": code}
        for n, s, code in told
    ]
    (top / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    runs, unfinished = find_runs([top])
    assert [run.folder for run in runs] == [top / "0"]
    assert states(unfinished) == {
        "1": ("timeout", "exit code -9, no results.json"),
        "2": ("failed", "exit code 1, no results.json"),
        "3": ("pending", "not begun: variant=grpo seed=3"),
        "4": ("unfinished", "its job ended, and left no results.json"),
    }
    assert next(run.seed for run in unfinished if run.folder.name == "3") == 3
    (only,) = find_runs([top / "2"])[1]
    assert only.state == "failed", "sweep.json lies above the folder that was asked for"


def test_results_of_an_earlier_attempt_are_not_those_of_the_run(tmp_path: Path, dead: dict[str, Any]):
    """Both files say whose they are: a copy, which makes all files young, changes nothing."""
    folder = write(tmp_path / "run", "base", 0, GAP)
    results = json.loads((folder / "results.json").read_text())

    def found(identity: str, attempt: int, attempts: int, **said: Any) -> tuple[str, str]:
        made = {"provenance": {"identity": identity}, "compute": {"attempts": attempt}}
        (folder / "results.json").write_text(json.dumps(results | made))
        one = {"host": socket.gethostname(), "started": now(), **dead}
        record = {"app": "train", "state": "running", "identity": "one", "attempts": [one] * attempts, **said}
        (folder / "run.json").write_text(json.dumps(record))
        runs, unfinished = find_runs([tmp_path])
        return next((run.state, run.why) for run in [*runs, *unfinished])

    gone = f"process {dead['pid']} is gone"
    assert found("one", 1, 2) == found("two", 1, 1) == ("killed", gone)
    assert found("one", 2, 2)[0] == "completed", "killed at the very end"
    assert found("one", 1, 1, state="completed") == ("completed", "")
    state, why = found("one", 1, 1, state="failed", error="no disk")
    assert (state, why) == ("completed", "its run.json says failed: no disk; its results were written before")


def test_old_results_are_told_by_their_age(tmp_path: Path, dead: dict[str, Any]):
    folder = write(tmp_path / "run", "base", 0, GAP)
    record = {
        "app": "train",
        "state": "running",
        "attempts": [{"host": socket.gethostname(), "started": now(), **dead}],
    }
    (folder / "run.json").write_text(json.dumps(record))
    os.utime(folder / "results.json", (1e9, 1e9))
    runs, (left,) = find_runs([tmp_path])
    assert not runs and left.state == "killed"
    os.utime(folder / "results.json")  # written after the attempt began: killed at the very end
    assert len(find_runs([tmp_path])[0]) == 1


def test_a_run_on_another_host_that_is_silent_is_not_running(tmp_path: Path, dead: dict[str, Any]):
    folder = began(tmp_path / "run", "running", host="other-host", **dead)
    long_ago = time.time() - 7200
    for path in (folder / "run.json", folder / ".hydra" / "config.yaml"):
        os.utime(path, (long_ago, long_ago))
    (left,) = find_runs([tmp_path])[1]
    assert left.state == "unfinished"
    assert re.fullmatch(r"running on other-host, as its run.json says, but no sign of life for .*", left.why)
    (folder / "metrics.jsonl").write_text("")
    assert find_runs([tmp_path])[1][0].state == "running"


# ---- broken files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", '{"after": {', "[1]", '{"after": {}, "run": null}'])
def test_a_torn_results_file_makes_its_run_unfinished(tmp_path: Path, text: str):
    write(tmp_path / "good", "base", 0, GAP)
    (write(tmp_path / "torn", "base", 1, GAP) / "results.json").write_text(text)
    (run,), (left,) = find_runs([tmp_path])
    assert run.folder.name == "good" and left.state == "unfinished"
    assert left.why.startswith(("results.json is no JSON", "its results.json has no section 'run'"))


def test_other_torn_files_are_noted(tmp_path: Path):
    (write(tmp_path / "a", "base", 0, GAP) / "run.json").write_text("")
    (tmp_path / "sweep.json").write_text('{"jobs": [')
    begun = began(tmp_path / "b", "failed")
    (begun / "run.json").write_text("{")
    (begun / ".hydra" / "overrides.yaml").write_text("[")
    (begun / ".hydra" / "hydra.yaml").write_text("hydra:\n")
    notes: list[str] = []
    (run,), (left,) = find_runs([tmp_path], notes)
    assert run.folder.name == "a" and (left.state, left.why) == ("unfinished", "run.json is no JSON")
    assert notes == [
        f"{tmp_path}: sweep.json is no JSON: jobs that have not begun are not known.",
        f"{tmp_path / 'a'}: run.json is no JSON.",
    ]
