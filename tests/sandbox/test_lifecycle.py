"""Starts that are refused, workers that are lost, and what is left behind: nothing."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from core_torl.config.errors import UserError
from core_torl.sandbox import bubblewrap, locked_forkserver, pool
from core_torl.sandbox.bubblewrap import Bubblewrap, BubblewrapPlan
from core_torl.sandbox.locked_forkserver import LandlockPlan, LockedForkserver
from core_torl.sandbox.pool import ProcessSandbox
from core_torl.sandbox.worker import WorkerLost
from tests.sandbox.conftest import KINDS, LIMITS, start

pytestmark = pytest.mark.sandbox


def descendants() -> set[int]:
    """Process ids of all that this process started, directly or not."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    known = {os.getpid()}
    while more := {p for p, parent in parents.items() if parent in known} - known:
        known |= more
    return known - {os.getpid()}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def temporary() -> set[str]:
    return set(os.listdir(tempfile.gettempdir()))


def settle(count, wanted, seconds: float = 5.0):
    deadline = time.monotonic() + seconds
    while count() != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert count() == wanted


class Unlocked(ProcessSandbox):
    name = "bubblewrap"

    def plans(self):
        return [LandlockPlan(locks=False)]


class Impossible:
    name = "impossible"

    def open(self, workers):
        raise WorkerLost("not here")

    def close(self):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_close_leaves_no_process_no_file_and_no_descriptor(kind):
    gc.collect()
    before = descendants(), descriptors(), temporary(), threading.active_count()
    sandbox = start(kind, workers=2)
    running = sandbox.submit("import time; time.sleep(60)")
    waiting = [sandbox.submit("print(1)") for _ in range(4)]
    time.sleep(0.2)
    sandbox.close()
    sandbox.close()
    assert running.result(1).status in {"infrastructure", "time_limit"}
    assert {w.result(1).status for w in waiting} <= {"infrastructure", "ok"}
    settle(lambda: (descendants(), descriptors(), temporary(), threading.active_count()), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_worker_costs_its_program_nothing(kind):
    sandbox = start(kind, workers=2, retries=20)
    stop = threading.Event()
    killed = []

    def kill() -> None:
        while not stop.wait(2.0):
            for pid in sandbox.pids[:1]:
                victims = sorted(descendants()) if len(killed) % 2 else [pid]
                for victim in victims:
                    try:
                        if b"bwrap" in Path(f"/proc/{victim}/cmdline").read_bytes() or victim in sandbox.pids:
                            os.kill(victim, signal.SIGKILL)
                            killed.append(victim)
                    except (FileNotFoundError, ProcessLookupError):
                        continue

    killer = threading.Thread(target=kill)
    killer.start()
    calls = [sandbox.submit(f"import time; time.sleep(0.2); print({n} ** 2)") for n in range(50)]
    results = [c.result(120) for c in calls]
    stop.set()
    killer.join()
    sandbox.close()
    assert len(killed) >= 2  # the first is a worker itself, the second something in it
    assert [r.stdout for r in results] == [f"{n**2}\n" for n in range(50)]
    assert {r.status for r in results} == {"ok"}


def test_workers_that_cannot_come_back_are_infrastructure(monkeypatch):
    sandbox = start("locked_forkserver", retries=1)
    monkeypatch.setattr(pool, "_launch", lambda state, index: (_ for _ in ()).throw(WorkerLost("gone")))
    for pid in sandbox.pids:
        os.kill(pid, signal.SIGKILL)
    result = sandbox.submit("print(1)").result(20)
    assert (result.status, result.detail) == ("infrastructure", "gone")
    sandbox.close()


def test_a_worker_is_replaced_after_so_many_programs():
    sandbox = start("locked_forkserver", recycle_after=3)
    seen = set()
    for _ in range(6):
        seen |= set(sandbox.pids)
        assert sandbox.submit("print(1)").result(20).status == "ok"
    assert len(seen | set(sandbox.pids)) >= 2
    sandbox.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(how, tmp_path):
    code = (
        "import sys, time\nfrom core_torl.sandbox.bubblewrap import Bubblewrap\n"
        "s = Bubblewrap(workers=1, allow_unsafe=True); s.start(); s.submit('import time; time.sleep(9)')\n"
        "print('up', flush=True); time.sleep(60)"
    )
    before = descendants()
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    family = descendants() - before
    assert len(family) >= 3
    child.send_signal(how)
    child.wait()
    child.stdout.close()

    def alive() -> list[int]:
        living = []
        for pid in family:
            try:
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    living.append(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return living

    settle(alive, [])


def test_a_sandbox_that_shows_files_of_this_machine_is_refused(monkeypatch):
    start("bubblewrap").close()
    before = descendants(), descriptors()
    walls = BubblewrapPlan.walls

    def leaky(self):
        words = walls(self)
        first = words.index("--ro-bind")
        return [*words[:first], "--ro-bind", "/etc", "/etc", *words[first:]]

    monkeypatch.setattr(BubblewrapPlan, "walls", leaky)
    with pytest.raises(UserError) as error:
        Bubblewrap(**LIMITS).start()
    assert "read /etc/passwd" in str(error.value) and "\n" not in str(error.value)
    settle(lambda: (descendants(), descriptors()), before)


def test_a_sandbox_without_any_lock_is_refused_unless_allowed(caplog):
    before = descendants(), descriptors(), temporary()
    with pytest.raises(UserError) as error:
        Unlocked(**LIMITS).start()
    assert all(t in str(error.value) for t in ("/etc/passwd", "open connections", "temporary files", "allow_unsafe"))
    settle(lambda: (descendants(), descriptors(), temporary()), before)
    with caplog.at_level(logging.WARNING), Unlocked(**LIMITS, allow_unsafe=True) as sandbox:
        assert sandbox.submit("print(1)").result(20).stdout == "1\n"
        assert sandbox.submit("x = bytearray(2 << 30)").result(20).status == "memory_limit"
    assert "UNSAFE" in caplog.text
    settle(lambda: (descendants(), descriptors(), temporary()), before)


def test_a_machine_where_nothing_works_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(bubblewrap, "BubblewrapPlan", Impossible)
    monkeypatch.setattr(locked_forkserver, "NamespacesPlan", Impossible)
    monkeypatch.setattr(locked_forkserver, "LandlockPlan", lambda locks=True: Impossible())
    with pytest.raises(UserError) as error:
        Bubblewrap(**LIMITS).start()
    assert "not here" in str(error.value) and "\n" not in str(error.value) and "sandbox_fusion" in str(error.value)


def test_without_bubblewrap_the_locked_forkserver_takes_over_and_says_so(monkeypatch, caplog):
    start("locked_forkserver").close()
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO), Bubblewrap(**LIMITS) as sandbox:
        assert sandbox.isolation["plan"].startswith("locked fork-server")
        assert sandbox.submit("print(1)").result(20).stdout == "1\n"
    assert "bwrap is not installed" in caplog.text and "fell back" in caplog.text


def test_a_canary_that_does_not_run_is_no_start(monkeypatch):
    start("locked_forkserver").close()
    monkeypatch.setattr(locked_forkserver, "BOOT", "raise SystemExit('no boot')")
    before = descendants(), descriptors()
    with pytest.raises(UserError, match="no boot"):
        LockedForkserver(**LIMITS).start()
    settle(lambda: (descendants(), descriptors()), before)


@pytest.mark.parametrize("key", ["workers", "timeout_s", "memory_mb", "output_bytes"])
def test_arguments_out_of_range(key):
    with pytest.raises(UserError, match=rf"sandbox\.{key} is 0"):
        Bubblewrap(**{key: 0})


def test_nothing_is_started_before_it_is_needed():
    before = descendants()
    Bubblewrap(**LIMITS)
    assert descendants() == before
