"""Launchers and sweepers that are not ours: each job once, the same command runs nothing again, a search goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core_torl.config.errors import UserError
from core_torl.launch.app import check_ranks

from .conftest import APP, Sweep
from .test_plugin import wait_for


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package", "options"),
    [
        ("basic", "hydra", []),
        ("joblib", "hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", "hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
    ],
)
def test_a_job_that_is_done_is_not_run_again(sweep: Sweep, launcher: str, package: str, options: list[str]):
    pytest.importorskip(package, reason=f"hydra/launcher={launcher} needs the [sweeps] extra")
    chosen = f"hydra/launcher={launcher}"
    assert sweep("seed=0,1", *options, launcher=chosen) == 0, sweep.out
    assert sweep.values() == {"0": 1.0, "1": 2.0}
    first = {n: sweep.record(n)["attempts"] for n in "01"}
    assert sweep("seed=0,1", *options, launcher=chosen) == 0
    assert {n: sweep.record(n)["attempts"] for n in "01"} == first
    # Another job may not take the folder of one that is there.
    assert sweep("seed=0,1", "value=3", *options, launcher=chosen) != 0
    assert sweep.values() == {"0": 1.0, "1": 2.0}


class Search:
    """A study in a folder of its own, and the command that goes on with it."""

    def __init__(self, folder: Path) -> None:
        self.optuna = pytest.importorskip("optuna", reason="hydra/sweeper=optuna needs the [sweeps] extra")
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="it needs the [sweeps] extra")
        self.folder, self.storage = folder, f"sqlite:///{folder}/study.db"  # the folder is made

    def start(self, trials: int, *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(APP), "-cn", "search", f"hydra.sweep.dir={self.folder}", "hydra.launcher.view=false",
             f"hydra.sweeper.storage={self.storage}", f"hydra.sweeper.n_trials={trials}", *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def __call__(self, trials: int, *more: str) -> int:
        process = self.start(trials, *more)
        self.out = process.communicate(timeout=120)[0]
        return process.returncode

    @property
    def study(self):
        return self.optuna.load_study(study_name="noop", storage=self.storage)

    @property
    def values(self) -> list[float]:
        return [t.value for t in self.study.trials if t.value is not None]


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped(tmp_path: Path):
    search = Search(tmp_path / "search")
    assert search(2) == 0, search.out
    first = search.values
    assert len(first) == 2
    left_open = search.study.ask(
        {"value": search.optuna.distributions.UniformDistribution(0, 1)}
    )  # as a killed one does
    assert search(4) == 0, search.out
    second = search.values
    assert second[:2] == first and len(second) == 4 and len(set(second)) == 4  # two more, and no point twice
    assert left_open.params["value"] + 0 in second  # its point is asked for once more
    states = sorted(t.state.name for t in search.study.trials)
    assert states == ["COMPLETE", "COMPLETE", "COMPLETE", "COMPLETE", "FAIL"]
    assert search(4) == 0 and search.values == second


@pytest.mark.slow
def test_a_search_whose_jobs_fail_proposes_other_points_next_time(tmp_path: Path):
    search = Search(tmp_path / "search")
    assert search(2, "fail=true") == 1 and search(2, "fail=true") == 1
    points = [t.params["value"] for t in search.study.trials]
    assert len(points) == 4 and len(set(points)) == 4


@pytest.mark.slow
def test_a_second_command_does_not_disturb_a_search_that_runs(tmp_path: Path):
    search = Search(tmp_path / "search")
    first = search.start(2, "sleep_s=6")
    wait_for(lambda: (tmp_path / "search" / "0" / "run.json").exists())
    assert search(2) == 2 and f"process {first.pid} is launching jobs in it" in search.out
    assert len(search.out.strip().splitlines()) == 1
    out = first.communicate(timeout=60)[0]
    assert first.returncode == 0, out
    assert [t.state.name for t in search.study.trials] == ["COMPLETE", "COMPLETE"]


@pytest.mark.slow
def test_a_job_that_fails_in_this_process_is_no_mistake_in_the_command(sweep: Sweep):
    assert sweep("fail=true", launcher="hydra/launcher=basic") == 1
    assert "core-torl: fail=true: as asked" in sweep.out and "Traceback" not in sweep.out


def test_ranks_that_would_start_the_sweep_again_are_refused():
    ddp = OmegaConf.create({"trainer": {"devices": 2, "num_nodes": 1}})
    for launcher in ("basic", "joblib", "submitit_local"):
        with pytest.raises(UserError, match=f"hydra/launcher={launcher}: with 2 ranks"):
            check_ranks(ddp, launcher)
        check_ranks(OmegaConf.create({"trainer": {"devices": 1, "num_nodes": 1}}), launcher)
        check_ranks(OmegaConf.create({"seed": 0}), launcher)
    for launcher in ("subprocess", "submitit_slurm"):
        check_ranks(ddp, launcher)
