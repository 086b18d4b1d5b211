"""A sweep as its files tell it: states, progress, labels; whose jobs they are, and whether it is over."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from core_torl.config.errors import UserError
from core_torl.launch.view import exit_code, summary
from core_torl.launch.view_files import jobs_told, read_tail
from core_torl.launch.view_state import QUIET_S, newest_sweep, read_sweep, short_labels

from .view_folders import ELSEWHERE, age, ago, dead_pid, job, many_stages, record, steps, write_run, write_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return many_stages(tmp_path / "smoke")


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
    # Now one has a pace of its own: 40 s so far, 20 s of steps to go, and the evaluation, which with the start-up took
    # 20 s at first; the other, 40 s old as well, is taken to need as much.
    assert read_sweep(write_sweep(top, jobs)).eta_s == pytest.approx(40, abs=2)


def test_a_token_budget_ends_a_run_before_its_steps(tmp_path: Path):
    write_run(tmp_path / "0", steps(10, tokens=100), rl_steps=1000, budget=1250)
    record(tmp_path / "0", "running")
    one = read_sweep(tmp_path).jobs[0]
    assert one.progress == pytest.approx(1000 / 1250)
    assert one.work is not None and one.work.steps_left_s == 3 * 2.0, "250 tokens at 100 a step are three steps"


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
    age(tmp_path / "0", 720)
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
    assert view.name == tmp_path.name and view.jobs[1].step_s == 2.0 and not view.ended


def test_an_old_run_that_says_nothing_is_unknown_once_it_is_silent(tmp_path: Path):
    write_run(tmp_path / "0", steps(3))
    assert read_sweep(tmp_path).jobs[0].state == "running"
    age(tmp_path / "0", 3600)
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
        os.utime(folder / "multirun.yaml", (1000 + number, 1000 + number))
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


# ---- evaluations -------------------------------------------------------------------------------------------------

EVALUATED = {"train/rl_step": 0, "eval/gap/greedy/accuracy": 0.1}


def test_after_the_last_step_the_evaluation_is_still_to_come(tmp_path: Path):
    """A job needs 100 s of steps and 300 s of evaluations, as the completed one did."""
    for number in range(2):
        write_run(tmp_path / str(number), steps(20, seconds=5.0))
    done = job(0, "completed", started=ago(700), ended=ago(300))
    sweep = write_sweep(tmp_path, [done, job(1, "running", started=ago(110))], started=ago(800))
    view = read_sweep(sweep)
    assert view.jobs[1].eta_s == view.eta_s == pytest.approx(400 - 110, abs=2)
    assert view.jobs[1].phase == "evaluating"


def test_a_job_that_was_resumed_has_its_former_steps_behind_it(tmp_path: Path):
    for number, count in enumerate((20, 18)):
        write_run(tmp_path / str(number), steps(count, seconds=20.0))
    done = job(0, "completed", started=ago(700), ended=ago(200))  # 400 s of steps, 100 s of evaluations
    view = read_sweep(write_sweep(tmp_path, [done, job(1, "running", started=ago(30))], started=ago(800)))
    assert view.jobs[1].eta_s == pytest.approx(500 - 360, abs=2)
    alone = read_sweep(write_sweep(tmp_path, [job(1, "running", started=ago(30))]))
    assert alone.jobs[0].eta_s == 2 * 20.0, "what its evaluation took is not known: only the steps are counted"


@pytest.mark.parametrize(("every", "evaluations"), [(0, 1), (5, 1 + 2), (20, 1)])
def test_without_a_completed_job_the_first_evaluation_tells_what_those_left_take(
    tmp_path: Path, every: int, evaluations: int
):
    """50 s until the first step, then 9 of 20 steps at 2 s; one evaluation in between is behind it, at 50 s as well."""
    rows = [EVALUATED, *steps(9)]
    if every == 5:
        rows.insert(6, EVALUATED | {"train/rl_step": 5})
    write_run(tmp_path / "0", rows, every=every)
    begun = 9 * 2 + 50 * (len(rows) - 9)
    view = read_sweep(write_sweep(tmp_path, [job(0, "running", started=ago(begun))]))
    assert view.jobs[0].eta_s == pytest.approx(11 * 2 + evaluations * 50, abs=2)
    assert view.eta_s == view.jobs[0].eta_s and view.jobs[0].phase == ""


@pytest.mark.parametrize(("budget", "rl_steps"), [(None, 10), (1000, 1000)])
def test_an_estimate_that_is_used_up_is_none(tmp_path: Path, budget: int | None, rl_steps: int):
    """Start-up and first evaluation took 50 s, the last row is as old as said: the last evaluation is under way."""
    write_run(tmp_path / "0", [EVALUATED, *steps(10)], rl_steps=rl_steps, budget=budget)
    for silent, eta in ((10, 40), (80, None)):
        age(tmp_path / "0", silent)
        view = read_sweep(write_sweep(tmp_path, [job(0, "running", started=ago(50 + 20 + silent))]))
        assert view.jobs[0].phase == "evaluating"
        assert view.jobs[0].eta_s == view.eta_s == (eta if eta is None else pytest.approx(eta, abs=2))


def test_a_job_that_takes_longer_than_the_completed_ones_has_no_estimate(tmp_path: Path):
    for number in range(2):
        write_run(tmp_path / str(number), steps(20))
    done = job(0, "completed", started=ago(90), ended=ago(50))
    age(tmp_path, 60)
    view = read_sweep(write_sweep(tmp_path, [done, job(1, "running", started=ago(95))]))
    assert view.jobs[1].eta_s is None and view.eta_s is None and "ETA" not in summary(view)


def test_a_job_is_starting_until_its_first_row(tmp_path: Path):
    write_run(tmp_path / "0")
    sweep = write_sweep(tmp_path, [job(0, "running")])
    assert read_sweep(sweep).jobs[0].phase == "starting"
    (tmp_path / "0" / "metrics.jsonl").write_text(json.dumps(EVALUATED) + "\n")
    assert read_sweep(sweep).jobs[0].phase == ""
    assert read_sweep(write_sweep(tmp_path, [job(0, "failed")])).jobs[0].phase == ""


# ---- a sweep without sweep.json is over --------------------------------------------------------------------------


def multirun(
    folder: Path, *task: str, sweeper: str = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", **params
):
    """What Hydra's sweeper leaves."""
    said = {"hydra": {"sweeper": {"_target_": sweeper, "params": params or None}, "overrides": {"task": task}}}
    (folder / "multirun.yaml").write_text(json.dumps(said))


