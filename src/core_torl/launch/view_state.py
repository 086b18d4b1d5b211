"""What the files of a sweep say about it at this moment: which job does what, how far it is, and when all will be done.

Nothing here talks to a process: the subprocess launcher keeps ``sweep.json``, every run keeps ``run.json`` and
``metrics.jsonl``. So a sweep can be watched from another terminal or another machine, and on launchers that write no
``sweep.json`` (joblib, submitit), where the run folders that there are stand for the sweep. Of ``metrics.jsonl`` only
the end is read: a look at hundreds of long runs takes a fraction of a second.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from core_torl.config.errors import UserError
from core_torl.launch.record import is_alive, read_record, state_of

PENDING, RUNNING, COMPLETED, SKIPPED, KILLED = "pending", "running", "completed", "skipped", "killed"
UNKNOWN = "unknown"  # a run that never said how it is (no run.json) and has been silent for long
DONE = (COMPLETED, SKIPPED)
BAD = ("failed", KILLED, "timeout", "interrupted")

SILENT_AFTER_S = 300.0  # a job of which nothing is heard for so long is said to be silent
_TAIL_BYTES = 48 * 1024  # some twenty rows
_TAIL_LIMIT = 1024 * 1024
_PACE_ROWS = 10  # rows that seconds and tokens a step are taken from
_RATIOS = ("core/trigger_rate", "tool/code_ratio")
_STEP, _TOKENS, _STEP_S = "train/rl_step", "train/sampled_tokens", "time/step_s"
_NO_RUNS_INSIDE = {".hydra", "wandb", "checkpoints", "policy"}
_DEPTH = 3  # how many folders below the sweep's a run may lie


@dataclass(frozen=True)
class JobView:
    """One job. Times are in seconds; None is what nobody knows (yet).

    ``label`` has the overrides that tell the jobs apart, ``progress`` runs from 0 to 1, ``ratio`` is the name and the
    value of ``core/trigger_rate`` or ``tool/code_ratio``, ``took_s`` is how long the job has been at it, or was,
    ``note`` says what a reader must know besides.
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


@dataclass(frozen=True)
class SweepView:
    """A sweep at one moment. ``eta_s`` is None until a job's first step is known, ``note`` is about the whole of it.

    ``ended`` is true if nothing of it runs and nothing of it will, so that there is nothing left to wait for.
    """

    name: str
    folder: Path
    jobs: tuple[JobView, ...]
    ended: bool
    eta_s: float | None = None
    note: str = ""

    def count(self, *states: str) -> int:
        return sum(job.state in states for job in self.jobs)


# ---- the sweep ---------------------------------------------------------------------------------------------------


def read_sweep(folder: str | os.PathLike[str]) -> SweepView:
    """What is known of the sweep (or the single run) in ``folder``. UserError: no such folder, or no sweep in it."""
    top = Path(folder)
    if not top.is_dir():
        raise UserError(f"runs={folder}: no such folder")
    told = _read_told(top / "sweep.json")
    return _from_runs(top) if told is None else _from_sweep(top, told)


def newest_sweep(root: str | os.PathLike[str]) -> Path:
    """The folder below ``root`` whose sweep began or changed last. UserError if there is none."""
    found = [
        (path.stat().st_mtime, path.parent)
        for depth in range(_DEPTH)
        for name in ("sweep.json", "multirun.yaml")  # the second is what Hydra writes for every launcher
        for path in Path(root).glob("*/" * depth + name)
    ]
    for _, folder in sorted(found, reverse=True):
        if (folder / "sweep.json").exists() or _run_folders(folder):
            return folder
    raise UserError(f"no sweep below {root}: name its folder with runs=...")


def _from_sweep(top: Path, told: Mapping[str, Any]) -> SweepView:
    labels = short_labels([job["overrides"] for job in told["jobs"]])
    jobs = []
    for job, label in zip(told["jobs"], labels, strict=True):
        own = top / job["folder"]
        state, note = job["state"], ""
        if state == RUNNING and job["pid"] is not None:
            state, note = _still_running(own, told["host"], job["pid"], own / job["log"])
        if state in BAD:
            note = f"see {own / job['log']}"
        jobs.append(_job(job["number"], own, label, state, note, _seconds(job["started"], job["ended"])))
    launcher = {"host": told["host"], "pid": told["launcher_pid"], "birth": told.get("launcher_birth")}
    launcher_gone = told["state"] == RUNNING and is_alive(launcher) is False
    stopped = told["state"] != RUNNING or launcher_gone
    running = [job for job in jobs if job.state == RUNNING]
    pending = sum(job.state == PENDING for job in jobs)
    note = "its launcher is gone; the same command again goes on with it" if launcher_gone else ""
    return SweepView(
        told["name"], top, tuple(jobs), ended=stopped and not running,
        eta_s=_whole(jobs, 0 if stopped else pending, told["n_jobs"]), note=note,
    )  # fmt: skip


