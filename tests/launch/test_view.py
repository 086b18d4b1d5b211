"""A sweep as its files tell it: states, progress, time left; drawn for narrow and wide terminals, and followed live."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from core_torl.config.errors import UserError
from core_torl.launch.record import birth
from core_torl.launch.view import LiveView, chosen, exit_code, render, summary
from core_torl.launch.view_state import JobView, SweepView, duration, newest_sweep, read_sweep, read_tail, short_labels

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
    overrides: list[str] | None = None,
) -> None:  # fmt: skip
    (folder / ".hydra").mkdir(parents=True)
    nested = "callbacks:\n  rl_steps: 7\n"  # a key of the same name further down is another key
    limit = "null" if budget is None else budget
    (folder / ".hydra" / "config.yaml").write_text(f"{nested}rl_steps: {rl_steps}\ntoken_budget: {limit}\n")
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


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Completed in 40 s, failed, two running with 10 of 20 steps (20 s left), two pending; two places."""
    top = tmp_path / "smoke"
    for number, rows in enumerate((steps(20), steps(3), steps(10), steps(10))):
        write_run(top / str(number), rows)
    states = ("completed", "failed", "running", "running", "pending", "pending")
    return write_sweep(top, [job(number, state) for number, state in enumerate(states)])


def printed(view: SweepView, width: int, rows: int | None = None) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(render(view, rows))
    return out.getvalue().splitlines()


# ---- what the files say ------------------------------------------------------------------------------------------


def test_a_sweep_with_jobs_in_all_stages(sweep: Path):
    view = read_sweep(sweep)
    assert [one.state for one in view.jobs] == [*("completed", "failed", "running", "running", "pending", "pending")]
    assert [one.label for one in view.jobs] == [f"seed={n}" for n in range(6)], "what all jobs share is left out"
    running = view.jobs[2]
    assert (running.step, running.rl_steps, running.progress, running.step_s) == (10, 20, 0.5, 2.0)
    assert (running.reward, running.accuracy, running.ratio) == (0.1, 0.05, ("core/trigger_rate", 0.25))
    assert running.eta_s == pytest.approx(20)
    assert view.jobs[1].note == f"see {sweep / '1' / 'stdout.log'}" and view.jobs[1].eta_s is None
    # Both places are free in 20 s, and a job takes 40 s, as the completed one did.
    assert view.eta_s == pytest.approx(60, abs=2)
    assert not view.ended and exit_code(view) == 1
    assert summary(view) == "smoke: 1 of 6 done, 1 failed, 2 running, 2 pending, ETA 60 s"


def test_pending_jobs_share_the_places(sweep: Path):
    told = json.loads((sweep / "sweep.json").read_text())
    assert read_sweep(write_sweep(sweep, told["jobs"], n_jobs=4)).eta_s == pytest.approx(40, abs=2)  # 2 free at once
    one = [told["jobs"][i] for i in (0, 2, 4, 5)]
    assert read_sweep(write_sweep(sweep, one, n_jobs=1)).eta_s == pytest.approx(20 + 2 * 40, abs=2)


def test_nothing_is_said_before_the_first_step(tmp_path: Path):
    top = tmp_path / "smoke"
    write_run(top / "0", [{"train/rl_step": 0, "eval/gap/greedy/accuracy": 0.1}])
    view = read_sweep(write_sweep(top, [job(0, "running"), job(1, "pending")]))
    assert view.eta_s is None and view.jobs[0].eta_s is None and "ETA" not in summary(view)
    write_run(top / "1")
    jobs = [job(0, "running"), job(1, "running")]
    (top / "0" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps(10)))
    # Now one has a pace of its own: 40 s so far and 20 s to go; the other, 40 s old as well, is taken to need as much.
    assert read_sweep(write_sweep(top, jobs)).eta_s == pytest.approx(20, abs=2)


def test_a_token_budget_ends_a_run_before_its_steps(tmp_path: Path):
    write_run(tmp_path / "0", steps(10, tokens=100), rl_steps=1000, budget=1250)
    record(tmp_path / "0", "running")
    one = read_sweep(tmp_path).jobs[0]
    assert one.progress == pytest.approx(1000 / 1250)
    assert one.eta_s == pytest.approx(3 * 2.0), "250 tokens at 100 a step are three steps"
    assert "10/1000 80%" in "\n".join(printed(read_sweep(tmp_path), 80))


