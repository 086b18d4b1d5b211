"""The report command in this process, and what a killed process leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core_torl.launch.record import birth


@pytest.fixture
def report(front_door, tmp_path: Path, capsys):
    """``report("runs=...")`` gives exit code, what was printed to either stream, and the output folder."""

    def run(*arguments: str) -> tuple[int, str, str, Path]:
        where = tmp_path / "report"
        code = front_door("report", f"output={where}", f"hydra.run.dir={tmp_path / 'hydra'}", *arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err, where

    return run


@pytest.fixture
def dead() -> dict[str, Any]:
    """What is recorded of a process that was killed."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    said = {"pid": child.pid, "birth": birth(child.pid)}
    child.kill()
    child.wait()
    return said
