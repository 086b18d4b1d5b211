"""Sweeps of jobs that do next to nothing, started as a user would: a command of its own, in a process group."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

APP = Path(__file__).parent / "noop" / "app.py"


class Sweep:
    """``sweep("seed=0,1")`` runs the sweep and returns its exit code; ``start`` leaves it running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = ""

    def start(self, *overrides: str, launcher: str = "hydra.launcher.view=false") -> subprocess.Popen:
        command = [sys.executable, str(APP), "-m", *overrides, f"hydra.sweep.dir={self.folder}", launcher]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def __call__(self, *overrides: str, **options: str) -> int:
        process = self.start(*overrides, **options)
        self.out = process.communicate(timeout=120)[0]
        return process.returncode

    @property
    def board(self) -> dict[str, Any]:
        return json.loads((self.folder / "sweep.json").read_text())

    @property
    def states(self) -> dict[str, str]:
        """What each job overrides -> its state."""
        return {" ".join(j["overrides"]): j["state"] for j in self.board["jobs"]}

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "run.json").read_text())

    def values(self) -> dict[str, float]:
        return {path.parent.name: json.loads(path.read_text())["value"] for path in self.folder.glob("*/run.json")}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "sweep")


def processes_of(sweep: Sweep) -> list[str]:
    """Name and state of every process, zombies too, in a session that one of the sweep's jobs began."""
    jobs = {a["pid"] for path in sweep.folder.glob("*/run.json") for a in json.loads(path.read_text())["attempts"]}
    assert jobs, "no job has a record: nothing would be found"
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[3]) in jobs:
            found.append(f"{name}) {rest.split()[0]}")
    return found
