"""Why a run has no results: it goes on, it was killed, it failed, it was stopped, or nobody has begun it.

A run folder keeps ``run.json``, the subprocess launcher keeps ``sweep.json`` above it. A kill leaves ``run.json`` at
"running", so the process is looked for on this host; of another host only what the file says is known. Where both are
missing (older runs, other launchers) a run without results is called unfinished, and nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.launch.record import is_alive

UNFINISHED = "unfinished"
NO_RESULTS = "no results.json"
_ENDED_BADLY = ("failed", "killed", "timeout", "interrupted")
_ENDED_WELL = ("completed", "skipped")


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file, {} where there is none. UserError for a file that is no JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no JSON ({error.msg}); move the folder away, or repeat the run") from error
    return found if isinstance(found, dict) else {}


def state_of(record: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[str, str]:
    """State and reason of a run without results, from its ``run.json`` and its job in ``sweep.json`` ({} if absent)."""
    said, told = record.get("state"), job.get("state")
    if said == "failed":
        return "failed", record.get("error") or "its run.json names no error"
    if said == "running":
        return _running(record, job)
    if said in _ENDED_BADLY:
        return str(said), NO_RESULTS
    if said in _ENDED_WELL:
        return UNFINISHED, f"it ended, and left {NO_RESULTS}"
    if told in _ENDED_WELL:
        return UNFINISHED, f"its job ended, and left {NO_RESULTS}"
    return (str(told), _of_job(job)) if told else (UNFINISHED, NO_RESULTS)


def _running(record: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[str, str]:
    last = (record.get("attempts") or [{}])[-1]
    there = is_alive(last) if "pid" in last else False
    if there is None:
        return "running", f"on {last.get('host')}, as its run.json says"
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


def outdated(results: Path, record: Mapping[str, Any]) -> bool:
    """Whether ``results.json`` is of an earlier attempt than the last one, which has not come to an end of its own."""
    last = (record.get("attempts") or [{}])[-1]
    if record.get("state") in (None, *_ENDED_WELL) or not last.get("started"):
        return False
    return results.stat().st_mtime < datetime.fromisoformat(last["started"]).timestamp()
