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


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_stopped(tmp_path: Path):
    optuna = pytest.importorskip("optuna", reason="hydra/sweeper=optuna needs the [sweeps] extra")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra/sweeper=optuna needs the [sweeps] extra")
    storage = f"sqlite:///{tmp_path}/search/study.db"  # the folder is made

    def search(trials: int) -> list[float]:
        subprocess.run(
            [sys.executable, str(APP), "-cn", "search", f"hydra.sweep.dir={tmp_path / 'search'}",
             f"hydra.sweeper.storage={storage}", f"hydra.sweeper.n_trials={trials}", "hydra.launcher.view=false"],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        study = optuna.load_study(study_name="noop", storage=storage)
        return [t.value for t in study.trials if t.value is not None]

    first = search(2)
    assert len(first) == 2
    study = optuna.load_study(study_name="noop", storage=storage)
    study.ask()  # as a killed process leaves it
    second = search(3)
    assert second[:2] == first and len(second) == 3 and len(set(second)) == 3  # one more, and no point twice
    states = [t.state.name for t in optuna.load_study(study_name="noop", storage=storage).trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert search(3) == second


def test_ranks_that_would_start_the_sweep_again_are_refused():
    ddp = OmegaConf.create({"trainer": {"devices": 2, "num_nodes": 1}})
    for launcher in ("basic", "joblib", "submitit_local"):
        with pytest.raises(UserError, match=f"hydra/launcher={launcher}: with 2 ranks"):
            check_ranks(ddp, launcher)
        check_ranks(OmegaConf.create({"trainer": {"devices": 1, "num_nodes": 1}}), launcher)
        check_ranks(OmegaConf.create({"seed": 0}), launcher)
    for launcher in ("subprocess", "submitit_slurm"):
        check_ranks(ddp, launcher)