def _from_runs(top: Path) -> SweepView:
    folders = _run_folders(top)
    if not folders:
        inside = sorted(str(path.parent) for path in top.glob("*/sweep.json"))
        which = f"; there are some in {', '.join(inside[:3])}" if inside else ""
        raise UserError(f"runs={top}: no sweep in it (no sweep.json, and no run folder){which}")
    labels = short_labels([_overrides(folder) for folder in folders])
    jobs = []
    for place, (folder, label) in enumerate(zip(folders, labels, strict=True)):
        state, note, took = _of_run(folder)
        number = int(folder.name) if folder.name.isdigit() and folder != top else place
        jobs.append(_job(number, folder, label or folder.name, state, note, took))
    # Nothing tells how many jobs are still to come, so neither does the estimate.
    return SweepView(
        top.resolve().name, top, tuple(jobs), ended=all(job.state != RUNNING for job in jobs), eta_s=_whole(jobs, 0, 1)
    )


def _run_folders(top: Path) -> list[Path]:
    """Folders of runs, ``top`` itself or below it, in natural order."""
    found = []
    for name, inside, files in os.walk(top):
        folder = Path(name)
        if "run.json" in files or ("metrics.jsonl" in files and ".hydra" in inside):
            found.append(folder)
            inside.clear()
        elif len(folder.relative_to(top).parts) >= _DEPTH:
            inside.clear()
        inside[:] = [d for d in inside if d not in _NO_RUNS_INSIDE]
    return sorted(found, key=lambda path: [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in path.parts])


