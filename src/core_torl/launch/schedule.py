"""Jobs side by side: as many at a time as there is room for, each on GPUs of its own, none left behind.

One thread starts and watches all of them. Ctrl-C (or SIGTERM) asks each job to finish its RL step and save; a second
one kills them. A job that fails takes nothing with it but itself.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from core_torl.config.errors import UserError
from core_torl.launch.jobs import Job
from core_torl.launch.processes import JobProcess, orphans_adopted
from core_torl.launch.record import now

log = logging.getLogger(__name__)
POLL_S = 0.05


class Schedule:
    """Runs jobs. ``start`` makes the process of a job, ``finished`` says from its record and exit code whether it is
    done and what it returned, ``changed`` is called after each change of a job's state.

    ``slots`` has one list of GPUs for each job that may run at a time (empty lists where GPUs are not shared out).
    """

    def __init__(
        self,
        start: Callable[[Job], JobProcess],
        finished: Callable[[Job, int], tuple[bool, float | None]],
        changed: Callable[[], None],
        slots: Sequence[list[str]],
        timeout_s: float,
        retries: int,
        grace_s: float,
    ) -> None:
        self._start, self._finished, self._changed = start, finished, changed
        self._free = [list(slot) for slot in slots]
        self.timeout_s, self.retries, self.grace_s = timeout_s, retries, grace_s
        self._running: dict[int, tuple[Job, JobProcess]] = {}
        self._asked: dict[int, float] = {}  # job number -> when it was asked to stop
        self._over_time: set[int] = set()
        self._signals, self._left = 0, False

    @property
    def interrupted(self) -> bool:
        """Whether a signal came before every job had ended by itself."""
        return self._signals > 0 and self._left

    def run(self, jobs: Sequence[Job]) -> None:
        """Run every pending job; returns when all have ended, or those that run have after a signal."""
        waiting = [job for job in jobs if job.state == "pending" and job.twin is None]
        tries = {job.number: 0 for job in waiting}
        with orphans_adopted(), self._listening():
            try:
                while self._running or (waiting and not self._signals):
                    while waiting and self._free and not self._signals:
                        job = waiting.pop(0)
                        tries[job.number] += 1
                        self._begin(job)
                    for job in self._step():
                        # Exit code 2 is a mistake of the user's, which another try would only repeat.
                        again = job.state == "killed" or (job.state == "failed" and job.returncode != 2)
                        if again and tries[job.number] <= self.retries:
                            job.state = "pending"
                            waiting.insert(0, job)
                    time.sleep(POLL_S)
            finally:  # an error of our own must neither leave jobs behind nor take their last steps away
                self._end_all()
        self._left = any(job.twin is None and not job.done for job in jobs)
        for job in jobs:
            if job.twin is not None:
                job.state, job.value = job.twin.state, job.twin.value
        self._changed()

    def _begin(self, job: Job) -> None:
        job.gpus = self._free.pop(0)
        job.started, job.ended, job.returncode, job.state = now(), None, None, "running"
        try:
            process = self._start(job)
        except OSError as error:  # no folder, no log, no memory for a process: this job's matter, not the others'
            log.warning(f"job {job.number} could not be started: {error}")
            job.state, job.ended = "failed", now()
            self._free.append(job.gpus)
            self._changed()
            return
        job.pid = process.pid
        self._running[job.number] = job, process
        self._changed()

    def _step(self) -> Iterator[Job]:
        """Look after the running jobs once; yields those that have ended."""
        for job, process in list(self._running.values()):
            code = process.poll()
            if code is None:
                self._watch(job, process)
                continue
            process.clean_up()
            del self._running[job.number]
            self._free.append(job.gpus)
            job.ended, job.returncode, job.pid = now(), code, None
            try:
                done, job.value = self._finished(job, code)
            except UserError as error:  # its record cannot be read
                log.warning(f"job {job.number}: {error}")
                done, job.value = False, None
            if job.number in self._over_time and not done:
                job.state = "timeout"
            elif done:
                job.state = "completed"
            elif job.number in self._asked:
                job.state = "interrupted"
            else:
                job.state = "killed" if code < 0 else "failed"
            self._asked.pop(job.number, None)
            self._changed()
            yield job

    def _watch(self, job: Job, process: JobProcess) -> None:
        asked = self._asked.get(job.number)
        over = bool(self.timeout_s) and time.monotonic() - process.started > self.timeout_s
        if asked is None and (self._signals or over):
            self._asked[job.number] = time.monotonic()
            if over and not self._signals:
                self._over_time.add(job.number)
            process.ask_to_stop()
        elif asked is not None and (self._signals > 1 or time.monotonic() - asked > self.grace_s):
            process.kill()

    def _end_all(self) -> None:
        for _, process in self._running.values():
            process.ask_to_stop()
        give_up = time.monotonic() + self.grace_s
        for _, process in self._running.values():
            while process.poll() is None and time.monotonic() < give_up and self._signals < 2:
                time.sleep(POLL_S)
            process.kill()
            process.clean_up()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Count SIGINT, SIGTERM and SIGHUP while jobs run. Outside of the main thread signals are left alone."""

        def count(number: int, frame: Any) -> None:
            self._signals += 1

        handlers: dict[int, Any] = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                try:
                    handlers[number] = signal.signal(number, count)
                except ValueError:  # not the main thread
                    break
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
