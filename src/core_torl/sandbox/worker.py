"""One worker process as its owner sees it: started, asked, ended.

What happens in it is in ``forkserver.py``. Here is the other end of its pipes, with a deadline on everything, so that a
worker that hangs or dies is an exception here and never a wait without end.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from core_torl.sandbox.protocol import Execution

START_LIMIT_S = 120.0  # for importing sympy on a machine under heavy load
GRACE_S = 30.0  # beyond a program's own limit; only a worker that hangs takes longer
END_LIMIT_S = 5.0
_MAX_HEAD = 1 << 20


class WorkerLost(RuntimeError):
    """The worker ended, hung, or spoke nonsense. Says nothing about the program that it was running."""


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a worker: its command line and the descriptors that it inherits."""

    arguments: Sequence[str]
    descriptors: Sequence[int] = ()


class Worker:
    """Starts in the constructor, or raises WorkerLost. ``wait_until_ready`` before ``run``. One caller at a time.

    Must be made in a thread that lives as long as the worker: the kernel ends a process whose ``die-with-parent`` is
    set when the *thread* that started it ends.
    """

    def __init__(self, command: Command, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.served = 0
        with ExitStack() as undo:
            try:
                with tempfile.TemporaryFile() as log:
                    self._log = os.dup(log.fileno())
                undo.callback(os.close, self._log)
                # A socket, for it can be shut down from another thread while this one uses it.
                self._requests, theirs = socket.socketpair()
                undo.callback(self._requests.close)
                with theirs:
                    self.process = subprocess.Popen(
                        command.arguments,
                        stdin=theirs.fileno(),
                        stdout=subprocess.PIPE,
                        stderr=self._log,
                        env={"PATH": os.environ.get("PATH", os.defpath)},
                        pass_fds=command.descriptors,
                        start_new_session=True,
                        bufsize=0,
                        cwd="/",
                    )
            except OSError as error:  # no descriptors, no room, no processes left: another try may find some
                raise WorkerLost(str(error)) from error
            undo.pop_all()
        assert self.process.stdout is not None
        self._stdout = self.process.stdout

    def wait_until_ready(self) -> dict[str, Any]:
        """What isolation the worker has. Raises WorkerLost with the worker's last words."""
        try:
            return self._head(time.monotonic() + START_LIMIT_S)
        except WorkerLost as error:
            words = os.pread(self._log, 1 << 16, 0).decode(errors="replace").strip().splitlines()
            raise WorkerLost(words[-1] if words else str(error)) from error

    def run(self, code: str) -> Execution:
        """Raises WorkerLost."""
        source = code.encode("utf-8", "surrogatepass")
        deadline = time.monotonic() + self.timeout_s + GRACE_S
        message = memoryview(struct.pack("!I", len(source)) + source)
        self._requests.setblocking(False)
        try:
            while message:
                self._wait(self._requests.fileno(), select.POLLOUT, deadline)
                message = message[self._requests.send(message, socket.MSG_NOSIGNAL) :]
        except OSError as error:
            raise WorkerLost(f"the worker does not listen: {error.strerror}") from error
        head = self._head(deadline)
        try:
            sizes = int(head["out"]), int(head["err"])
            if min(sizes) < 0:
                raise ValueError(sizes)
            out, err = (self._read(size, deadline).decode("utf-8", "replace") for size in sizes)
            result = Execution(out, err, head["status"], float(head["seconds"]), head["detail"])
        except (ValueError, KeyError, TypeError) as error:
            raise WorkerLost("the worker speaks nonsense") from error
        self.served += 1
        return result

    def _head(self, deadline: float) -> dict[str, Any]:
        (size,) = struct.unpack("!I", self._read(4, deadline))
        try:
            head = json.loads(self._read(size, deadline)) if size <= _MAX_HEAD else None
        except ValueError:
            head = None
        if not isinstance(head, dict):
            raise WorkerLost("the worker speaks nonsense")
        return head

    def _read(self, size: int, deadline: float) -> bytes:
        parts = []
        while size:
            self._wait(self._stdout.fileno(), select.POLLIN, deadline)
            try:
                part = os.read(self._stdout.fileno(), min(size, 1 << 20))
            except OSError as error:
                raise WorkerLost(f"the worker cannot be read: {error.strerror}") from error
            if not part:
                raise WorkerLost("the worker ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise WorkerLost("the worker hangs")

    def interrupt(self) -> None:
        """From another thread: make a ``run`` that is under way raise WorkerLost."""
        with suppress(OSError):  # it has ended already
            self._requests.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        """End it, with every program in it, and give back its descriptors."""
        self._requests.close()  # tells the server inside to end, which ends all that it started
        try:
            self.process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                self.process.kill()  # what is inside dies with it
            self.process.wait()
        finally:
            self._stdout.close()
            os.close(self._log)