def short_labels(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Of each job the overrides that not all jobs have, those first that tell most jobs apart.

    Keys are cut to their last part where that is clear.
    """
    common = set.intersection(*(set(own) for own in overrides)) if len(overrides) > 1 else set()
    pairs = [[text.partition("=")[::2] for text in own if text not in common] for own in overrides]
    values: dict[str, set[str]] = {}
    for key, value in (pair for own in pairs for pair in own):
        values.setdefault(key, set()).add(value)
    last = {key: key.lstrip("+~").rsplit(".", 1)[-1] for key in values}
    taken = Counter(last.values())
    words = {key: name if taken[name] == 1 else key for key, name in last.items()}
    # Where a label is too long for the terminal, its end is cut off.
    ordered = (sorted(own, key=lambda pair: -len(values[pair[0]])) for own in pairs)
    return [" ".join(f"{words[key]}={value}" for key, value in own) for own in ordered]


# ---- one job -----------------------------------------------------------------------------------------------------


def _job(number: int, folder: Path, label: str, state: str, note: str, took_s: float | None) -> JobView:
    if state == PENDING:
        return JobView(number, folder, label, state, note=note)
    rl_steps, budget = _lengths(folder)
    rows = read_tail(folder / "metrics.jsonl")
    step, tokens = _last(rows, _STEP), _last(rows, _TOKENS)
    shares = [step / rl_steps] if step is not None and rl_steps else []
    shares += [tokens / budget] if tokens is not None and budget else []
    # A budget ends the training with the step that reaches it.
    progress = 1.0 if state in DONE else min(1.0, max(shares)) if shares else None
    pace = [row[_STEP_S] for row in rows if _is_number(row.get(_STEP_S))][-_PACE_ROWS:]
    step_s = statistics.median(pace) if pace else None
    eta_s = None
    if state == RUNNING and step_s is not None and step is not None:
        eta_s = _left(rows, step, tokens, rl_steps, budget, step_s)
    ratio = next(((name, value) for name in _RATIOS if (value := _last(rows, name)) is not None), None)
    return JobView(
        number, folder, label, state, None if step is None else int(step), rl_steps, progress,
        _last(rows, "reward/mean"), _last(rows, "reward/accuracy"), ratio, step_s, took_s, eta_s, note,
    )  # fmt: skip


def _left(
    rows: Sequence[Mapping[str, Any]], step: float, tokens: float | None, rl_steps: int | None, budget: int | None,
    step_s: float,
) -> float | None:  # fmt: skip
    """Seconds until ``rl_steps`` or the token budget is reached, whichever comes first."""
    steps_left = [max(0.0, rl_steps - step)] if rl_steps else []
    if budget and tokens is not None:
        known = [(row[_STEP], row[_TOKENS]) for row in rows if _is_number(row.get(_STEP)) and _TOKENS in row]
        (first, few), (last, many) = known[-_PACE_ROWS:][0], known[-1]
        a_step = (many - few) / (last - first) if last > first else tokens / max(1.0, step)
        if a_step > 0:
            steps_left.append(max(0.0, math.ceil((budget - tokens) / a_step)))
    return min(steps_left) * step_s if steps_left else None


def _of_run(folder: Path) -> tuple[str, str, float | None]:
    """State, note and seconds at work of a run that no ``sweep.json`` speaks of."""
    record = read_record(folder)
    if record is None:  # a run of an older version
        if (folder / "results.json").exists():
            return COMPLETED, "", None
        silent = _silence(folder)
        return (UNKNOWN if silent else RUNNING), silent, None
    last, state, note = record["attempts"][-1], state_of(record), record["error"] or ""
    if state == RUNNING and is_alive(last) is None:
        note = _silence(folder)
    return state, note, _seconds(last["started"], last["ended"])


def _still_running(folder: Path, host: str, pid: int, log: Path) -> tuple[str, str]:
    """State and note of a job that ``sweep.json`` calls running; its launcher may be late, or gone."""
    record = read_record(folder)
    attempt = {"host": host, "pid": pid}
    if record is not None and record["attempts"][-1]["pid"] == pid:
        attempt = record["attempts"][-1]  # tells the process from a later one of the same number
    there = is_alive(attempt)
    if there is None:
        return RUNNING, _silence(folder, log)
    if there:
        return RUNNING, ""
    # What the run wrote itself before it ended, else it was killed.
    return (KILLED if record is None or attempt is not record["attempts"][-1] else state_of(record)), ""


def _silence(folder: Path, *more: Path) -> str:
    """``no sign of life for 12 min`` where none of the run's files has changed for long, else an empty text."""
    files = (folder / "metrics.jsonl", folder / "run.json", folder / ".hydra" / "config.yaml", *more)
    changed = [path.stat().st_mtime for path in files if path.exists()]
    age = time.time() - max(changed) if changed else 0.0
    return f"no sign of life for {duration(age)}" if age >= SILENT_AFTER_S else ""


# ---- time left ---------------------------------------------------------------------------------------------------


def _whole(jobs: Sequence[JobView], pending: int, n_jobs: int) -> float | None:
    """Seconds until all jobs have ended, if the pending ones start on the first of ``n_jobs`` places that is free.

    A job that has not begun is taken to need what those that completed needed on average, or else what the running
    ones are on the way to. None where nothing is known of a job, or where there is nothing to wait for.
    """
    running = [job for job in jobs if job.state == RUNNING]
    if not running and not pending:
        return None
    took = [job.took_s for job in jobs if job.state == COMPLETED and job.took_s is not None]
    took = took or [job.took_s + job.eta_s for job in running if job.took_s is not None and job.eta_s is not None]
    usual = math.fsum(took) / len(took) if took else None
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
    return max(ends)


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


def _seconds(started: str | None, ended: str | None) -> float | None:
    if started is None:
        return None
    end = datetime.now(UTC) if ended is None else datetime.fromisoformat(ended)
    return max(0.0, (end - datetime.fromisoformat(started)).total_seconds())


# ---- files -------------------------------------------------------------------------------------------------------


def read_tail(path: Path) -> list[dict[str, Any]]:
    """The last rows of a ``metrics.jsonl``, oldest first; a torn last line is left out, a missing file has none.

    More is read only where the end holds no finished step, as after a long evaluation.
    """
    size = _TAIL_BYTES
    while True:
        try:
            with path.open("rb") as file:
                length = file.seek(0, os.SEEK_END)
                file.seek(max(0, length - size))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        # The first piece is whole only at the beginning of the file; what follows the last line break is torn.
        rows = [row for line in lines[0 if size >= length else 1 : -1] if (row := _row(line)) is not None]
        if size >= min(length, _TAIL_LIMIT) or any(_STEP_S in row for row in rows):
            return rows
        size *= 4


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row; None for what is no JSON object (a disk that filled up, a file written at this moment)."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if _is_number(row.get(name))), None)


def _lengths(folder: Path) -> tuple[int | None, int | None]:
    """``rl_steps`` and ``token_budget`` of the job's config; None where it has none."""
    try:
        text = (folder / ".hydra" / "config.yaml").read_text()
    except FileNotFoundError:
        return None, None
    # Two lines of a long file: parsing all of it for each job at each look would take longer than everything else.
    found = {key: yaml.safe_load(value) for key, value in re.findall(r"^(rl_steps|token_budget): (.*)$", text, re.M)}
    steps, budget = (v if isinstance(v, int) else None for v in (found.get("rl_steps"), found.get("token_budget")))
    return steps, budget


def _overrides(folder: Path) -> list[str]:
    record = read_record(folder)
    if record is not None:
        return list(record["overrides"])
    try:
        return [str(text) for text in yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()) or []]
    except FileNotFoundError:
        return []


def _read_told(path: Path) -> dict[str, Any] | None:
    """``sweep.json``, which is always moved into its place whole; None if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error}); the same command again writes a new one") from error
