"""How long a sweep still takes: for each job that runs, and for all of them.

RL steps alone do not tell: a job also starts up and evaluates, before training, after it and perhaps in between, which
can take longer than the training.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from core_torl.launch.view_jobs import COMPLETED, RUNNING, JobView


def with_etas(jobs: Sequence[JobView]) -> list[JobView]:
    """The jobs, those that run with their ``eta_s`` (None where nothing is known)."""
    usual = _usual(jobs)
    return [replace(job, eta_s=_eta(job, usual)) if job.state == RUNNING else job for job in jobs]


def _eta(job: JobView, usual: float | None) -> float | None:
    """What its own steps and evaluations foretell, and no less than the completed jobs took, ``usual`` seconds."""
    guesses = []
    if job.work is not None:
        guesses.append(job.work.steps_left_s + (job.work.evaluations_left_s or 0.0))
    if usual is not None and job.took_s is not None:
        # Steps of former attempts count too: a job that was resumed has them behind it.
        guesses.append(usual - max(job.took_s, job.work.steps_done_s if job.work else 0.0))
    eta = max(guesses, default=0.0)
    # A job that runs is never at its end: where nothing is left of the estimate, nobody knows.
    return eta if eta > 0 else None


def whole(jobs: Sequence[JobView], pending: int, n_jobs: int) -> float | None:
    """Seconds until all jobs have ended, if the pending ones start on the first of ``n_jobs`` places that is free.

    A job that has not begun is taken to need what those that completed needed on average, or else what the running
    ones are on the way to. None where nothing is known of a job, where there is nothing to wait for, and where all
    have taken longer already than can be foreseen.
    """
    running = [job for job in jobs if job.state == RUNNING]
    if not running and not pending:
        return None
    usual = _usual(jobs)
    if usual is None:
        usual = _mean([job.took_s + job.eta_s for job in running if job.took_s is not None and job.eta_s is not None])
    busy: list[float] = []
    for job in running:
        if job.eta_s is not None:
            busy.append(job.eta_s)
        elif usual is None:
            return None
        else:
            busy.append(max(0.0, usual - (job.took_s or 0.0)))
    if pending and usual is None:
        return None
    places = sorted(busy + [0.0] * max(0, n_jobs - len(busy)))
    heapq.heapify(places)
    ends = [*busy]
    for _ in range(pending):
        ends.append(heapq.heappop(places) + (usual or 0.0))
        heapq.heappush(places, ends[-1])
    return max(ends) or None


def _usual(jobs: Sequence[JobView]) -> float | None:
    """Mean seconds of the jobs that completed; None if none has."""
    return _mean([job.took_s for job in jobs if job.state == COMPLETED and job.took_s is not None])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
