"""``sweep.json``: the jobs of a sweep and how each one stands, in the sweep's folder for whoever looks.

The launcher writes it whenever something changes; it never reads it, because what is done is known from the runs.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.launch.jobs import Job
from core_torl.launch.record import birth, now, write_json

NAME = "sweep.json"
LOCK = ".sweep.lock"


class Board:
    """The sweep's file, and the lock that keeps a second launcher out. UserError if one is at work.

    A sweeper may launch in several batches (Optuna does); the jobs of all of them stand here.
    """

    def __init__(self, sweep: Path, config_name: str, n_jobs: int) -> None:
        self.path = sweep / NAME
        self.jobs: list[Job] = []
        self._said: dict[str, Any] = {
            "name": sweep.name, "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "config_name": config_name, "started": now(), "ended": None, "state": "running",
            "launcher_pid": os.getpid(), "launcher_birth": birth(os.getpid()), "host": socket.gethostname(),
            "n_jobs": n_jobs,
        }  # fmt: skip
        sweep.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(sweep / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._lock, 64, 0).decode() or "unknown"
            os.close(self._lock)
            raise UserError(
                f"{sweep}: process {holder} is launching jobs in it; wait for it, stop it, or choose another "
                "hydra.sweep.dir"
            ) from error
        except OSError:  # a network file system without locks: nothing keeps a second launcher out
            pass
        else:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def add(self, jobs: Sequence[Job]) -> None:
        self.jobs += jobs
        self.write()

    def write(self, state: str = "running") -> None:
        """Write how all jobs stand; a state other than running closes the sweep."""
        self._said |= {"state": state, "ended": None if state == "running" else now()}
        write_json(self.path, self._said | {"jobs": [self._row(job) for job in self.jobs]})

    def close(self, state: str) -> None:
        """Write the last word and let go of the lock. May be called twice."""
        if self._lock >= 0:
            self.write(state)
            os.close(self._lock)
            self._lock = -1

    def _row(self, job: Job) -> dict[str, Any]:
        return {
            "number": job.number, "folder": os.path.relpath(job.folder, self.path.parent), "overrides": job.overrides,
            "identity": job.mark, "state": job.state, "pid": job.pid, "returncode": job.returncode,
            "started": job.started, "ended": job.ended, "gpus": job.gpus, "log": job.log.name, "value": job.value,
        }  # fmt: skip
