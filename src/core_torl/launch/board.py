"""``sweep.json``: the jobs of a sweep and how each one stands, in the sweep's folder for whoever looks.

The launcher writes it whenever something changes. What is done is known from the runs; of the file itself it takes over
only the rows of jobs that this command does not hold, so that a smaller command hides none of a greater one.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core_torl.launch.jobs import Job
from core_torl.launch.record import birth, now, write_json

NAME = "sweep.json"
log = logging.getLogger(__name__)


class Board:
    """The sweep's file. A sweeper may launch in several batches (Optuna does); the jobs of all of them stand here."""

    def __init__(self, sweep: Path, config_name: str, n_jobs: int) -> None:
        self.path = sweep / NAME
        self.jobs: list[Job] = []
        self._open = True
        self._before = _rows(self.path)
        self._said: dict[str, Any] = {
            "name": sweep.name, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "config_name": config_name, "started": now(), "ended": None, "state": "running",
            "launcher_pid": os.getpid(), "launcher_birth": birth(os.getpid()), "host": socket.gethostname(),
            "n_jobs": n_jobs,
        }  # fmt: skip

    def add(self, jobs: Sequence[Job]) -> None:
        """Take in a batch."""
        self.jobs += jobs
        self.write()

    def write(self, state: str = "running") -> None:
        """Write how all jobs stand; a state other than running closes the sweep. A disk that refuses costs no job."""
        self._said |= {"state": state, "ended": None if state == "running" else now()}
        marks = {job.mark for job in self.jobs}
        # Of former jobs those that are not here; a job that was pending then and is not asked for now is no job.
        former = [r for r in self._before if r["identity"] not in marks and r["state"] != "pending"]
        try:
            write_json(self.path, self._said | {"jobs": [*(self._row(job) for job in self.jobs), *former]})
        except OSError as error:
            log.warning(f"{self.path} could not be written ({error.strerror}); the jobs go on")

    def close(self, state: str) -> None:
        """Write the last word. May be called twice; a sweep that never had a job leaves the file as it was."""
        if self._open and self.jobs:
            self.write(state)
        self._open = False

    def _row(self, job: Job) -> dict[str, Any]:
        return {
            "number": job.number, "folder": os.path.relpath(job.folder, self.path.parent), "overrides": job.overrides,
            "identity": job.mark, "state": job.state, "pid": job.pid, "returncode": job.returncode,
            "started": job.started, "ended": job.ended, "gpus": job.gpus, "log": job.log.name, "value": job.value,
        }  # fmt: skip


def _rows(path: Path) -> list[dict[str, Any]]:
    """The jobs that the file names; [] if there is none, or it was torn."""
    try:
        found = json.loads(path.read_text()).get("jobs", [])
    except (OSError, ValueError, AttributeError):
        return []
    # What ran then does not run any more: its launcher is gone, or this one would not be here.
    return [row | ({"state": "killed", "pid": None} if row["state"] == "running" else {}) for row in found]