@pytest.mark.parametrize(
    ("own_word", "state"), [("running", "killed"), ("completed", "completed"), ("failed", "failed"), (None, "killed")]
)
def test_a_running_job_without_a_process_was_killed_unless_it_says_otherwise(tmp_path: Path, own_word, state: str):
    gone = dead_pid()
    write_run(tmp_path / "0", steps(5))
    if own_word is not None:
        record(tmp_path / "0", own_word, gone)
    view = read_sweep(write_sweep(tmp_path, [job(0, "running", pid=gone)]))
    assert view.jobs[0].state == state


def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path):
    write_run(tmp_path / "0", steps(5))
    record(tmp_path / "0", "running")
    sweep = write_sweep(tmp_path, [job(0, "running")])
    assert read_sweep(sweep).jobs[0].state == "running"
    said = json.loads((tmp_path / "0" / "run.json").read_text())
    said["attempts"][-1]["birth"] = "another boot:1"
    (tmp_path / "0" / "run.json").write_text(json.dumps(said))
    assert read_sweep(sweep).jobs[0].state == "killed"


def test_a_sweep_whose_launcher_is_gone_starts_nothing_more(sweep: Path):
    told = json.loads((sweep / "sweep.json").read_text())
    view = read_sweep(write_sweep(sweep, told["jobs"], launcher_pid=dead_pid()))
    assert not view.ended, "its jobs go on"
    assert view.eta_s == pytest.approx(20), "pending jobs are not waited for"
    assert "launcher is gone" in summary(view)
    view = read_sweep(write_sweep(sweep, [told["jobs"][0], told["jobs"][5]], launcher_pid=dead_pid()))
    assert view.ended and view.eta_s is None and exit_code(view) == 1


def test_a_sweep_is_not_over_between_two_jobs(sweep: Path):
    """A launcher starts the next job a moment later, and a sweeper may still think of further ones."""
    told = json.loads((sweep / "sweep.json").read_text())
    view = read_sweep(write_sweep(sweep, told["jobs"][:1]))
    assert not view.ended and view.eta_s is None
    assert read_sweep(write_sweep(sweep, told["jobs"][:1], state="completed")).ended


def test_another_machine_is_trusted_until_it_falls_silent(tmp_path: Path):
    write_run(tmp_path / "0", steps(5))
    sweep = write_sweep(tmp_path, [job(0, "running", pid=dead_pid())], host=ELSEWHERE)
    view = read_sweep(sweep)
    assert (view.jobs[0].state, view.jobs[0].note, view.ended) == ("running", "", False)
    for path in (tmp_path / "0").rglob("*"):
        os.utime(path, (time.time() - 720,) * 2)
    assert read_sweep(sweep).jobs[0].note == "no sign of life for 12 min"
    (tmp_path / "0" / "stdout.log").write_text("still loading\n")
    assert read_sweep(sweep).jobs[0].note == ""


def test_run_folders_stand_for_a_sweep_without_sweep_json(tmp_path: Path):
    for number in (0, 1, 2, 10):
        write_run(
            tmp_path / str(number), steps(10, ratio="tool/code_ratio"), overrides=[f"seed={number}", "group_size=4"]
        )
    record(tmp_path / "1", "running", overrides=["variant.lr=0.1", "group_size=4"])
    record(tmp_path / "2", "running", dead_pid(), overrides=["variant.lr=0.2", "group_size=4"])
    record(tmp_path / "10", "failed", error="RuntimeError: out of memory", overrides=["group_size=4"])
    (tmp_path / "0" / "results.json").write_text("{}")
    (tmp_path / "0" / "wandb").mkdir()
    view = read_sweep(tmp_path)
    assert [one.number for one in view.jobs] == [0, 1, 2, 10]
    assert [one.state for one in view.jobs] == ["completed", "running", "killed", "failed"]
    assert [one.label for one in view.jobs] == ["seed=0", "lr=0.1", "lr=0.2", "10"]
    assert view.jobs[3].note == "RuntimeError: out of memory" and view.jobs[1].ratio == ("tool/code_ratio", 0.25)
    assert view.name == tmp_path.name and view.eta_s == pytest.approx(20) and not view.ended