def finished_run(folder: Path) -> None:
    write_run(folder, steps(5))
    record(folder, "completed")


def test_between_two_jobs_it_is_not_over(tmp_path: Path):
    finished_run(tmp_path / "0")
    assert not read_sweep(tmp_path).ended, "the next one may begin at any moment"
    age(tmp_path, QUIET_S - 2)
    assert not read_sweep(tmp_path).ended
    age(tmp_path, QUIET_S + 1)
    assert read_sweep(tmp_path).ended
    record(tmp_path / "0", "running")
    age(tmp_path, QUIET_S + 1)
    assert not read_sweep(tmp_path).ended, "a job that runs and is silent is at work"
    record(tmp_path / "0", "completed")
    assert read_sweep(tmp_path / "0").ended, "a single run has no next one"


def test_it_is_over_at_once_when_all_that_was_asked_for_has_ended(tmp_path: Path):
    multirun(tmp_path, "seed=0,1", "group_size=4")
    finished_run(tmp_path / "0")
    view = read_sweep(tmp_path)
    assert (view.to_come, view.ended, exit_code(view)) == (1, False, 0)
    assert summary(view).startswith(f"{tmp_path.name}: 1 of 2 done, 1 pending, ETA 50 s")
    age(tmp_path, QUIET_S + 1)
    view = read_sweep(tmp_path)
    assert view.ended and exit_code(view) == 1 and "what is pending may still come" in summary(view)
    finished_run(tmp_path / "1")
    view = read_sweep(tmp_path)
    assert (view.to_come, view.ended, exit_code(view)) == (0, True, 0) and view.note == ""


def test_a_job_that_a_former_command_left_is_still_to_run(tmp_path: Path):
    for number in range(2):
        write_run(tmp_path / str(number), steps(5))
        record(tmp_path / str(number), "interrupted")
    age(tmp_path, 100)
    multirun(tmp_path, "seed=0,1")
    assert not read_sweep(tmp_path).ended, "the same command has just been given again"
    for number in range(2):
        assert not read_sweep(tmp_path).ended
        record(tmp_path / str(number), "completed")
    assert read_sweep(tmp_path).ended


def test_the_number_of_jobs_that_are_asked_for(tmp_path: Path):
    path = tmp_path / "multirun.yaml"
    assert jobs_told(path) is None

    def told(*task: str, **more: Any) -> int | None:
        multirun(tmp_path, *task, **more)
        os.utime(path, ns=(0, len(str((task, more)))))  # another file: not the one that was read before
        return jobs_told(path)

    assert told("seed=0,1,2", "variant.lr=choice(1e-3,1e-4)", "x=range(0,4)", "+name=a", "~other") == 3 * 2 * 4
    assert told("seed=0,1,2", "seed=5") == 1, "the later of two values for a key counts"
    assert told("a=1", seed="0,1", lr="1,2,3") == 6
    assert told("experiment=glob(*)") is None and told("seed=0,1", sweeper="optuna.OptunaSweeper") is None
    path.write_text("hydra: {")
    assert jobs_told(path) is None


# ---- former commands ---------------------------------------------------------------------------------------------


def test_jobs_of_former_commands_are_told_apart(sweep: Path):
    told = json.loads((sweep / "sweep.json").read_text())
    # Of the same numbers as jobs of today; one of them was running when its launcher was killed.
    former = [
        job(0, "completed", folder="old0", started=ago(900), ended=ago(860), overrides=["seed=7"]),
        job(1, "killed", folder="old1", started=ago(900), ended=None, overrides=["seed=8"]),
    ]
    view = read_sweep(write_sweep(sweep, [told["jobs"][0], told["jobs"][2], *former]))
    assert [one.former for one in view.jobs] == [False, False, True, True]
    assert summary(view).startswith("smoke: 1 of 2 done, 1 running, ETA")
    assert summary(view).endswith("; of former commands: 1 done, 1 killed")
    assert exit_code(view) == 0, "what went wrong before is not this command's fault"
    skipped = job(3, "skipped")
    view = read_sweep(write_sweep(sweep, [told["jobs"][0], skipped, *former], state="completed"))
    assert view.ended and exit_code(view) == 0 and "2 of 2 done" in summary(view)
