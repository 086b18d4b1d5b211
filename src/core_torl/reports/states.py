"""Why a run has no results: it goes on, it was killed, it failed, it was stopped, or nobody has begun it.

A run folder keeps ``run.json``, the subprocess launcher keeps ``sweep.json`` above it. A kill leaves ``run.json`` at
"running", so the process is looked for on this host; a run on another host counts as running only while its files
change. Where both are missing (older runs, other launchers) a run without results is called unfinished, and nothing is
guessed. Whether results are those of the last attempt is told by what both files say, not by the age of the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from core_torl.launch.record import is_alive
from core_torl.launch.view_state import silence

UNFINISHED = "unfinished"
NO_RESULTS = "no results.json"
_ENDED_BADLY = ("failed", "killed", "timeout", "interrupted")
_ENDED_WELL = ("completed", "skipped")


def read_json(path: Path, wrong: list[str]) -> dict[str, Any]:
    """The object in the file; {} where there is none, or where it holds no object, which ``wrong`` then says."""
    try:
        return parse_json(path.read_bytes(), path.name, wrong)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def parse_json(text: str | bytes, name: str, wrong: list[str]) -> dict[str, Any]:
    """The object in ``text``, the content of the file ``name``; {} where it holds none, which ``wrong`` then says."""
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        wrong.append(f"{name} is no JSON")
        return {}
    if not isinstance(found, dict):
        wrong.append(f"{name} is no JSON object")
        return {}
    return found


def state_of(record: Mapping[str, Any], job: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """State and reason of a run without results, from its ``run.json`` and its job in ``sweep.json`` ({} if absent)."""
    said, told = record.get("state"), job.get("state")
    if said == "failed":
        return "failed", record.get("error") or "its run.json names no error"
    if said == "running":
        return _running(record, job, folder)
    if said in _ENDED_BADLY:
        return str(said), NO_RESULTS
    if said in _ENDED_WELL:
        return UNFINISHED, f"it ended, and left {NO_RESULTS}"
    if told in _ENDED_WELL:
        return UNFINISHED, f"its job ended, and left {NO_RESULTS}"
    return (str(told), _of_job(job)) if told else (UNFINISHED, NO_RESULTS)


def _running(record: Mapping[str, Any], job: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    last = (record.get("attempts") or [{}])[-1]
    there = is_alive(last) if "pid" in last else False
    if there is None:
        said = f"on {last.get('host')}, as its run.json says"
        quiet = silence(folder, folder / "stdout.log")
        return (UNFINISHED, f"running {said}, but {quiet}") if quiet else ("running", said)
    if there:
        return "running", f"process {last['pid']}"
    if job.get("state") in _ENDED_BADLY:
        return str(job["state"]), _of_job(job)
    return "killed", f"process {last.get('pid')} is gone"


def _of_job(job: Mapping[str, Any]) -> str:
    """What ``sweep.json`` knows of a job beside its state."""
    if job["state"] == "pending":
        return f"not begun: {' '.join(job.get('overrides') or ['no overrides'])}"
    code = job.get("returncode")
    return NO_RESULTS if code is None else f"exit code {code}, {NO_RESULTS}"


def outdated(results: Mapping[str, Any], path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the results in ``path`` are those of an earlier attempt than the last one that ``record`` knows.

    Results say whose they are and by which attempt they were written. Older ones do not: the file's age is all there
    is to go by, unless the run came to an end of its own.
    """
    attempts = record.get("attempts") or []
    mark, number = _wrote(results)
    if not attempts:
        return False
    if mark is not None and record.get("identity") not in (None, mark):
        return True
    if number is not None:
        return number < len(attempts)
    started = attempts[-1].get("started")
    if not started or record.get("state") in (None, *_ENDED_WELL):
        return False
    return path.stat().st_mtime < datetime.fromisoformat(started).timestamp()


def _wrote(results: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Identity of the run that wrote the results, and the number of the attempt, from 1; None for what is not told."""
    made, cost = results.get("provenance") or {}, results.get("compute") or {}
    return made.get("identity"), cost.get("attempts")


def ended_well(record: Mapping[str, Any]) -> bool:
    """Whether ``run.json`` calls the run completed, which is said only once its results are written."""
    return record.get("state") in _ENDED_WELL


def whole(results: Mapping[str, Any]) -> bool:
    """Whether this is what a finished training leaves, and not an evaluation or a part of something."""
    run = results.get("run")
    return isinstance(results.get("after"), dict) and isinstance(run, dict) and isinstance(run.get("seed"), int)
