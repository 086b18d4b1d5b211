"""Folders of sweeps as launchers and runs leave them, for the tests of the view."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from core_torl.launch.record import birth

HERE = socket.gethostname()
ELSEWHERE = "another-machine"


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def steps(
    count: int, seconds: float = 2.0, tokens: int = 100, ratio: str = "core/trigger_rate"
) -> list[dict[str, Any]]:
    return [
        {"train/rl_step": k, "train/sampled_tokens": tokens * k, "reward/mean": k / 100, "reward/accuracy": k / 200,
         ratio: 0.25, "time/step_s": seconds}
        for k in range(1, count + 1)
    ]  # fmt: skip


def write_run(
    folder: Path, rows: list[dict[str, Any]] | None = None, rl_steps: int = 20, budget: int | None = None,
    overrides: list[str] | None = None, every: int = 0,
) -> None:  # fmt: skip
    (folder / ".hydra").mkdir(parents=True)
    nested = "callbacks:\n  rl_steps: 7\n"  # a key of the same name further down is another key
    limit = "null" if budget is None else budget
    (folder / ".hydra" / "config.yaml").write_text(
        f"{nested}rl_steps: {rl_steps}\ntoken_budget: {limit}\nevaluate_every: {every}\n"
    )
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides or []))
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(folder: Path, state: str, pid: int | None = None, host: str = HERE, **more: Any) -> None:
    pid = os.getpid() if pid is None else pid
    attempt = {"started": ago(60), "ended": None if state == "running" else ago(10), "host": host, "pid": pid,
               "birth": birth(pid), "state": state}  # fmt: skip
    said = {"app": "train", "state": state, "value": None, "error": None, "identity": "ab", "overrides": [],
            "choices": {}, "attempts": [attempt], "provenance": {}} | more  # fmt: skip
    (folder / "run.json").write_text(json.dumps(said))


def job(number: int, state: str, **more: Any) -> dict[str, Any]:
    begun = state not in ("pending", "skipped")
    return {
        "number": number, "folder": str(number), "overrides": [f"seed={number}", "rl_steps=20"], "identity": f"{number}",
        "state": state, "pid": os.getpid() if state == "running" else None, "returncode": None,
        "started": ago(40) if begun else None, "ended": None if state in ("pending", "running") else ago(0),
        "gpus": [], "log": "stdout.log", "value": None,
    } | more  # fmt: skip


def write_sweep(folder: Path, jobs: list[dict[str, Any]], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    told = {"name": "smoke", "command": "core-torl-train -m", "config_name": "train", "started": ago(100),
            "ended": None, "state": "running", "launcher_pid": os.getpid(), "host": HERE, "n_jobs": 2, "jobs": jobs}  # fmt: skip
    aside = folder / "sweep.json.part"
    aside.write_text(json.dumps(told | more))
    aside.replace(folder / "sweep.json")
    return folder


def age(folder: Path, seconds: float) -> None:
    """Make all files in ``folder`` as old as that."""
    when = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (when, when))


def many_stages(top: Path) -> Path:
    """Completed in 40 s, failed, two running with 10 of 20 steps (20 s of 40 left), two pending; two places."""
    for number, rows in enumerate((steps(20), steps(3), steps(10), steps(10))):
        write_run(top / str(number), rows)
    states = ("completed", "failed", "running", "running", "pending", "pending")
    begun = {"running": {"started": ago(20)}}
    return write_sweep(top, [job(number, state, **begun.get(state, {})) for number, state in enumerate(states)])


def wait_for(condition, seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not come"
        time.sleep(0.01)
