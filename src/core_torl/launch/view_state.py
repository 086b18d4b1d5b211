"""What the files of a sweep say about it at this moment: which job does what, how far it is, and when all will be done.

Nothing here talks to a process: the subprocess launcher keeps ``sweep.json``, every run keeps ``run.json`` and
``metrics.jsonl``. So a sweep can be watched from another terminal or another machine, and on launchers that write no
``sweep.json`` (joblib, submitit), where the run folders that there are stand for the sweep.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.launch.record import is_alive, read_record, state_of
from core_torl.launch.view_files import changed, jobs_told, overrides, read_told
from core_torl.launch.view_jobs import (
    BAD,
    COMPLETED,
    DONE,
    KILLED,
    PENDING,
    RUNNING,
    UNKNOWN,
    JobView,
    duration,
    job_view,
    seconds,
)
from core_torl.launch.view_times import whole, with_etas

SILENT_AFTER_S = 300.0  # a job of which nothing is heard for so long is said to be silent
QUIET_S = (
    10.0  # without sweep.json: so long nothing may happen before it is thought to be over, and not between two jobs
)
_NO_RUNS_INSIDE = {".hydra", "wandb", "checkpoints", "policy"}
_DEPTH = 3  # how many folders below the sweep's a run may lie


@dataclass(frozen=True)
class SweepView:
    """A sweep at one moment. ``eta_s`` is None until a job's first step is known, ``note`` is about the whole of it.

    ``ended`` is true if nothing of it runs and nothing of it will, so that there is nothing left to wait for.
    ``to_come`` is how many jobs it is known to have besides ``jobs``, which have no folder yet.
    """

    name: str
    folder: Path
    jobs: tuple[JobView, ...]
    ended: bool
    eta_s: float | None = None
    note: str = ""
    to_come: int = 0

    @property
    def own(self) -> tuple[JobView, ...]:
        """The jobs of the command that ran last, without those that only former commands in this folder had."""
        return tuple(job for job in self.jobs if not job.former)

    def count(self, *states: str, former: bool = False) -> int:
        """How many jobs of the last command (or of ``former`` ones) are in one of these states."""
        return sum(job.state in states for job in self.jobs if job.former == former)


# ---- the sweep ---------------------------------------------------------------------------------------------------


def read_sweep(folder: str | os.PathLike[str]) -> SweepView:
    """What is known of the sweep (or the single run) in ``folder``. UserError: no such folder, or no sweep in it."""
    top = Path(folder)
    if not top.is_dir():
        raise UserError(f"runs={folder}: no such folder")
    told = read_told(top / "sweep.json")
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
    begun = datetime.fromisoformat(told["started"])
    jobs = []
    for job, label in zip(told["jobs"], labels, strict=True):
        own = top / job["folder"]
        state, note = job["state"], ""
        if state == RUNNING and job["pid"] is not None:
            state, note = _still_running(own, told["host"], job["pid"], own / job["log"])
        if state in BAD:
            note = f"see {own / job['log']}"
        took = seconds(job["started"], job["ended"])
        # The launcher keeps rows of former commands, so that a smaller one hides none of their jobs.
        former = job["started"] is not None and datetime.fromisoformat(job["started"]) < begun
        jobs.append(job_view(job["number"], own, label, state, note, took, former))
    jobs = with_etas(jobs)
    launcher = {"host": told["host"], "pid": told["launcher_pid"], "birth": told.get("launcher_birth")}
    launcher_gone = told["state"] == RUNNING and is_alive(launcher) is False
    stopped = told["state"] != RUNNING or launcher_gone
    running = [job for job in jobs if job.state == RUNNING]
    pending = sum(job.state == PENDING for job in jobs)
    note = "its launcher is gone; the same command again goes on with it" if launcher_gone else ""
    return SweepView(
        told["name"], top, tuple(jobs), ended=stopped and not running,
        eta_s=whole(jobs, 0 if stopped else pending, told["n_jobs"]), note=note,
    )  # fmt: skip


def _from_runs(top: Path) -> SweepView:
    folders = _run_folders(top)
    if not folders:
        inside = sorted(str(path.parent) for path in top.glob("*/sweep.json"))
        which = f"; there are some in {', '.join(inside[:3])}" if inside else ""
        raise UserError(f"runs={top}: no sweep in it (no sweep.json, and no run folder){which}")
    labels = short_labels([overrides(folder) for folder in folders])
    jobs = []
    for place, (folder, label) in enumerate(zip(folders, labels, strict=True)):
        state, note, took = _of_run(folder)
        number = int(folder.name) if folder.name.isdigit() and folder != top else place
        jobs.append(job_view(number, folder, label or folder.name, state, note, took))
    jobs = with_etas(jobs)
    running = sum(job.state == RUNNING for job in jobs)
    told = jobs_told(top / "multirun.yaml")
    to_come = max(0, (told or 0) - len(jobs))
    ended = not running and (folders == [top] or _all_begun(top, jobs, told) or _quiet(top, folders))
    note = f"nothing has happened for {QUIET_S:.0f} s; what is pending may still come" if ended and to_come else ""
    # Nothing tells how many jobs may run at a time: as many as do now.
    eta_s = whole(jobs, 0 if ended else to_come, max(1, running))
    return SweepView(top.resolve().name, top, tuple(jobs), ended, eta_s, note, to_come)


def _all_begun(top: Path, jobs: Sequence[JobView], told: int | None) -> bool:
    """Whether as many jobs as ``told`` are done or were at work since the command was given. False if nobody knows."""
    if told is None:
        return False
    given = (top / "multirun.yaml").stat().st_mtime
    return sum(job.state in DONE or (changed(job.folder) or 0.0) >= given for job in jobs) >= told


def _quiet(top: Path, folders: Sequence[Path]) -> bool:
    """Whether no file has changed for ``QUIET_S`` seconds. Between two jobs, too, none is running, but not for long."""
    found = [changed(folder, top / "multirun.yaml", folder / "results.json") for folder in folders]
    return time.time() - max((when for when in found if when is not None), default=0.0) >= QUIET_S


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


# ---- the state of one job --------------------------------------------------------------------------------------------


def _of_run(folder: Path) -> tuple[str, str, float | None]:
    """State, note and seconds at work of a run that no ``sweep.json`` speaks of."""
    record = read_record(folder)
    if record is None:  # a run of an older version
        if (folder / "results.json").exists():
            return COMPLETED, "", None
        silent = silence(folder)
        return (UNKNOWN if silent else RUNNING), silent, None
    last, state, note = record["attempts"][-1], state_of(record), record["error"] or ""
    if state == RUNNING and is_alive(last) is None:
        note = silence(folder)
    return state, note, seconds(last["started"], last["ended"])


def _still_running(folder: Path, host: str, pid: int, log: Path) -> tuple[str, str]:
    """State and note of a job that ``sweep.json`` calls running; its launcher may be late, or gone."""
    record = read_record(folder)
    attempt = {"host": host, "pid": pid}
    if record is not None and record["attempts"][-1]["pid"] == pid:
        attempt = record["attempts"][-1]  # tells the process from a later one of the same number
    there = is_alive(attempt)
    if there is None:
        return RUNNING, silence(folder, log)
    if there:
        return RUNNING, ""
    # What the run wrote itself before it ended, else it was killed.
    return (KILLED if record is None or attempt is not record["attempts"][-1] else state_of(record)), ""


def silence(folder: Path, *more: Path) -> str:
    """``no sign of life for 12 min`` where none of the run's files, and none of ``more``, has changed for long.

    Else an empty text.
    """
    newest = changed(folder, *more)
    age = time.time() - newest if newest is not None else 0.0
    return f"no sign of life for {duration(age)}" if age >= SILENT_AFTER_S else ""
