"""Jobs forked from a process that has imported what they all import.

Importing torch, Lightning and transformers takes a core several seconds, more than many a short run itself. So a sweep
on CPUs does it once: ``Nursery`` starts a process that imports and then waits; each job is forked from it. Such a job
is as separate as one started anew, for the nursery does nothing but import: it has one thread, no CUDA, no random
numbers drawn. The job is forked twice, so that it is an orphan and comes to the launcher, which adopts orphans; the
launcher then waits for it as for a child of its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger(__name__)
_START_S, _ADOPTION_S = 300.0, 20.0


class NurseryLost(RuntimeError):
    """The process that jobs were forked from could not start, or is gone. Jobs can be started without it."""


class Nursery:
    """The launcher's end. ``modules`` are imported there; ``environment`` is that of all jobs."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(theirs.fileno()), *modules], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(environment), pass_fds=[theirs.fileno()],
                start_new_session=True,
            )  # fmt: skip
        ours.settimeout(_START_S)
        self._lines, self._socket = ours.makefile("rw"), ours
        self._ready = False

    def fork(self, command: Sequence[str], log_file: Path, environment: Mapping[str, str]) -> Forked:
        """A job for ``python -m module ...`` or ``python script ...``, ``command`` being what follows ``python``.

        Raises NurseryLost.
        """
        self.wait()
        asked = {"command": [*command], "log": str(log_file.absolute()), "launcher": os.getpid()}
        try:
            self._lines.write(json.dumps({**asked, "environment": dict(environment)}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise NurseryLost(str(error)) from error
        pid = self._answer()
        if not isinstance(pid, int):
            raise NurseryLost(str(pid))
        return Forked(pid)

    def wait(self) -> None:
        """Until the imports are made. Raises NurseryLost."""
        if not self._ready:
            if self._answer() != "ready":
                raise NurseryLost("it did not say that it is ready")
            self._ready = True

    def _answer(self) -> Any:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise NurseryLost(str(error) or type(error).__name__) from error
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            said = self._process.stderr.read().decode(errors="replace").strip() if self._process.stderr else ""
            raise NurseryLost(said.splitlines()[-1] if said else f"it ended with code {self._process.returncode}")
        return json.loads(line)

    def close(self) -> None:
        """End it; jobs that were forked from it go on."""
        with contextlib.suppress(OSError):  # what could not be sent to a process that is gone
            self._lines.close()
        self._socket.close()
        self._process.kill()
        self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()


class Forked:
    """A job that this process has adopted; what ``subprocess.Popen`` offers of it and is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._take(os.WNOHANG)

    def wait(self) -> int:
        code = self._take(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _take(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


# ---- the nursery's own process -------------------------------------------------------------------------------------


def _serve(descriptor: int, modules: Sequence[str]) -> dict[str, Any]:
    """Import, then fork for each line that comes. Returns what is asked for, in the job; ends when nobody asks."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the collector of a job need not touch, and so copy, what it shares with the others
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rw") as lines:
        _say(lines, "ready")
        for line in lines:
            asked = json.loads(line)
            reading, writing = os.pipe()
            between = os.fork()
            if not between:
                if os.fork():
                    os._exit(0)
                os.setsid()  # before anybody knows of it: whoever ends a job ends its group
                os.write(writing, str(os.getpid()).encode())
                os.close(reading)
                os.close(writing)
                return asked
            os.close(writing)
            os.waitpid(between, 0)
            with os.fdopen(reading) as pipe:
                _say(lines, int(pipe.read()))
    os._exit(0)


def _say(lines: Any, what: object) -> None:
    lines.write(json.dumps(what) + "\n")
    lines.flush()


def _become(asked: dict[str, Any]) -> None:
    """Make this process what a newly started one would be: its parent, streams, environment."""
    give_up = time.monotonic() + _ADOPTION_S
    while os.getppid() != asked["launcher"]:  # until the one between is gone, and the launcher has this one
        if time.monotonic() > give_up:
            os._exit(1)  # nobody could wait for it
        time.sleep(0.001)
    file = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    os.environ.clear()
    os.environ.update(asked["environment"])


def _run(command: Sequence[str]) -> None:
    """What ``python command`` does."""
    if command[0] == "-m":
        sys.argv = [*command[1:]]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*command]
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(command[0])
        runpy.run_path(command[0], run_name="__main__")


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = _serve(int(sys.argv[1]), sys.argv[2:])
    _become(asked)
    _run(asked["command"])
    sys.exit(0)


if __name__ == "__main__":
    main()
