"""One job of a sweep at this moment: its state, how far it is, what it learns, what it still has to do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core_torl.launch.view_files import (
    STEP,
    STEP_S,
    TOKENS,
    Lengths,
    is_number,
    last,
    lengths,
    read_tail,
    worked,
)

PENDING, RUNNING, COMPLETED, SKIPPED, KILLED = "pending", "running", "completed", "skipped", "killed"
UNKNOWN = "unknown"  # a run that never said how it is (no run.json) and has been silent for long
DONE = (COMPLETED, SKIPPED)
BAD = ("failed", KILLED, "timeout", "interrupted")
STARTING, EVALUATING = "starting", "evaluating"  # phases of a running job in which no RL step passes

_PACE_ROWS = 10  # rows that seconds and tokens a step are taken from
_RATIOS = ("core/trigger_rate", "tool/code_ratio")


@dataclass(frozen=True)
class Work:
    """The work of a running job in seconds: RL steps done, RL steps left, evaluations left (None: not known)."""

    steps_done_s: float
    steps_left_s: float
    evaluations_left_s: float | None


@dataclass(frozen=True)
class JobView:
    """One job. Times are in seconds; None is what nobody knows (yet).

    ``label`` has the overrides that tell the jobs apart, ``progress`` runs from 0 to 1, ``ratio`` is the name and the
    value of ``core/trigger_rate`` or ``tool/code_ratio``, ``took_s`` is how long the job has been at it, or was,
    ``note`` says what a reader must know besides. ``phase`` is ``starting`` before the first row and ``evaluating``
    after the last RL step. ``former``: a job of a former command in the same folder, not of the one that ran last.
    """

    number: int
    folder: Path
    label: str
    state: str
    step: int | None = None
    rl_steps: int | None = None
    progress: float | None = None
    reward: float | None = None
    accuracy: float | None = None
    ratio: tuple[str, float] | None = None
    step_s: float | None = None
    took_s: float | None = None
    eta_s: float | None = None
    note: str = ""
    phase: str = ""
    work: Work | None = None
    former: bool = False


def job_view(
    number: int, folder: Path, label: str, state: str, note: str, took_s: float | None, former: bool = False
) -> JobView:
    """What the files in ``folder`` say of a job whose state is known. ``eta_s`` is left to who knows all jobs."""
    if state == PENDING:
        return JobView(number, folder, label, state, note=note)
    length = lengths(folder)
    rows = read_tail(folder / "metrics.jsonl")
    step, tokens = last(rows, STEP), last(rows, TOKENS)
    shares = [step / length.rl_steps] if step is not None and length.rl_steps else []
    shares += [tokens / length.token_budget] if tokens is not None and length.token_budget else []
    # A budget ends the training with the step that reaches it.
    progress = 1.0 if state in DONE else min(1.0, max(shares)) if shares else None
    phase = ""
    if state == RUNNING and length.rl_steps:
        phase = STARTING if step is None else EVALUATING if progress == 1.0 else ""
    pace = [row[STEP_S] for row in rows if is_number(row.get(STEP_S))][-_PACE_ROWS:]
    step_s = statistics.median(pace) if pace else None
    work = None
    if state == RUNNING and step_s is not None and step is not None:
        left = _steps_left(rows, step, tokens, length)
        work = None if left is None else _work(folder, step, left, step_s, length.evaluate_every, took_s)
    ratio = next(((name, value) for name in _RATIOS if (value := last(rows, name)) is not None), None)
    return JobView(
        number, folder, label, state, None if step is None else int(step), length.rl_steps, progress,
        last(rows, "reward/mean"), last(rows, "reward/accuracy"), ratio, step_s, took_s, None, note, phase, work,
        former,
    )  # fmt: skip


def _steps_left(
    rows: Sequence[Mapping[str, Any]], step: float, tokens: float | None, length: Lengths
) -> float | None:  # fmt: skip
    """RL steps until ``rl_steps`` or the token budget is reached, whichever comes first."""
    steps_left = [max(0.0, length.rl_steps - step)] if length.rl_steps else []
    if length.token_budget and tokens is not None:
        known = [(row[STEP], row[TOKENS]) for row in rows if is_number(row.get(STEP)) and TOKENS in row]
        (first, few), (newest, many) = known[-_PACE_ROWS:][0], known[-1]
        a_step = (many - few) / (newest - first) if newest > first else tokens / max(1.0, step)
        if a_step > 0:
            steps_left.append(max(0.0, math.ceil((length.token_budget - tokens) / a_step)))
    return min(steps_left, default=None)


def _work(folder: Path, step: float, steps_left: float, step_s: float, every: int, took_s: float | None) -> Work | None:
    """What is done and left. An evaluation is taken to need what the first one and the start-up took together."""
    done = worked(folder / "metrics.jsonl")
    if done is None:
        return None
    price = None
    silent = time.time() - done.changed
    if took_s is not None:
        # Up to the last row; less than nothing where steps of a former attempt are among them: then nobody knows.
        outside_of_steps = took_s - silent - done.steps_s
        price = outside_of_steps / max(1, done.evaluations) if outside_of_steps > 0 else None
    # Before and after training, and in between, where the last step is left to the evaluation after it.
    due = 2 + (int(step + steps_left - 1) // every if every else 0)
    left_s = None if price is None else max(0, due - max(1, done.evaluations)) * price
    if left_s is not None and not steps_left:
        left_s = max(0.0, left_s - silent)  # it has been at it since
    return Work(done.steps_s, steps_left * step_s, left_s)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``2 h 05 min``, ``3 d 4 h``."""
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def seconds(started: str | None, ended: str | None) -> float | None:
    """From ``started`` to ``ended``, or to now."""
    if started is None:
        return None
    end = datetime.now(UTC) if ended is None else datetime.fromisoformat(ended)
    return max(0.0, (end - datetime.fromisoformat(started)).total_seconds())
