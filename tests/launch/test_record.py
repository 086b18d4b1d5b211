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
from core_torl.launch.provenance import code_version, seeds, version_of
from core_torl.launch.record import add, finished, is_alive, read_record, recorded, state_of

PROVENANCE = {"overrides": ["seed=1"]}


def keep(folder: Path, mark: str = "a", error: BaseException | None = None, value: float | None = 2.5) -> None:
    with recorded(folder, "noop", mark, {"seed": 1}, {"variant": "core_cr"}, dict(PROVENANCE)) as record:
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
    assert said["provenance"] == PROVENANCE | {"identity": "a", "mixed_code": False}
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


def test_a_run_of_another_machine_is_left_alone_unless_told_so(tmp_path: Path, monkeypatch):
    dead(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match=r"on elsewhere is at work in it.*CORE_TORL_TAKE_OVER=1"):
        keep(tmp_path)
    monkeypatch.setenv("CORE_TORL_TAKE_OVER", "1")
    keep(tmp_path)
    assert [a["state"] for a in (read_record(tmp_path) or {})["attempts"]] == ["killed", "completed"]


def test_a_run_whose_results_were_deleted_is_not_done(tmp_path: Path):
    with recorded(tmp_path, "train", "a", {}, {}, dict(PROVENANCE)):
        pass
    assert finished(tmp_path, "a") is None
    (tmp_path / "results.json").write_text("{}")
    assert finished(tmp_path, "a") is not None


def test_a_run_that_goes_on_with_other_code_says_so(tmp_path: Path, capsys):
    with pytest.raises(ValueError), recorded(tmp_path, "noop", "a", {}, {}, PROVENANCE | {"commit": "1"}):
        raise ValueError
    assert capsys.readouterr().out == ""
    with recorded(tmp_path, "noop", "a", {}, {}, PROVENANCE | {"commit": "2"}):
        pass
    assert "was begun by other code" in capsys.readouterr().out
    said = read_record(tmp_path) or {}
    assert said["provenance"]["mixed_code"] and [a["commit"] for a in said["attempts"]] == ["1", "2"]


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


def test_speed_makes_no_difference_but_to_the_whole():
    base = {"seed": 0, "trainer": {"threads": 1}, "variant": {"microbatch_size": 8, "lr": 1.0}, "callbacks": {"x": 1}}
    other = {"seed": 0, "trainer": {"threads": 2}, "variant": {"microbatch_size": 4, "lr": 1.0}, "callbacks": {"x": 2}}
    one, two = OmegaConf.create(base), OmegaConf.create(other)
    assert identity(one) == identity(two) and identity(one, whole=True) != identity(two, whole=True)


def test_the_runs_own_folder_is_one_word_wherever_it_is_named():
    here, there = ({"note": f"{f}/x", "paths": {"output_dir": f}} for f in ("/a/b", "/c"))
    assert identity(OmegaConf.create(here), "/a/b") == identity(OmegaConf.create(there), "/c")
    assert identity(OmegaConf.create(here), "/a/b") != identity(OmegaConf.create(there), "/d")


def test_a_file_that_was_made_again_is_another_input(tmp_path: Path):
    policy = tmp_path / "policy"
    policy.mkdir()
    cfg = OmegaConf.create({"model": {"path": str(policy)}, "data": {"path": None}, "checkpoint": "hub/name"})
    empty = identity(cfg)
    (policy / "model.safetensors").write_text("1")
    made = identity(cfg)
    assert made != empty
    (policy / "notes.txt").write_text("no input")
    assert identity(cfg) == made
    (policy / "model.safetensors").write_text("22")
    assert identity(cfg) != made


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


def test_changes_count_by_their_contents_and_only_those_of_the_code(tmp_path: Path):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.email=a@b", "-c", "user.name=n", *arguments],
                       check=True, capture_output=True)  # fmt: skip

    git("init", "-q")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_bytes(b"# \xe9\n")
    git("add", ".")
    git("commit", "-qm", "m")
    clean = version_of(tmp_path)
    assert clean["commit"] and clean["dirty"] is False and clean["diff_sha256"] is None
    (tmp_path / "README.md").write_text("not code")
    assert version_of(tmp_path) == clean
    (tmp_path / "src" / "a.py").write_bytes(b"# \xe9\xff changed\n")  # no UTF-8
    changed = version_of(tmp_path)
    assert changed["dirty"] is True
    (tmp_path / "src" / "new.py").write_text("a = 1")
    first = version_of(tmp_path)["diff_sha256"]
    (tmp_path / "src" / "new.py").write_text("a = 2")
    assert len({changed["diff_sha256"], first, version_of(tmp_path)["diff_sha256"]}) == 3
    assert version_of(tmp_path / "src") == {"commit": None, "dirty": None, "diff_sha256": None}