def test_an_old_run_that_says_nothing_is_unknown_once_it_is_silent(tmp_path: Path):
    write_run(tmp_path / "0", steps(3))
    assert read_sweep(tmp_path).jobs[0].state == "running"
    for path in (tmp_path / "0").rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)
    view = read_sweep(tmp_path)
    assert view.jobs[0].state == "unknown" and view.ended and exit_code(view) == 1
    assert view.jobs[0].note == "no sign of life for 1 h 00 min"


def test_labels_are_as_short_as_is_clear():
    assert short_labels([["a.lr=1", "b.lr=2", "x=0", "seed=0"], ["a.lr=1", "b.lr=3", "x=0", "seed=0"]]) == [
        "lr=2", "lr=3",
    ]  # fmt: skip
    assert short_labels([["a.lr=1", "b.lr=2"], ["a.lr=2", "b.lr=1"]]) == ["a.lr=1 b.lr=2", "a.lr=2 b.lr=1"]
    assert short_labels([["s=0", "e=a"], ["s=1", "e=a"], ["s=0", "e=b"], ["s=0", "e=c"]])[3] == "e=c s=0"
    assert short_labels([["seed=0"]]) == ["seed=0"] and short_labels([]) == []


def test_only_the_end_of_a_long_file_is_read_and_torn_lines_are_left_out(tmp_path: Path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    filler = {f"eval/{i}": 0.123456789 for i in range(60)}
    path.write_text("".join(json.dumps(row | filler) + "\n" for row in steps(1000)) + '{"train/rl_step": 1001, "rew')
    rows = read_tail(path)
    assert rows[-1]["train/rl_step"] == 1000 and 10 < len(rows) < 100
    # An evaluation at the end that is longer than the tail hides no step.
    with path.open("a") as file:
        file.write("\n" + json.dumps({"train/rl_step": 1001, "eval/x": "e" * 100_000}) + "\n")
    assert any(row.get("time/step_s") == 2.0 for row in read_tail(path))
    path.write_text('{"train/rl_step": 1}\n\x00\x00\n{"train/rl_step": 2}\n')
    assert [row["train/rl_step"] for row in read_tail(path)] == [1, 2]
    assert read_tail(tmp_path / "none") == []


def test_a_value_that_is_no_number_is_not_shown(tmp_path: Path):
    write_run(tmp_path / "0", [steps(1)[0], steps(2)[1] | {"reward/mean": float("nan")}])
    record(tmp_path / "0", "running")
    assert read_sweep(tmp_path).jobs[0].reward == 0.01


def test_the_newest_sweep(tmp_path: Path):
    with pytest.raises(UserError, match=r"no sweep below .*runs=\.\.\."):
        newest_sweep(tmp_path)
    for number, name in enumerate(("old", "sweeps/new", "sweeps/empty")):
        folder = tmp_path / name
        if number < 2:
            write_run(folder / "0", steps(1))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "multirun.yaml").write_text("")
        os.utime(folder / "multirun.yaml", (1000 + number,) * 2)
    assert newest_sweep(tmp_path) == tmp_path / "sweeps/new"


def test_mistakes_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"runs=.*nope: no such folder"):
        read_sweep(tmp_path / "nope")
    write_sweep(tmp_path / "inside", [])
    with pytest.raises(UserError, match=r"no sweep in it .*; there are some in .*inside"):
        read_sweep(tmp_path)
    (tmp_path / "inside" / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json: no JSON"):
        read_sweep(tmp_path / "inside")


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

    monkeypatch.setattr("core_torl.launch.view.time", SimpleNamespace(sleep=pause))
    assert front_door("watch", f"runs={sweep}", "every_s=7") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("smoke: 1 of 2 done, 1 running") and lines[1] == "smoke: 2 of 2 done"
    assert pauses == [7.0] * 3
    write_sweep(sweep, [jobs[0], job(1, "timeout")], state="failed")
    assert front_door("watch", f"runs={sweep}") == 1


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


def wait_for(condition, seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not come"
        time.sleep(0.01)
