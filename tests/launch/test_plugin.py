"""The launcher as a user meets it: what runs, what is run again, what stops, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core_torl.config.errors import UserError
from core_torl.launch.jobs import Job
from core_torl.launch.plugin import command_of, gpu_slots, quoted
from core_torl.launch.processes import JobProcess

from .conftest import APP, Sweep, processes_of

pytestmark = pytest.mark.slow


def wait_for(what, seconds: float = 60.0):
    """The first true value of ``what()``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except (OSError, json.JSONDecodeError):
            pass
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def running(sweep: Sweep, *names: str) -> bool:
    return all(sweep.record(name)["state"] == "running" for name in names)


def test_each_job_is_a_process_with_a_folder_a_log_and_a_record(sweep: Sweep):
    assert sweep("seed=0,1,2", "hydra.launcher.n_jobs=2") == 0
    assert sweep.values() == {"0": 1.0, "1": 2.0, "2": 3.0}
    assert len({sweep.record(n)["attempts"][0]["pid"] for n in "012"} | {os.getpid()}) == 4
    assert "job 2 on GPUs None" in (sweep.folder / "2" / "stdout.log").read_text()
    board = sweep.board
    assert board["state"] == "completed" and board["ended"] and set(sweep.states.values()) == {"completed"}
    assert [j["value"] for j in board["jobs"]] == [1.0, 2.0, 3.0]
    said = sweep.record("1")["provenance"]
    assert said["overrides"][0] == "seed=1" and said["seeds"] == {"seed": 1} and said["config_name"] == "noop"


def test_the_same_command_runs_only_what_is_not_done_and_knows_jobs_by_config(sweep: Sweep):
    assert sweep("seed=0,1") == 0
    logs = {n: (sweep.folder / n / "stdout.log").read_bytes() for n in "01"}
    assert sweep("seed=2,1,0") == 0  # other numbers, one job more
    assert sweep.states == {"seed=2": "completed", "seed=1": "skipped", "seed=0": "skipped"}
    assert sweep.values() == {"0": 1.0, "1": 2.0, "2": 3.0}
    assert {n: (sweep.folder / n / "stdout.log").read_bytes() for n in "01"} == logs
    assert "2 were done before" in sweep.out
    # The same seed with another value is another job, and takes no folder away.
    assert sweep("seed=0", "value=5") == 0
    assert sweep.values() == {"0": 1.0, "1": 2.0, "2": 3.0, "3": 5.0}


def test_a_job_that_fails_leaves_the_others_running_and_is_run_again(sweep: Sweep):
    assert sweep("fail=true,false", "seed=1,2") == 1
    assert sorted(sweep.states.values()) == ["completed", "completed", "failed", "failed"]
    assert f"{sweep.folder}/0/stdout.log" in sweep.out and "2 of 4 jobs did not finish" in sweep.out
    assert "Traceback" not in sweep.out
    assert "core-torl: fail=true: as asked" in (sweep.folder / "0" / "stdout.log").read_text()
    failed = sweep.record("0")
    assert (failed["state"], failed["error"]) == ("failed", "UserError: fail=true: as asked")
    assert sweep("fail=true,false", "seed=1,2") == 1
    assert sorted(sweep.states.values()) == ["failed", "failed", "skipped", "skipped"]
    assert len(sweep.record("0")["attempts"]) == 2
    assert sweep.board["state"] == "failed"


def test_a_killed_job_is_told_from_a_failed_one_and_retries_start_it_once_more(sweep: Sweep):
    process = sweep.start("seed=0", "sleep_s=3", "hydra.launcher.retries=1")
    wait_for(lambda: running(sweep, "0"))
    first = sweep.record("0")["attempts"][0]["pid"]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: sweep.record("0")["attempts"][-1]["pid"] != first)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert [a["state"] for a in sweep.record("0")["attempts"]] == ["killed", "completed"]
    process = sweep.start("seed=7", "sleep_s=60")
    wait_for(lambda: running(sweep, "1"))
    os.kill(sweep.record("1")["attempts"][0]["pid"], signal.SIGKILL)
    assert process.wait(60) == 1 and sweep.states["seed=7 sleep_s=60"] == "killed"


