"""ToRL from the command line to its results, with sandboxes that are killed or were never there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.sandbox]
SMALL = [
    "experiment=torl/world", "variant.tool_call_budget=2", "rl_steps=3", "prompts_per_step=3", "group_size=4",
    "evaluation.max_problems=3", "evaluation.samples=0", "data.train=200", "logger.mode=disabled",
]  # fmt: skip


@pytest.fixture(autouse=True)
def isolating():
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: `make bubblewrap`")


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "core_torl.train", *SMALL, *overrides, f"hydra.run.dir={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent)


def steps(folder: Path) -> list[dict[str, float]]:
    """Metrics by RL step, without those of the clock and of rounding.

    Which rows share a forward pass depends on when results come back, so log-probs differ in their last digits.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "rollout/tokens_per_s", "tool/latency", "policy/sampler_logprob_gap")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in rows if "reward/accuracy" in row
    ]  # fmt: skip


def sandboxes_of(pid: int) -> list[int]:
    """The bubblewrap processes below ``pid``."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            names[int(entry.name)] = stat.partition("(")[2].rpartition(")")[0]
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return [p for p in found if names.get(p) == "bwrap"]


def test_a_run_whose_workers_are_killed_is_the_run_of_workers_left_alone(tmp_path):
    """No answer is scored wrong, lost or even different because its worker died."""
    quiet = start(tmp_path / "quiet")
    assert quiet.wait(280) == 0, quiet.stderr.read()
    process, killed = start(tmp_path / "killed"), 0
    while process.poll() is None:
        for pid in sandboxes_of(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                continue
        time.sleep(6)
    assert process.returncode == 0, process.stderr.read()
    assert killed >= 2
    for one, other in zip(steps(tmp_path / "killed"), steps(tmp_path / "quiet"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    last = steps(tmp_path / "killed")[-1]
    assert last["tool/aborted_ratio"] == 0 and last["tool/calls_per_response"] > 0


def test_it_writes_answers_before_and_after(tmp_path):
    process = start(tmp_path / "run")
    assert process.wait(280) == 0, process.stderr.read()
    text = (tmp_path / "run" / "transcripts.md").read_text()
    assert text.count("\nBefore (") == text.count("\nAfter (") == 4 and "one_stage/greedy" in text
    # Where bubblewrap fails another way takes its place: a result must say which one it came from.
    assert json.loads((tmp_path / "run" / "results.json").read_text())["run"]["sandbox"]["plan"] == "bubblewrap"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/two_stage/greedy/code_ratio" in row for row in rows)


def test_a_sandbox_that_nobody_answers_for_stops_the_run_before_its_first_step(tmp_path):
    with socket.socket() as closed:  # a port of ours at which nothing listens
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    process = start(tmp_path / "run", "sandbox=sandbox_fusion", f"sandbox.url=http://127.0.0.1:{port}")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2, (out, err)
    lines = [line for line in err.splitlines() if line.startswith("core-torl:")]
    assert len(lines) == 1 and "sandbox.url" in lines[0] and str(port) in lines[0] and "docker run" in lines[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
