"""``run.json`` tells how a run stands whatever becomes of its process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core_torl.config.errors import UserError
from core_torl.launch.identity import identity
from core_torl.launch.provenance import code_version, seeds
from core_torl.launch.record import add, finished, is_alive, read_record, recorded, state_of

PROVENANCE = {"overrides": ["seed=1"]}


def keep(folder: Path, mark: str = "a", error: BaseException | None = None, value: float | None = 2.5) -> None:
    with recorded(folder, "train", mark, {"seed": 1}, {"variant": "core_cr"}, dict(PROVENANCE)) as record:
        assert record is not None
        said = read_record(folder)
        assert said is not None and said["state"] == "running" and state_of(said) == "running"
        record.value = value
        if error is not None:
            raise error


def test_a_run_that_ends_well_says_what_it_returned(tmp_path: Path):
    keep(tmp_path)
    said = read_record(tmp_path)
    assert said is not None
    assert (said["state"], said["value"], said["identity"]) == ("completed", 2.5, "a")
    assert said["config"] == {"seed": 1} and said["choices"] == {"variant": "core_cr"}
    assert said["provenance"] == PROVENANCE | {"identity": "a"}
    assert finished(tmp_path, "a") == said and finished(tmp_path, "b") is None


@pytest.mark.parametrize(
    ("error", "state", "text"),
    [
        (ValueError("first\nsecond"), "failed", "ValueError: first"),
        (SystemExit(2), "failed", "exit code 2"),
        (SystemExit(130), "interrupted", None),
        (SystemExit(0), "completed", None),
        (KeyboardInterrupt(), "interrupted", None),
    ],
)
def test_every_end_is_told(tmp_path: Path, error: BaseException, state: str, text: str | None):
    with pytest.raises(type(error)):
        keep(tmp_path, error=error)
    said = read_record(tmp_path)
    assert said is not None
    assert (said["state"], said["error"]) == (state, text)
    assert said["value"] == (2.5 if state == "completed" else None)


def test_attempts_at_one_run_are_counted_and_those_at_another_forgotten(tmp_path: Path):
    with pytest.raises(ValueError):
        keep(tmp_path, error=ValueError("x"))
    add(tmp_path, wandb_id="w1")
    keep(tmp_path)
    said = read_record(tmp_path)
    assert said is not None
    assert [a["state"] for a in said["attempts"]] == ["failed", "completed"] and said["wandb_id"] == "w1"
    keep(tmp_path, mark="b")
    said = read_record(tmp_path)
    assert said is not None
    assert [a["state"] for a in said["attempts"]] == ["completed"] and said["wandb_id"] is None


def test_what_the_run_learns_of_itself_is_kept(tmp_path: Path):
    with recorded(tmp_path, "train", "a", {}, {}, dict(PROVENANCE)):
        add(tmp_path, provenance={"gpus": ["H200"]}, wandb_id="w")
    said = read_record(tmp_path)
    assert said is not None
    assert said["provenance"]["gpus"] == ["H200"] and said["provenance"]["overrides"] == ["seed=1"]
    assert said["wandb_id"] == "w" and said["state"] == "completed"


def dead(folder: Path, **change) -> None:
    """A record that names a process which is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    attempt = {"started": "t", "ended": None, "host": socket.gethostname(), "pid": process.pid, "birth": "x:1",
               "state": "running"}  # fmt: skip
    said = {"app": "train", "state": "running", "identity": "a", "value": None, "error": None,
            "provenance": {}, "attempts": [attempt | change]}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(said))


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path):
    dead(tmp_path)
    said = read_record(tmp_path)
    assert said is not None
    assert state_of(said) == "killed" and finished(tmp_path, "a") is None
    dead(tmp_path, pid=os.getpid())  # the number is in use again, by a process that started at another time
    assert state_of(read_record(tmp_path) or {}) == "killed"
    dead(tmp_path, host="elsewhere")
    said = read_record(tmp_path)
    assert said is not None
    assert is_alive(said["attempts"][0]) is None and state_of(said) == "running"


def test_a_process_that_nobody_has_reaped_is_gone_too(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    dead(tmp_path, pid=process.pid)
    assert state_of(read_record(tmp_path) or {}) == "killed"
    process.wait()


def test_results_count_even_if_the_record_was_not_closed(tmp_path: Path):
    dead(tmp_path)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"objective": 0.5, "provenance": {"identity": "other"}}))
    assert finished(tmp_path, "a") is None  # what an earlier run left here
    results.write_text(json.dumps({"objective": 0.5, "provenance": {"identity": "a"}}))
    done = finished(tmp_path, "a")
    assert done is not None and (done["state"], done["value"]) == ("completed", 0.5)
    assert read_record(tmp_path) == done


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path):
    process = subprocess.Popen(["sleep", "30"])
    try:
        from core_torl.launch.record import birth

        dead(tmp_path, pid=process.pid, birth=birth(process.pid))
        with pytest.raises(UserError, match=f"process {process.pid} is at work in it"):
            keep(tmp_path)
    finally:
        process.kill()
        process.wait()
    keep(tmp_path)
    said = read_record(tmp_path)
    assert said is not None and [a["state"] for a in said["attempts"]] == ["killed", "completed"]


def test_further_ranks_keep_no_record(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with recorded(tmp_path, "train", "a", {}, {}, dict(PROVENANCE)) as record:
        assert record is None
    assert list(tmp_path.iterdir()) == []


def test_a_broken_record_is_named(tmp_path: Path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: no JSON"):
        read_record(tmp_path)


# ---- identity and provenance -------------------------------------------------------------------------------------


def test_places_make_no_difference_and_everything_else_does():
    base = {"seed": 0, "variant": {"lr": 1e-3}, "paths": {"output_dir": "/a", "root": "/r"}, "resume": None,
            "logger": {"group": "g"}, "callbacks": {"checkpoint_every": 1}, "note": "${paths.output_dir}/x"}  # fmt: skip
    mark = identity(OmegaConf.create(base))
    same = base | {"paths": {"output_dir": "/b", "root": "/r"}, "resume": "auto", "logger": {}, "callbacks": {}}
    assert identity(OmegaConf.create(same)) == mark
    assert identity(OmegaConf.create(base | {"variant": {"lr": 0.001}})) == mark  # the same number
    for change in ({"seed": 1}, {"variant": {"lr": 1e-2}}, {"variant": {}}, {"more": None}):
        assert identity(OmegaConf.create(base | change)) != mark


def test_seeds_are_found_wherever_they_are():
    tree = {"seed": 3, "data": {"seed": 4, "seeds": 5}, "a": {"b": {"seed": 6}}, "evaluation": {"seed": "${seed}"}}
    assert seeds(tree) == {"seed": 3, "data.seed": 4, "a.b.seed": 6}


def test_the_commit_is_that_of_this_checkout():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("this is no checkout")
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = code_version()
    assert found["commit"] == head and (found["diff_sha256"] is not None) == found["dirty"]
