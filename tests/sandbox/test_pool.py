"""Whatever goes wrong in a thread of the pool, a call ends. With workers that cost nothing to start."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from core_torl.config.errors import UserError
from core_torl.sandbox import pool, worker
from core_torl.sandbox.canary import Canary
from core_torl.sandbox.forkserver import Server
from core_torl.sandbox.pool import ProcessSandbox
from core_torl.sandbox.protocol import Execution
from core_torl.sandbox.worker import Command
from tests.sandbox.test_lifecycle import descendants, descriptors, settle

pytestmark = pytest.mark.sandbox

# A worker that says hello and then answers each request with the bytes that the request asks for.
ECHO = """
import os, struct, sys
os.write(1, struct.pack("!I", 2) + b"{}")
while head := os.read(0, 4):
    os.write(1, bytes.fromhex(os.read(0, struct.unpack("!I", head)[0]).decode()))
"""


class Echo:
    name = "echo"
    fails = False

    def open(self, workers):
        pass

    def command(self, index, limits):
        if self.fails:
            raise OSError(28, "No space left on device")
        return Command([sys.executable, "-I", "-S", "-c", ECHO])

    def close(self):
        pass


class EchoSandbox(ProcessSandbox):
    name = "echo"
    plan = Echo()

    def plans(self):
        return [self.plan]


def message(head: object, rest: bytes = b"") -> str:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return (struct.pack("!I", len(text)) + text + rest).hex()


GOOD = message({"out": 2, "err": 0, "status": "ok", "seconds": 0.5, "detail": ""}, b"hi")


@pytest.fixture
def sandbox(monkeypatch):
    monkeypatch.setattr(Canary, "check", lambda self, run: [])
    monkeypatch.setattr(pool, "BACKOFF_S", 0.01)
    monkeypatch.setattr(EchoSandbox, "plan", Echo())
    made = EchoSandbox(workers=1, retries=1, timeout_s=1.0)
    yield made
    made.close()


def start_in_time(sandbox) -> None:
    """``start``, or TimeoutError instead of a wait for ever."""
    thread = ThreadPoolExecutor(1)
    try:
        thread.submit(sandbox.start).result(10)
    finally:
        thread.shutdown(wait=False)


@pytest.mark.parametrize(
    "answer",
    [
        message(b"not JSON"),
        message(b"\xff\xfe"),
        message([1]),
        message({}),
        message({"out": "x", "err": 0}),
        message({"out": None, "err": 0}),
        message({"out": -1, "err": 0, "status": "ok", "seconds": 0.5, "detail": ""}),
        message({"out": 0, "err": 0, "status": "ok", "seconds": None, "detail": ""}),
        struct.pack("!I", 1 << 30).hex(),
    ],
    ids=range(9),
)
def test_a_worker_that_speaks_nonsense_is_a_lost_worker(sandbox, answer):
    sandbox.start()
    result = sandbox.submit(answer).result(10)
    assert result.status == "infrastructure" and result.detail
    assert sandbox.submit(GOOD).result(10).stdout == "hi"


@pytest.mark.parametrize("what", ["tempfile.TemporaryFile", "os.dup", "socket.socketpair", "subprocess.Popen", "plan"])
def test_a_machine_without_anything_left_is_infrastructure_and_recovers(sandbox, monkeypatch, what):
    def fail(*_, **__):
        raise OSError(24, "Too many open files")

    sandbox.start()
    assert sandbox.submit(GOOD).result(10).stdout == "hi"
    before = descriptors()
    with monkeypatch.context() as patch:
        if what == "plan":
            patch.setattr(Echo, "fails", True)
        else:
            module, _, name = what.partition(".")
            patch.setattr(getattr(worker, module), name, fail)
        os.kill(sandbox.pids[0], signal.SIGKILL)
        for _ in range(2):
            result = sandbox.submit(GOOD).result(10)
            assert result.status == "infrastructure" and ("open files" in result.detail or "space" in result.detail)
    assert sandbox.submit(GOOD).result(10).stdout == "hi"
    assert descriptors() == before


@pytest.mark.parametrize("what", ["tempfile.TemporaryFile", "os.dup", "socket.socketpair", "plan"])
def test_a_machine_without_anything_left_is_refused_at_the_start(sandbox, monkeypatch, what):
    def fail(*_, **__):
        raise OSError(24, "Too many open files")

    before = descendants(), descriptors()
    with monkeypatch.context() as patch:
        if what == "plan":
            patch.setattr(Echo, "fails", True)
        else:
            module, _, name = what.partition(".")
            patch.setattr(getattr(worker, module), name, fail)
        with pytest.raises(UserError, match=r"open files|space"):
            start_in_time(sandbox)
    settle(lambda: (descendants(), descriptors()), before)
    start_in_time(sandbox)
    assert sandbox.submit(GOOD).result(10).stdout == "hi"


@pytest.mark.parametrize(
    "bug", [RuntimeError("bug"), SystemExit(3), KeyboardInterrupt()], ids=lambda b: type(b).__name__
)
def test_a_bug_reaches_the_caller_and_the_thread_goes_on(sandbox, monkeypatch, bug):
    run = worker.Worker.run

    def broken(self, code: str) -> Execution:
        if code == "bug":
            raise bug
        return run(self, code)

    monkeypatch.setattr(worker.Worker, "run", broken)
    sandbox.start()
    threads = threading.active_count()
    calls = [sandbox.submit(code) for code in (GOOD, "bug", GOOD, "bug", GOOD)]
    assert [type(call.exception(10)) for call in calls] == [type(None), type(bug)] * 2 + [type(None)]
    assert calls[4].result().stdout == "hi" and threading.active_count() == threads


def test_a_bug_at_the_start_ends_the_start(sandbox, monkeypatch):
    def bug(*_):
        raise RuntimeError("bug")

    before = descendants(), descriptors(), threading.active_count()
    monkeypatch.setattr(Canary, "check", bug)
    with pytest.raises(RuntimeError, match="bug"):
        start_in_time(sandbox)
    settle(lambda: (descendants(), descriptors(), threading.active_count()), before)


def test_a_call_that_is_handed_in_while_another_thread_closes_ends(sandbox):
    calls, stop = [], threading.Event()

    def submit() -> None:
        while not stop.is_set():
            calls.append(sandbox.submit(GOOD))

    thread = threading.Thread(target=submit)
    thread.start()
    for _ in range(10):
        time.sleep(0.02)
        sandbox.close()
    stop.set()
    thread.join()
    sandbox.close()
    assert {call.result(5).status for call in calls} <= {"ok", "infrastructure"}


def test_output_that_was_announced_and_is_gone_is_nothing():
    # The attack steals_its_own_output has to win a race for this; here it has won.
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    texts = {reading: bytearray()}
    assert Server._read(None, reading, texts) and not texts[reading]  # type: ignore[arg-type]
    os.write(writing, b"x")
    os.close(writing)
    assert Server._read(None, reading, texts) and texts[reading] == b"x"  # type: ignore[arg-type]
    assert not Server._read(None, reading, texts)  # type: ignore[arg-type]
    os.close(reading)
