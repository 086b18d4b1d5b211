"""The smoke sweep for real: separate runs, one aggregate, one page; killed, gone on with, repeated, and under two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core_torl.reports.aggregate import same_results
from core_torl.tracking.offline import read_run

from .test_plugin import wait_for

ROOT = Path(__file__).parents[2]
JOBS = ("core_base_seed0", "core_base_seed1", "core_cr_seed0", "core_cr_seed1")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "core_torl.train", "-cd", str(ROOT / "sweeps"), "-cn", "smoke",
               f"hydra.sweep.dir={folder}", "hydra.launcher.n_jobs=2", "hydra.launcher.view=false"]  # fmt: skip
    return subprocess.Popen(
        [*command, *overrides], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen, code: int = 0) -> str:
    out = process.communicate(timeout=600)[0]
    assert process.returncode == code, out
    return out


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps") / "undisturbed"
    ended(start(folder))
    return folder


def tracked(folder: Path) -> list[Any]:
    return [read_run(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]  # in the order of time


def test_a_sweep_gives_separate_runs_one_aggregate_and_one_page(undisturbed: Path):
    from pyarrow import parquet

    runs = {name: tracked(undisturbed / name) for name in JOBS}
    assert {p.name for p in undisturbed.iterdir() if (p / "run.json").exists()} == set(JOBS)
    assert [len(found) for found in runs.values()] == [1, 1, 1, 1]
    assert len({found[0].run_id for found in runs.values()}) == 4
    for name, (run,) in runs.items():
        assert (run.group, run.job_type, run.exit_code) == ("smoke", "sweep", 0)
        assert {f"variant={name[:-6]}", f"seed={name[-1]}"} <= set(run.tags)
        assert run.config["choices.variant"] == name[:-6] and run.config["seed"] == int(name[-1])
    table = parquet.read_table(undisturbed / "report" / "runs.parquet")
    assert sorted(table["run"].to_pylist()) == sorted(JOBS)
    assert set(table["state"].to_pylist()) == {"completed"}
    assert set(table["provenance/commit"].to_pylist()) == {record(undisturbed / JOBS[0])["provenance"]["commit"]}
    assert (undisturbed / "report" / "report.html").stat().st_size > 20_000
    for name, objective in zip(table["run"].to_pylist(), table["objective"].to_pylist(), strict=True):
        assert objective == record(undisturbed / name)["value"]
        results = json.loads((undisturbed / name / "results.json").read_text())
        said = results["provenance"]
        assert results["objective"] == objective and said["seeds"]["seed"] == int(name[-1])
        assert said["packages"]["torch"] and {"train", "gap", "mastered"} <= set(said["data"])
        assert results["compute"]["wall_s"] > results["compute"]["train_s"] > 0


def test_the_page_of_the_sweep_in_a_browser_has_the_numbers_of_its_parquet(undisturbed: Path, tmp_path: Path):
    from ..reports.chromium import Chromium, find_chromium
    from ..reports.test_page_browser import check_drawn

    program = find_chromium()
    if program is None:
        pytest.skip("NO BROWSER: none of chromium, chromium-browser, google-chrome is on PATH; the page was not opened")
    from pyarrow import parquet

    with Chromium(program, tmp_path) as browser:
        browser.open(undisturbed / "report" / "report.html")
        check_drawn(browser)
        shown = browser.run(
            "[...document.querySelectorAll('[data-run][data-metric]')].map(e => "
            "[e.dataset.run, e.dataset.metric, e.dataset.value])"
        )
    table = parquet.read_table(undisturbed / "report" / "runs.parquet").to_pylist()
    known = {row["run"]: row for row in table}
    compared = [
        (float(value), known[run][metric]) for run, metric, value in shown if metric.startswith(("after/", "before/"))
    ]
    assert len(compared) >= 8 and all(a == b for a, b in compared)


def test_a_sweep_with_a_killed_job_ends_as_an_undisturbed_one(undisturbed: Path, tmp_path: Path):
    from pyarrow import parquet

    folder = tmp_path / "killed"
    process = start(folder)
    victim = folder / "core_cr_seed0"
    wait_for(lambda: (victim / "checkpoints" / "step-000001.ckpt").exists(), 300)
    os.kill(record(victim)["attempts"][0]["pid"], signal.SIGKILL)
    out = ended(process, code=1)
    assert f"{victim}/stdout.log" in out and "1 of 4 jobs did not finish" in out
    table = parquet.read_table(folder / "report" / "runs.parquet")
    states = dict(zip(table["run"].to_pylist(), table["state"].to_pylist(), strict=True))
    assert states == {**dict.fromkeys(JOBS, "completed"), "core_cr_seed0": "killed"}
    assert "core_cr_seed0" in (folder / "report" / "table.md").read_text().split("Not in the table")[1]
    assert same_results(folder / "report", undisturbed / "report") != []
    first_id = tracked(victim)[0].run_id
    out = ended(start(folder))
    assert "3 were done before" in out
    assert [a["state"] for a in record(victim)["attempts"]] == ["killed", "completed"]
    assert {run.run_id for run in tracked(victim)} == {first_id}
    assert same_results(folder / "report", undisturbed / "report") == []


def test_a_run_is_repeated_from_its_folder_alone(undisturbed: Path, tmp_path: Path):
    first = undisturbed / "core_cr_seed1"
    command = [sys.executable, "-m", "core_torl.train", f"+reproduce={first}", f"hydra.run.dir={tmp_path / 'again'}"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results["reproduces"]["differ"] == {} and results["reproduces"]["equal"] > 30
    assert f"Repeats {first}: all" in out.stdout
    assert record(tmp_path / "again")["choices"]["variant"] == "core_cr"


@pytest.mark.ddp
def test_a_sweep_of_two_ranks_trains_each_job_once(tmp_path: Path):
    """Under Hydra 1.3 and 1.4: CI runs this file with both."""
    folder = tmp_path / "ranks"
    ended(start(folder, "trainer=ddp", "seed=0", "hydra.launcher.n_jobs=1"))
    jobs = ("core_base_seed0", "core_cr_seed0")
    assert {p.parent.name for p in folder.glob("*/results.json")} == set(jobs)
    for name in jobs:
        one = folder / name
        assert len(record(one)["attempts"]) == 1 and len(tracked(one)) == 1
        rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
        trained = [row["train/rl_step"] for row in rows if "train/optimizer_steps" in row]
        assert trained == [1, 2, 3]  # each step once, by both ranks together
        assert rows[-1]["train/samples"] >= 3 * 16 and (one / "train_ddp_process_1.log").exists()


def test_a_config_that_cannot_run_stops_the_sweep_before_any_job(tmp_path: Path):
    out = ended(start(tmp_path / "wrong", "sampler.top_p=0.9"), code=2)
    assert out.splitlines()[-1].startswith("core-torl: job 0 (") and "sampler.top_p=0.9" in out.splitlines()[-1]
    assert "Traceback" not in out and not list((tmp_path / "wrong").glob("*/run.json"))