def test_ctrl_c_ends_all_jobs_and_the_same_command_goes_on(sweep: Sweep):
    process = sweep.start("seed=0,1,2", "sleep_s=30", "litter=true", "hydra.launcher.n_jobs=2")
    wait_for(lambda: running(sweep, "0", "1") and len(processes_of(sweep)) >= 4)  # two jobs, and what they started
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "Traceback" not in out and "the same command goes on" in out
    assert list(sweep.states.values()) == ["interrupted", "interrupted", "pending"]
    assert sweep.record("0")["state"] == "interrupted" and sweep.board["state"] == "interrupted"
    assert processes_of(sweep) == []


def test_jobs_that_do_not_stop_are_killed_after_their_grace(sweep: Sweep):
    process = sweep.start("seed=0", "sleep_s=60", "deaf=true", "hydra.launcher.grace_s=0.5")
    wait_for(lambda: "job 0" in (sweep.folder / "0" / "stdout.log").read_text())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130 and processes_of(sweep) == []


def test_a_second_ctrl_c_kills_at_once(sweep: Sweep):
    process = sweep.start("seed=0", "sleep_s=60", "deaf=true")
    wait_for(lambda: "job 0" in (sweep.folder / "0" / "stdout.log").read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the grace is two minutes
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and processes_of(sweep) == []


def test_jobs_end_with_a_launcher_that_is_killed_and_go_on_with_the_next(sweep: Sweep):
    process = sweep.start("seed=0", "sleep_s=60")
    wait_for(lambda: running(sweep, "0"))
    pid = sweep.record("0")["attempts"][0]["pid"]
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    assert sweep("seed=0", "sleep_s=60", "hydra.launcher.timeout_s=1") == 1  # it was not taken for running
    assert sweep.states == {"seed=0 sleep_s=60": "timeout"}


def test_a_time_limit_stops_one_job_and_not_the_others(sweep: Sweep):
    assert sweep("sleep_s=60,0", "hydra.launcher.timeout_s=10", "hydra.launcher.n_jobs=2") == 1
    assert sweep.states == {"sleep_s=60": "timeout", "sleep_s=0": "completed"}


def test_what_a_job_leaves_behind_is_ended_with_it(sweep: Sweep):
    assert sweep("seed=0,1", "litter=true") == 0
    assert processes_of(sweep) == []


def test_two_launchers_do_not_work_in_one_folder(sweep: Sweep):
    process = sweep.start("seed=0", "sleep_s=30")
    wait_for(lambda: running(sweep, "0"))
    assert sweep("seed=5") == 2
    assert f"{sweep.folder}: process {process.pid} is launching jobs in it" in sweep.out
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)


def test_a_run_of_another_machine_is_taken_over_only_when_told_so(sweep: Sweep):
    assert sweep("seed=0", "fail=true") == 1
    record = sweep.record("0")
    record["state"], record["attempts"][0]["host"] = "running", f"not-{socket.gethostname()}"
    (sweep.folder / "0" / "run.json").write_text(json.dumps(record))
    assert sweep("seed=0", "fail=true") == 2 and "hydra.launcher.take_over=true" in sweep.out
    assert sweep("seed=0", "fail=true", "hydra.launcher.take_over=true") == 1, sweep.out
    assert len(sweep.record("0")["attempts"]) == 2


def test_each_job_has_gpus_of_its_own(sweep: Sweep):
    options = "hydra.launcher.n_jobs=4", "hydra.launcher.gpus_per_job=2", "hydra.launcher.gpus=[3,5,GPU-a,GPU-b]"
    assert sweep("seed=0,1,2", "sleep_s=1", *options) == 0
    seen = {(sweep.folder / n / "stdout.log").read_text().split("GPUs ")[1].split()[0] for n in "012"}
    assert seen == {"3,5", "GPU-a,GPU-b"}
    assert sweep.board["n_jobs"] == 2  # there is no room for four


