"""The view of a sweep: drawn for narrow and wide terminals, printed to logs, and followed live."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from core_torl.launch.view import LiveView, _Screen, chosen, render
from core_torl.launch.view_jobs import JobView, duration
from core_torl.launch.view_state import SweepView, read_sweep

from .view_folders import age, ago, job, many_stages, record, steps, wait_for, write_run, write_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return many_stages(tmp_path / "smoke")


def printed(view: SweepView, width: int, rows: int | None = None) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(render(view, rows))
    return out.getvalue().splitlines()


# ---- what people see ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 160])
def test_numbers_and_states_stand_whole_in_the_table(sweep: Path, width: int):
    told = json.loads((sweep / "sweep.json").read_text())
    long = [
        one | {"overrides": [f"seed={one['number']}", f"intervention={'x' * 90}{one['number']}"]}
        for one in told["jobs"]
    ]
    lines = printed(read_sweep(write_sweep(sweep, long)), width)
    assert max(map(len, lines)) <= width
    assert lines[0] == "smoke: 1 of 6 done, 1 failed, 2 running, 2 pending, ETA 60 s"
    row = lines[4].split()
    assert row[0] == "2" and row[-1] == "s" and row[-2] == "20"
    for text in ("running", "10/20", "0.100", "5.0%", "25%"):
        assert text in row
    assert ("2.00" in row) == (width == 160) and ("s/step" in lines[1]) == (width == 160)
    assert "".join(lines[8:]) == f"job 1 failed: see {sweep / '1' / 'stdout.log'}", "where to look is never cut off"


def test_where_lines_are_few_what_matters_is_shown():
    states = ["completed"] * 50 + ["failed"] + ["running"] * 2 + ["pending"] * 50
    jobs = [
        JobView(n, Path(str(n)), "", state, note="why" if state == "failed" else "") for n, state in enumerate(states)
    ]
    assert [one.number for one in chosen(jobs, 6)] == [48, 49, 50, 51, 52], "the failed one needs two lines"
    assert chosen(jobs, None) == jobs
    lines = printed(SweepView("s", Path("s"), tuple(jobs), ended=False), 80, rows=6)
    assert lines[-1] == "and 98 more jobs" and len(lines) == 9


@pytest.mark.parametrize("width", [80, 160])
def test_where_no_step_passes_the_phase_stands_in_its_place(tmp_path: Path, width: int):
    write_run(tmp_path / "0", steps(20))
    write_run(tmp_path / "1")
    lines = printed(read_sweep(write_sweep(tmp_path, [job(0, "running"), job(1, "running")])), width)
    rows = [line.split() for line in lines[2:4]]
    assert "evaluating" in rows[0] and "starting" in rows[1]
    assert ("running" in rows[0]) == (width == 160) and "2.00" not in rows[0]


def test_a_token_budget_that_is_nearer_than_the_steps_is_shown(tmp_path: Path):
    write_run(tmp_path / "0", steps(10, tokens=100), rl_steps=1000, budget=1250)
    record(tmp_path / "0", "running")
    assert "10/1000 80%" in "\n".join(printed(read_sweep(tmp_path), 80))


def test_jobs_of_one_number_or_one_folder_are_not_taken_for_each_other():
    """A former command may have had a job of the same number; of two equal jobs one takes the other's folder."""
    states = ("running", "completed", "completed")
    jobs = [JobView(n, Path("0"), "", state) for n, state in enumerate(states)]
    jobs.append(JobView(0, Path("old"), "", "killed", note="see old", former=True))
    assert [one.number for one in chosen(jobs, 2)] == [0, 2], "former ones come last, and two lines are two jobs"
    out = io.StringIO()
    screen = _Screen(Console(file=out, width=200))
    for state in ("running", "running", "failed"):
        jobs[0] = JobView(0, Path("0"), "", state, note="" if state == "running" else "see 0")
        screen.show(SweepView("s", Path("s"), tuple(jobs), ended=False))
    assert out.getvalue().splitlines() == [
        "s: 2 of 3 done, 1 running; of former commands: 1 killed",
        "s: 2 of 3 done, 1 failed; of former commands: 1 killed; job 0 failed: see 0",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (95, "2 min"), (720, "12 min"), (7500, "2 h 05 min"), (273600, "3 d 4 h")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


# ---- following a sweep -------------------------------------------------------------------------------------------


def test_the_launcher_s_view_prints_a_line_a_change_where_there_is_no_terminal(sweep: Path):
    out = io.StringIO()
    told = json.loads((sweep / "sweep.json").read_text())
    with LiveView(sweep, Console(file=out, width=40), every_s=0.02):
        wait_for(lambda: "2 running" in out.getvalue())
        with (sweep / "2" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(steps(11)[-1]) + "\n")  # a step is no change of state
        time.sleep(0.1)
        told["jobs"][2] |= {"state": "killed", "ended": ago(0)}
        write_sweep(sweep, told["jobs"])
    first, second = out.getvalue().splitlines()
    assert first.startswith("smoke: 1 of 6 done, 1 failed, 2 running, 2 pending, ETA") and "job 1 failed: see" in first
    assert second.startswith("smoke: 1 of 6 done, 1 failed, 1 killed, 1 running, 2 pending, ETA")
    assert f"job 2 killed: see {sweep / '2' / 'stdout.log'}" in second and "job 1" not in second


def test_the_launcher_s_view_on_a_terminal_is_drawn_in_place_and_leaves_it_as_it_was(sweep: Path):
    out = io.StringIO()
    with (
        pytest.raises(KeyboardInterrupt),
        LiveView(sweep, Console(file=out, force_terminal=True, width=100, height=30), every_s=0.02),
    ):
        wait_for(lambda: "10/20" in out.getvalue())
        raise KeyboardInterrupt
    text = out.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is back"
    assert "\x1b[2K" in text, "drawn in place"
    assert not [t for t in threading.enumerate() if t.name == "sweep view"]


def test_a_view_that_fails_does_not_reach_the_launcher(sweep: Path):
    out = io.StringIO()
    with LiveView(sweep, Console(file=out, force_terminal=True, width=200), every_s=0.02):
        (sweep / "sweep.json").write_text("{")
        wait_for(lambda: "The view of the sweep ended (UserError" in out.getvalue())
        finished = True
    assert finished and out.getvalue().count("\x1b[?25h") == 1


def test_a_view_of_a_sweep_that_never_began_says_nothing(tmp_path: Path):
    out = io.StringIO()
    with LiveView(tmp_path / "none", Console(file=out), every_s=0.01):
        time.sleep(0.05)
    assert out.getvalue() == ""


def test_the_command_shows_it_once_and_leaves_nothing_behind(sweep: Path, front_door, capsys, tmp_path, monkeypatch):
    where = tmp_path / "elsewhere"
    where.mkdir()
    monkeypatch.chdir(where)
    assert front_door("watch", f"runs={sweep}", "once=true") == 1
    printed = capsys.readouterr()
    assert "1 of 6 done" in printed.out and printed.err == ""
    for arguments, line in (
        ((f"runs={tmp_path}/nope",), f"core-torl: runs={tmp_path}/nope: no such folder\n"),
        (("every_s=0",), "core-torl: every_s=0.0: must be larger than 0\n"),
        (("runs=''",), "core-torl: runs='': a folder of a sweep, or null for the newest one below paths.root\n"),
    ):
        assert front_door("watch", *arguments) == 2
        assert capsys.readouterr() == ("", line)
    assert front_door("watch", f"paths.root={tmp_path}", "once=true") == 1, "the newest sweep"
    assert list(where.iterdir()) == []


def test_the_command_follows_until_all_have_ended(sweep: Path, front_door, capsys, monkeypatch):
    jobs = [job(number, "completed") for number in range(2)]
    write_sweep(sweep, [jobs[0], job(1, "running")])
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            write_sweep(sweep, jobs, state="completed")

    monkeypatch.setattr("core_torl.launch.view._asked_within", lambda seconds, asked: bool(pause(seconds)))
    assert front_door("watch", f"runs={sweep}", "every_s=7") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("smoke: 1 of 2 done, 1 running") and lines[1] == "smoke: 2 of 2 done"
    assert pauses == [7.0] * 3
    write_sweep(sweep, [jobs[0], job(1, "timeout")], state="failed")
    assert front_door("watch", f"runs={sweep}") == 1


def test_the_command_does_not_end_between_two_jobs_of_another_launcher(tmp_path: Path, front_door, capsys, monkeypatch):
    def finish(number: int) -> None:
        write_run(tmp_path / str(number), steps(5))
        record(tmp_path / str(number), "completed")

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            finish(1)
        elif len(pauses) == 4:  # and after a while nothing more comes
            age(tmp_path, 60)

    pauses: list[float] = []
    finish(0)
    monkeypatch.setattr("core_torl.launch.view._asked_within", lambda seconds, asked: bool(pause(seconds)))
    assert front_door("watch", f"runs={tmp_path}") == 0
    assert len(pauses) == 4
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["1 of 1 done", "2 of 2 done"]


@pytest.mark.slow
def test_ctrl_c_ends_the_view_and_not_the_sweep(sweep: Path, tmp_path: Path):
    before = (sweep / "sweep.json").read_bytes()
    root = Path(__file__).parents[2]
    watching = subprocess.Popen(
        [sys.executable, "-m", "core_torl.watch", f"runs={sweep}", "every_s=0.1"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root / "src")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stdout is not None and "1 of 6 done" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert (watching.returncode, err) == (130, "")
    assert (sweep / "sweep.json").read_bytes() == before


def test_a_look_needs_no_torch(tmp_path: Path):
    code = "import sys, core_torl.launch.view; print({'torch', 'pytorch_lightning', 'numpy', 'wandb'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr
