"""A forked job is what a newly started one is: its process, streams, environment, arguments, end. And one that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core_torl.launch.prefork import Nursery, NurseryLost
from core_torl.launch.processes import JobProcess, orphans_adopted

from .conftest import Sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans"),
]
SCRIPT = """
import json, os, random, sys, threading
print(json.dumps({"argv": sys.argv[1:], "name": __name__, "own": os.environ.get("OWN"), "heavy": "decimal" in sys.modules,
                  "leads": os.getsid(0) == os.getpid() == os.getpgid(0), "stdin": sys.stdin.read(), "draw": random.random(),
                  "parent": os.getppid(), "threads": threading.active_count(), "path": sys.path[0],
                  "files": len(os.listdir("/proc/self/fd")), "home": os.environ.get("HOME")}))
print("to stderr", file=sys.stderr)
if sys.argv[1:] == ["wait"]:
    import time; time.sleep(60)
sys.exit(int(sys.argv[1]) if sys.argv[1:] else 0)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def nursery():
    with orphans_adopted():
        made = Nursery(["decimal"], {**os.environ})
        yield made
        made.close()


def ended(job: JobProcess) -> int:
    give_up = time.monotonic() + 30
    while job.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    return job.poll()


def said(log: Path) -> list[dict]:
    import json

    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def test_a_forked_job_is_like_one_started_anew(nursery, script: Path, tmp_path: Path):
    log, plain_log = tmp_path / "log", tmp_path / "plain.log"
    command = [sys.executable, str(script), "3", "two words"]
    codes = [ended(JobProcess(command, log, {"OWN": "1"}, nursery)) for _ in range(2)]
    codes.append(ended(JobProcess(command, plain_log, {"OWN": "1"})))
    assert codes == [3, 3, 3]
    one, two = said(log)
    (plain,) = said(plain_log)
    assert log.read_text().count("to stderr") == 2, "the log is continued"
    assert one["draw"] != two["draw"], "no two jobs have one stream of random numbers"
    assert one.pop("heavy") and not plain.pop("heavy")
    assert one["leads"] and one["parent"] == os.getpid() and one["threads"] == 1
    assert {**one, "draw": 0} == {**plain, "draw": 0}


def test_signals_reach_it_and_show_in_its_code(nursery, script: Path, tmp_path: Path):
    job = JobProcess([sys.executable, str(script), "wait"], tmp_path / "log", {}, nursery)
    while not (tmp_path / "log").is_file() or "to stderr" not in (tmp_path / "log").read_text():
        time.sleep(0.01)
    assert job.poll() is None
    job.ask_to_stop()
    assert ended(job) == -signal.SIGINT, "as Python ends on a KeyboardInterrupt that nobody catches"
    job = JobProcess([sys.executable, str(script), "wait"], tmp_path / "log", {}, nursery)
    job.kill()
    assert job.poll() == -signal.SIGKILL
    job.ask_to_stop()  # nothing to ask any more


def test_a_module_runs_as_the_main_one(nursery, tmp_path: Path):
    assert ended(JobProcess([sys.executable, "-m", "calendar", "2026", "11"], tmp_path / "log", {}, nursery)) == 0
    assert "November 2026" in (tmp_path / "log").read_text()


def test_jobs_outlive_their_nursery_and_the_nursery_does_not_outlive_its_launcher(
    nursery, script: Path, tmp_path: Path
):
    job = JobProcess([sys.executable, str(script), "wait"], tmp_path / "log", {}, nursery)
    nursery._process.kill()
    nursery._process.wait()
    assert job.poll() is None
    with pytest.raises(NurseryLost):
        JobProcess([sys.executable, str(script)], tmp_path / "log", {}, nursery)
    job.kill()
    code = (
        "import os; from core_torl.launch.prefork import Nursery\n"
        "made = Nursery([], {**os.environ}); made._answer(); print(made._process.pid, flush=True); os._exit(0)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    give_up = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_what_cannot_be_imported_is_named(script: Path, tmp_path: Path):
    made = Nursery(["no_such_module"], {**os.environ})
    try:
        with pytest.raises(NurseryLost, match="No module named 'no_such_module'"):
            made.fork([str(script)], tmp_path / "log", {})
    finally:
        made.close()


def test_a_sweep_goes_on_without_its_nursery(sweep: Sweep, monkeypatch):
    """The nursery is killed while the first job runs; the others are started anew."""
    process = sweep.start("seed=0,1,2", "sleep_s=1.5")
    give_up = time.monotonic() + 60
    while not (sweep.folder / "0" / "run.json").is_file():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"core_torl.launch.prefork" in path.read_bytes() and _parent(path.parent) == process.pid
    ]
    # The first job still has the nursery's command line; the nursery is the one that leads no job's folder.
    jobs = {sweep.record("0")["attempts"][0]["pid"]}
    (nursery,) = set(found) - jobs
    os.kill(nursery, signal.SIGKILL)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "jobs are started one by one from now on" in out
    assert sweep.values() == {"0": 1.0, "1": 2.0, "2": 3.0}


def _parent(folder: Path) -> int:
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize(("prefork", "share"), [("true", True), ("false", False)])
def test_it_can_be_switched_off(sweep: Sweep, prefork: str, share: bool):
    process = sweep.start("seed=0,1", "sleep_s=1", f"hydra.launcher.prefork={prefork}")
    give_up = time.monotonic() + 60
    while not (sweep.folder / "0" / "run.json").is_file():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    pid = sweep.record("0")["attempts"][0]["pid"]
    assert (b"core_torl.launch.prefork" in Path(f"/proc/{pid}/cmdline").read_bytes()) is share
    assert process.wait(60) == 0