def test_names_of_folders_that_do_not_tell_jobs_apart_are_refused(sweep: Sweep):
    assert sweep("seed=0,1", "hydra.sweep.subdir=one") == 2
    assert "name in it what tells jobs apart" in sweep.out
    assert sweep("seed=0,0", "hydra.sweep.subdir=one") == 0  # the same job twice is one run
    assert sweep.values() == {"one": 1.0}


def test_a_dry_run_first_takes_no_folder_away(sweep: Sweep):
    assert sweep("seed=0,1", "+dry_run=true", "hydra.sweep.subdir=one_${seed}") == 0
    assert not (sweep.folder / "one_0").exists()
    assert sweep("seed=0,1", "+dry_run=false", "hydra.sweep.subdir=one_${seed}") == 0
    assert sweep.values() == {"one_0": 1.0, "one_1": 2.0}


def test_a_job_that_was_killed_before_its_record_has_left_its_folder_free(sweep: Sweep):
    (sweep.folder / "s0" / ".hydra").mkdir(parents=True)
    assert sweep("seed=0", "hydra.sweep.subdir=s${seed}") == 0
    assert sweep.values() == {"s0": 1.0}


def test_a_disk_that_refuses_the_board_costs_no_job(sweep: Sweep):
    process = sweep.start("seed=0", "sleep_s=2,5", "hydra.launcher.n_jobs=2")
    wait_for(lambda: running(sweep, "0", "1"))
    (sweep.folder / "sweep.json.part").mkdir()
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "sweep.json could not be written" in out
    assert {sweep.record(n)["state"] for n in "01"} == {"completed"}


def test_a_command_that_is_refused_leaves_the_board_as_it_was_and_a_smaller_one_hides_nothing(sweep: Sweep):
    assert sweep("seed=0,1") == 0
    before = sweep.board
    assert sweep("seed=5,6", "hydra.sweep.subdir=one") == 2
    assert sweep.board == before
    assert sweep("seed=1") == 0
    assert sweep.states == {"seed=1": "skipped", "seed=0": "completed"}


def test_a_job_has_the_config_that_its_launcher_saw(sweep: Sweep, tmp_path: Path):
    looked_up = "+note='${hydra:runtime.output_dir}/x ${hydra:sweep.dir} ${hydra:job.num}'"
    assert sweep("seed=0,1", looked_up) == 0, sweep.out
    assert sweep.record("1")["config"]["note"] == f"{sweep.folder}/1/x {sweep.folder} 1"
    assert sweep("seed=0,1", looked_up) == 0 and set(sweep.states.values()) == {"skipped"}
    # Another folder of configs.
    for file in (APP.parent / "job.yaml", APP.parent / "noop.yaml"):
        (tmp_path / file.name).write_text(file.read_text().replace("value: 1.0", "value: 100.0"))
    assert sweep("-cp", str(tmp_path), "seed=9") == 0, sweep.out
    assert 109.0 in sweep.values().values()


