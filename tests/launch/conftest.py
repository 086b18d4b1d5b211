"""Sweeps of jobs that do next to nothing, started as a user would: a command of its own, in a process group."""

from __future__ import annotations

import json
import os
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


def processes_of(folder: Path) -> list[str]:
    """Command lines of all processes whose command names ``folder``, and of zombies that this process would leave."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in text and path.parent.name != str(os.getpid()):
            found.append(text)
    return found
