"""Workers side by side: one thread each, one queue for all, and a new worker in place of one that was lost.

A sandbox of processes is a list of ways to start a worker, the strongest first (``plans``); this module does the rest.
``start`` takes the first way that works, proves it with a canary in every worker and says in the log what isolation
there is. A worker that is lost (killed from outside, say) costs its program nothing: the program is run again in a
new one, ``retries`` times, before the call ends as "infrastructure". A program cannot end its worker (see
``forkserver.py``), so this never repeats a program that does harm.

It guards a run against lost workers, programs that never end, and forgotten processes: workers end with ``close``, with
the interpreter, and with the process that started them, even if that one is killed. It does not guard against a
machine without memory or processes left, in which new workers cannot start; calls then end as "infrastructure".
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from core_torl.config.errors import UserError
from core_torl.sandbox.canary import Canary
from core_torl.sandbox.protocol import Execution, Limits
from core_torl.sandbox.worker import Command, Worker, WorkerLost

BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 2.0  # before the first retry; doubles with each, up to the longest

_log = logging.getLogger(__name__)
_Job = tuple[str, "Future[Execution]"]


class Plan(Protocol):
    """One way to start workers."""

    name: str

    def open(self, workers: int) -> None:
        """Make ready for that many workers. Raises WorkerLost if this way is not possible here."""
        ...

    def command(self, index: int, limits: Limits) -> Command:
        """The command line of one worker."""
        ...

    def close(self) -> None:
        """Give back what ``open`` took. May be called twice."""
        ...


@dataclass
class _State:
    """What the threads share; none of them knows the sandbox itself, so that it can be collected."""

    plan: Plan
    limits: Limits
    retries: int
    recycle_after: int
    jobs: queue.SimpleQueue[_Job | None] = field(default_factory=queue.SimpleQueue)
    closing: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    workers: dict[int, Worker] = field(default_factory=dict)
    isolation: dict[str, Any] = field(default_factory=dict)
    owner: int = field(default_factory=os.getpid)


def _launch(state: _State, index: int) -> Worker:
    """A worker that is ready. Raises WorkerLost."""
    try:
        command = state.plan.command(index, state.limits)
    except OSError as error:
        raise WorkerLost(str(error)) from error
    worker = Worker(command, state.limits.timeout_s)
    state.workers[index] = worker
    try:
        state.isolation = worker.wait_until_ready()
    except BaseException:
        _discard(state, index)
        raise
    return worker


def _discard(state: _State, index: int) -> None:
    worker = state.workers.pop(index, None)
    if worker is not None:
        worker.end()


def _serve(state: _State, index: int, ready: Future[list[str]], canary: Canary) -> None:
    """The life of one thread: start a worker, prove it, run programs until told to stop.

    Somebody waits for ``ready`` and for each job, so each ends, whatever goes wrong here, and the thread goes on.
    """
    try:
        ready.set_result(canary.check(_launch(state, index).run))
    except BaseException as error:  # noqa: BLE001 - goes to the caller of ``start``, who waits for it
        _discard_for_good(state, index)
        ready.set_exception(error)
        return
    while (job := state.jobs.get()) is not None:
        code, future = job
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(_run(state, index, code))
        except BaseException as error:  # noqa: BLE001 - a bug of ours; goes to the caller who waits for this job
            _discard_for_good(state, index)  # nobody knows how far the worker got
            if not future.done():
                future.set_exception(error)
    _discard_for_good(state, index)


def _discard_for_good(state: _State, index: int) -> None:
    """As ``_discard``, where a failure to clean up must not take the place of what is being told."""
    try:
        _discard(state, index)
    except BaseException:  # noqa: BLE001 - a thread that ends here would leave its callers waiting
        _log.exception("a sandbox worker could not be ended")


def _run(state: _State, index: int, code: str) -> Execution:
    detail = ""
    for attempt in range(state.retries + 1):
        if attempt:
            state.closing.wait(min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** (attempt - 1)))
        if state.closing.is_set():
            detail = "the sandbox was closed"
            break
        try:
            worker = state.workers.get(index) or _launch(state, index)
            result = worker.run(code)
        except WorkerLost as error:
            detail = str(error)
            _log.warning("a sandbox worker was lost (%s); starting another", detail)
            _discard(state, index)
            continue
        if result.status != "infrastructure":
            if worker.served >= state.recycle_after:
                _discard(state, index)
            return result
        detail = result.detail
        _discard(state, index)
    return Execution("", "", "infrastructure", detail=detail)


def _stop(state: _State) -> None:
    """End threads and workers; calls that wait or run end as infrastructure failures."""
    if os.getpid() != state.owner:  # a fork of the owner inherits the object, not the workers
        return
    state.closing.set()
    for _ in state.threads:
        state.jobs.put(None)
    # A thread in the middle of a program is woken by the end of its worker.
    for worker in list(state.workers.values()):
        worker.interrupt()
    for thread in state.threads:
        thread.join()
    while not state.jobs.empty():
        job = state.jobs.get()
        if job is not None and job[1].set_running_or_notify_cancel():
            job[1].set_result(Execution("", "", "infrastructure", detail="the sandbox was closed"))
    state.plan.close()


def default_workers() -> int:
    """One for each processor core that this process may use, at most 16; every rank has its own."""
    return min(16, len(os.sched_getaffinity(0)))


class ProcessSandbox(ABC):
    """What the sandboxes made of local processes have in common. Arguments as in conf/sandbox/bubblewrap.yaml.

    Raises:
        UserError: an argument is out of range.
    """

    name = "sandbox"

    def __init__(
        self,
        workers: int | None = None,
        timeout_s: float = 10.0,
        cpu_s: float = 10.0,
        memory_mb: int = 1024,
        processes: int = 16,
        file_mb: int = 16,
        scratch_mb: int = 64,
        output_bytes: int = 100_000,
        retries: int = 2,
        recycle_after: int = 1000,
        allow_unsafe: bool = False,
    ) -> None:
        workers = default_workers() if workers is None else workers
        for key, value, least in (
            ("workers", workers, 1),
            ("memory_mb", memory_mb, 256),
            ("processes", processes, 1),
            ("file_mb", file_mb, 1),
            ("scratch_mb", scratch_mb, 1),
            ("output_bytes", output_bytes, 1),
            ("retries", retries, 0),
            ("recycle_after", recycle_after, 1),
            ("timeout_s", timeout_s, 0.1),
            ("cpu_s", cpu_s, 0.1),
        ):
            if not least <= value < float("inf"):
                raise UserError(f"sandbox.{key} is {value}; set it to {least} or more")
        self.limits = Limits(timeout_s, cpu_s, memory_mb, processes, file_mb, scratch_mb, output_bytes)
        self.concurrency, self.retries, self.recycle_after = workers, retries, recycle_after
        self.allow_unsafe = allow_unsafe
        self._lock = threading.Lock()
        self._state: _State | None = None

    @abstractmethod
    def plans(self) -> Sequence[Plan]:
        """Ways to start a worker, the strongest first."""

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are alive now."""
        return [w.process.pid for w in list(self._state.workers.values())] if self._state else []

    @property
    def isolation(self) -> dict[str, Any]:
        """What the workers report of their isolation, and ``plan``, the name of the way they were started."""
        return {"plan": self._state.plan.name, **self._state.isolation} if self._state else {}

    def start(self) -> None:
        """Start the workers side by side and prove each with a canary. May be called twice.

        Raises UserError if none of the ways works here, or if programs can reach what they must not.
        """
        with self._lock:
            if self._state is not None and self._state.owner == os.getpid():
                return
            reasons = []
            for plan in self.plans():
                try:
                    state, leaks = self._try(plan)
                except WorkerLost as error:
                    reasons.append(f"{plan.name}: {error}")
                    continue
                if leaks and not self.allow_unsafe:
                    _stop(state)
                    raise UserError(
                        f"sandbox={self.name} ({plan.name}) does not lock programs in: they can {'; '.join(leaks)}. "
                        "Run where user namespaces or Landlock work; at your own risk: sandbox.allow_unsafe=true"
                    )
                self._announce(state, reasons, leaks)
                self._state = state
                self._finalizer = weakref.finalize(self, _stop, state)
                return
            raise UserError(
                f"sandbox={self.name} cannot lock programs in here ({'; '.join(reasons)}). Install bubblewrap "
                "(apt-get install bubblewrap) and allow user namespaces, use sandbox=sandbox_fusion, or, at your own "
                "risk, set sandbox.allow_unsafe=true"
            )

    def _try(self, plan: Plan) -> tuple[_State, list[str]]:
        """Workers started in one way, and what leaks. Raises WorkerLost, leaving nothing behind."""
        state = _State(plan, self.limits, self.retries, self.recycle_after)
        try:
            plan.open(self.concurrency)
            with Canary() as canary:
                answers: list[Future[list[str]]] = []
                for index in range(self.concurrency):
                    answers.append(Future())
                    task = (state, index, answers[-1], canary)
                    thread = threading.Thread(target=_serve, args=task, name=f"sandbox-{index}", daemon=True)
                    thread.start()
                    state.threads.append(thread)  # only now: ``_stop`` joins it
                leaks = [leak for answer in answers for leak in answer.result()]
        except BaseException as error:
            _stop(state)
            if isinstance(error, OSError):  # no room for the canary's bait, say
                raise WorkerLost(str(error)) from error
            raise
        return state, list(dict.fromkeys(leaks))

    def _announce(self, state: _State, reasons: list[str], leaks: list[str]) -> None:
        facts = ", ".join(f"{key} {value}" for key, value in state.isolation.items())
        for reason in reasons:
            _log.warning("sandbox=%s: fell back to %s, because of %s", self.name, state.plan.name, reason)
        _log.info("sandbox: %d workers by %s (%s)", self.concurrency, state.plan.name, facts)
        if leaks:
            _log.warning("UNSAFE: programs of the policy run without isolation: they can %s", "; ".join(leaks))

    def submit(self, code: str) -> Future[Execution]:
        """Run ``code`` as soon as a worker is free; starts the workers if ``start`` was not called.

        Raises UserError as ``start`` does.
        """
        self.start()
        future: Future[Execution] = Future()
        with self._lock:  # so that ``close`` finds every job that is in the queue
            if self._state is not None and not self._state.closing.is_set():
                self._state.jobs.put((code, future))
                return future
        # Closed meanwhile by another thread, or the interpreter is about to end.
        future.set_result(Execution("", "", "infrastructure", detail="the sandbox was closed"))
        return future

    def close(self) -> None:
        """End every worker and give back every resource. May be called twice; a later call starts new workers."""
        with self._lock:
            if self._state is not None:
                self._finalizer()
                self._state = None

    def __enter__(self) -> ProcessSandbox:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