def test_a_job_whose_launcher_died_while_it_was_starting_ends(tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    job = subprocess.run(
        [sys.executable, str(APP), f"hydra.run.dir={tmp_path / 'run'}"], start_new_session=True, timeout=60,
        env={**os.environ, "CORE_TORL_LAUNCHER": str(gone.pid)},
    )  # fmt: skip
    assert job.returncode == -signal.SIGTERM and not (tmp_path / "run" / "run.json").exists()


def test_a_mistake_of_the_users_is_not_tried_again(sweep: Sweep):
    assert sweep("seed=0", "fail=true", "hydra.launcher.retries=3") == 1
    assert len(sweep.record("0")["attempts"]) == 1


def test_jobs_that_differ_in_speed_alone_are_one_run_unless_both_are_asked_for(sweep: Sweep):
    threads = "+trainer.threads"
    assert sweep("seed=0", f"{threads}=1") == 0
    assert sweep("seed=0", f"{threads}=2") == 0 and list(sweep.states.values()) == ["skipped"]
    assert sweep("seed=0", f"{threads}=1,2") == 0
    assert len(sweep.values()) == 3  # a benchmark wants both, each in its own folder


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("hydra.launcher.n_jobs=0", "hydra.launcher.n_jobs=0: must be at least 1"),
        ("hydra.launcher.timeout_s=-1", "hydra.launcher.timeout_s=-1.0: must not be negative"),
        ("hydra.launcher.gpus_per_job=1", "0 GPUs were found"),
        ("hydra.launcher.n_job=2", "hydra.launcher.n_jobs"),
    ],
)
def test_mistakes_read_as_one_line(sweep: Sweep, override: str, says: str, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep("seed=0", override) == 2
    assert says in sweep.out and len(sweep.out.strip().splitlines()) == 1


def test_a_job_shares_no_rank_port_run_or_service_with_its_launcher(tmp_path: Path, monkeypatch):
    for name in ("LOCAL_RANK", "MASTER_PORT", "WANDB_RUN_ID", "WANDB_SERVICE", "SLURM_NTASKS", "HYDRA_FULL_ERROR"):
        monkeypatch.setenv(name, "of the launcher")
    monkeypatch.setenv("WANDB_API_KEY", "kept")
    job = JobProcess([sys.executable, "-c", "import os; print(dict(os.environ))"], tmp_path / "log", {"OWN": "1"})
    wait_for(lambda: job.poll() is not None)
    text = (tmp_path / "log").read_text()
    assert "of the launcher" not in text and "'WANDB_API_KEY': 'kept'" in text and "'OWN': '1'" in text


# ---- without processes -------------------------------------------------------------------------------------------


def test_gpus_are_shared_out_in_whole_slots(monkeypatch):
    assert gpu_slots(3, 0, None) == [[], [], []]
    assert gpu_slots(3, 2, ["0", "1", "2", "3", "4"]) == [["0", "1"], ["2", "3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, 8")
    assert gpu_slots(3, 1, None) == [["7"], ["8"]]
    with pytest.raises(UserError, match="2 GPUs were found"):
        gpu_slots(1, 3, None)


def test_the_command_of_a_job_says_everything_and_quotes_it():
    hydra = {
        "job": {"config_name": "smoke"}, "sweep": {"dir": "/runs/it's"},
        "runtime": {"config_sources": [{"provider": "main", "path": "/conf"},
                                       {"provider": "command-line", "path": "/sweeps"}]},
        "overrides": {"hydra": ["hydra.launcher.n_jobs=2", "hydra/job_logging=disabled", "hydra.mode=MULTIRUN",
                                "++hydra.sweep.subdir=${hydra.job.num}"]},
    }  # fmt: skip
    config = OmegaConf.create({"hydra": hydra, "resume": None, "logger": {"group": None}})
    job = Job(3, ["seed=1"], config, "mark", Path("/runs/it's/3"))
    command = command_of(job, ["-m", "core_torl.train"], config, "/elsewhere")
    assert command[1:] == [
        "-m", "core_torl.train", "--config-name", "smoke", "--config-path", "/conf", "--config-dir", "/sweeps", "seed=1",
        "hydra/job_logging=disabled", "hydra.mode=RUN", r"hydra.run.dir='/runs/it\'s/3'",
        r"hydra.sweep.dir='/runs/it\'s'", "hydra.job.num=3", "hydra.job.id='3'", "resume=auto", r"logger.group='it\'s'",
    ]  # fmt: skip
    config.resume, config.logger.group = "some/run", "mine"
    assert command_of(job, ["-m", "x"], config, "/conf")[-1] == "hydra.job.id='3'"


@pytest.mark.parametrize("text", ["plain", "with 'quotes'", "a\\b", "a,b=[c]", "trailing\\"])
def test_quoted_values_come_back_from_hydras_grammar(text: str):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"key={quoted(text)}").value()
    assert str(parsed) == text
