"""A pool of worker processes that can be killed, so that no answer can stop a training run.

``Verifier.check`` hands pairs (gold, prediction) to the workers and says of each pair which of six things happened.
A worker that runs out of CPU time is killed by the kernel (see ``worker.py``), its pair becomes a "timeout", a new
worker takes its place and the other pairs of the batch go on. A wall-clock limit stands behind that for a worker that
sleeps instead of computing. "timeout" and "error" are verdicts of their own: who takes them for "wrong" punishes a
policy for the state of the machine.

No thread, no signal handler and no pool library is involved, so a check works from any thread. Workers start at the
first check, live on between checks, and are gone after ``close`` or when the interpreter ends.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from core_torl.reward.base import Outcome
from core_torl.reward.worker import OUT_OF_MEMORY

MAX_CHARS = 4_000  # a longer text is no final answer; the bound also keeps a job within one pipe buffer
START_LIMIT_S = 300.0  # for importing sympy on a machine under heavy load
ATTEMPTS = 3  # to hand out a pair, or to start a worker, while something outside keeps killing workers

_SOURCES = str(Path(__file__).resolve().parents[2])

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one pair. ``detail`` says in words why a timeout or an error is one, else it is empty."""

    outcome: Outcome
    detail: str = ""


class _Worker:
    """One process, and the one pair that it may be working on."""

    def __init__(self, memory_mb: int) -> None:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (_SOURCES, environment.get("PYTHONPATH"))))
        # sympy orders some things by hash: a fixed seed makes a verdict a function of the pair alone.
        environment["PYTHONHASHSEED"] = "0"
        # -P keeps the working directory off the path: a run in a folder with a file sympy.py still works.
        # A session of its own: Ctrl-C reaches only the parent, and killpg takes whatever the worker may have started.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "core_torl.reward.worker", str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.unread = b""
        self.ready = False
        self.started = False
        self.pair: Pair | None = None
        self.deadline = time.monotonic() + START_LIMIT_S

    def send(self, pair: Pair, timeout_s: float) -> None:
        self.pair, self.started, self.deadline = pair, False, math.inf
        line = json.dumps([*pair, timeout_s], ensure_ascii=False) + "\n"
        with suppress(BrokenPipeError):  # died while it was idle: the end of its output says so at the next read
            self.stdin.write(line.encode("utf-8", "replace"))

    def read(self) -> list[Any] | None:
        """The messages that have arrived; None if there will be no more."""
        block = os.read(self.stdout.fileno(), 1 << 16)
        if not block:
            return None
        *lines, self.unread = (self.unread + block).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        """Kill it if need be, collect it, close the pipes; returns the exit status (minus the signal's number)."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.stdin.close()
        self.stdout.close()
        return status


def _end_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # a fork of this process inherits the list, not the workers
        while workers:
            workers.pop().end()


class Verifier:
    """Decides mathematical equality in ``workers`` processes.

    ``timeout_s`` is CPU time for one pair, measured inside the worker. ``wall_timeout_s`` is the time on the clock
    from the moment the worker begins with a pair. ``memory_mb`` bounds the address space of a worker in MiB.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, workers: int = 1, timeout_s: float = 5.0, wall_timeout_s: float = 60.0, memory_mb: int = 2048
    ) -> None:
        if workers < 1:
            raise ValueError(f"reward.workers is {workers}; set it to 1 or more")
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"reward.timeout_s is {timeout_s}; set it to a positive number of CPU seconds, e.g. 5")
        if not (wall_timeout_s >= timeout_s and math.isfinite(wall_timeout_s)):
            raise ValueError(
                f"reward.wall_timeout_s is {wall_timeout_s}; set it to a finite number of seconds, "
                f"at least reward.timeout_s ({timeout_s}), better ten times that"
            )
        if memory_mb < 128:
            raise ValueError(f"reward.memory_mb is {memory_mb}; set it to 128 or more, sympy alone takes about 80 MiB")
        self.workers, self.timeout_s, self.wall_timeout_s, self.memory_mb = (
            workers,
            timeout_s,
            wall_timeout_s,
            memory_mb,
        )
        self._lock = threading.Lock()
        self._failed_starts = 0  # in a row
        self._adopt()

    def _adopt(self) -> None:
        """Begin with no workers, as the process that we are in."""
        self._owner = os.getpid()
        self._pool: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end_all, self._pool, self._owner)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are alive now; empty before the first check."""
        return [worker.process.pid for worker in self._pool]

    def check(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """A verdict for each pair (gold, prediction), in order. Equal pairs are computed once.

        Blocks until all are decided; calls from several threads take turns.

        Raises:
            RuntimeError: a worker ends before it is ready to work, for instance because math-verify is missing.
        """
        verdicts: dict[Pair, Verdict] = {}
        pending: deque[Pair] = deque()
        for pair in dict.fromkeys(pairs):
            if len(pair[0]) > MAX_CHARS:
                verdicts[pair] = Verdict("unparsed_gold", f"longer than {MAX_CHARS} characters")
            elif len(pair[1]) > MAX_CHARS:
                verdicts[pair] = Verdict("unparsed_prediction", f"longer than {MAX_CHARS} characters")
            else:
                pending.append(pair)
        if pending:
            with self._lock:
                self._work(pending, verdicts)
        return [verdicts[pair] for pair in pairs]

    def _work(self, pending: deque[Pair], verdicts: dict[Pair, Verdict]) -> None:
        if self._owner != os.getpid():
            self._adopt()
        wanted = len(verdicts) + len(pending)
        attempts: dict[Pair, int] = {}
        with selectors.DefaultSelector() as selector:
            for worker in self._pool:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            try:
                while len(verdicts) < wanted:
                    while len(self._pool) < min(self.workers, wanted - len(verdicts)):
                        worker = _Worker(self.memory_mb)
                        self._pool.append(worker)
                        selector.register(worker.stdout, selectors.EVENT_READ, worker)
                    for worker in self._pool:
                        if worker.ready and worker.pair is None and pending:
                            pair = pending.popleft()
                            attempts[pair] = attempts.get(pair, 0) + 1
                            worker.send(pair, self.timeout_s)
                    wait_s = min(w.deadline for w in self._pool) - time.monotonic()
                    events = selector.select(None if math.isinf(wait_s) else max(wait_s, 0.0))
                    now = time.monotonic()
                    for worker in [key.data for key, _ in events]:
                        messages = worker.read()
                        if messages is None:
                            selector.unregister(worker.stdout)
                            self._bury(worker, pending, verdicts, attempts)
                        else:
                            self._listen(worker, messages, verdicts)
                    for worker in [w for w in self._pool if w.deadline <= now]:
                        selector.unregister(worker.stdout)
                        self._give_up(worker, verdicts)
            finally:
                # Left by an exception (Ctrl-C, say): a late answer must not be taken for one of the next batch.
                for worker in [w for w in self._pool if w.pair is not None]:
                    self._remove(worker)

    def _remove(self, worker: _Worker) -> int:
        self._pool.remove(worker)
        return worker.end()

    def _listen(self, worker: _Worker, messages: list[Any], verdicts: dict[Pair, Verdict]) -> None:
        for message in messages:
            if message == "ready":
                worker.ready, worker.deadline, self._failed_starts = True, math.inf, 0
            elif message == "started":
                worker.started, worker.deadline = True, time.monotonic() + self.wall_timeout_s
            else:
                assert worker.pair is not None
                verdicts[worker.pair] = Verdict(message[0])
                worker.pair, worker.deadline = None, math.inf

    def _give_up(self, worker: _Worker, verdicts: dict[Pair, Verdict]) -> None:
        pair = worker.pair
        self._remove(worker)
        if pair is None:
            raise RuntimeError(f"a verifier worker was not ready after {START_LIMIT_S:g} s; is the machine overloaded?")
        verdicts[pair] = Verdict("timeout", f"no answer after {self.wall_timeout_s:g} s on the clock")

    def _bury(
        self, worker: _Worker, pending: deque[Pair], verdicts: dict[Pair, Verdict], attempts: dict[Pair, int]
    ) -> None:
        """A worker died by itself: name what that means for its pair. The next round of the loop replaces it."""
        pair, ready, started = worker.pair, worker.ready, worker.started
        status = worker.process.wait()
        self._remove(worker)
        if not ready:
            self._failed_starts += 1
            if status < 0 and self._failed_starts < ATTEMPTS:  # killed by a signal while it was starting
                return
            self._failed_starts = 0
            raise RuntimeError(
                f"a verifier worker ended (status {status}) before it was ready; its message is on standard error. "
                f"Check that math-verify is installed and that reward.memory_mb ({self.memory_mb}) is large enough"
            )
        if pair is None:
            return
        if not started and attempts[pair] < ATTEMPTS:
            pending.appendleft(pair)
        elif status == -signal.SIGPROF:
            verdicts[pair] = Verdict("timeout", f"more than {self.timeout_s:g} s of CPU time")
        elif status == OUT_OF_MEMORY:
            verdicts[pair] = Verdict("error", f"more than {self.memory_mb} MiB of memory")
        else:
            verdicts[pair] = Verdict("error", f"the worker ended with status {status}")

    def close(self) -> None:
        """End and collect all workers. May be called twice; a later check starts new ones."""
        with self._lock:
            _end_all(self._pool, self._owner)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
