"""Result files and weights in an offline run: copies of their own, inside the run's folder, and nowhere else."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from core_torl.tracking.artifacts import ARTIFACTS, RESULT_FILES, RUN_FILES, artifact_files
from core_torl.tracking.offline import read_run
from core_torl.tracking.wandb_run import Tracker


@pytest.fixture
def folder(tmp_path):
    """A run folder as a training run leaves it."""
    run = tmp_path / "run"
    for name in (*RESULT_FILES, "checkpoints/step-000002.ckpt", "checkpoints/step-000010.ckpt", "policy/config.json",
                 "policy/adapter/weights.bin", "results.png"):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(json.dumps({"file": name}))
    return run


def logged(folder: Path, *artifacts: str):
    tracker = Tracker(dir=str(folder), system_metrics=False, artifacts=artifacts)
    tracker.log_metrics({"reward/mean": 0.5}, step=1)
    tracker.log_files(folder)
    tracker.finish()
    return tracker, read_run(folder)


def test_results_are_files_of_the_run_and_an_artifact(folder):
    tracker, run = logged(folder, "results")
    (artifact,) = run.artifacts
    assert (artifact.name, artifact.type, artifact.aliases) == (f"results-{tracker.run_id}", "results", ("latest",))
    assert {f.name for f in artifact.files} == set(RESULT_FILES)
    assert all(f.size == f.path.stat().st_size for f in artifact.files)
    assert {p.name for p in run.saved} >= set(RUN_FILES) and run.exit_code == 0


def test_weights_go_where_asked_for_and_only_the_newest_checkpoint(folder):
    _, run = logged(folder, *ARTIFACTS)
    names = {a.type: {f.name for f in a.files} for a in run.artifacts}
    assert names["checkpoint"] == {"step-000010.ckpt"}
    assert names["policy"] == {"config.json", "adapter/weights.bin"}
    _, plain = logged(shutil.copytree(folder, folder.parent / "other", ignore=shutil.ignore_patterns("wandb")))
    assert plain.artifacts == [] and {p.name for p in plain.saved} >= set(RUN_FILES)


def test_what_a_run_has_not_written_is_no_artifact(tmp_path):
    assert [artifact_files(kind, tmp_path) for kind in ARTIFACTS] == [[], [], []]
    _, run = logged(tmp_path, *ARTIFACTS)
    assert run.artifacts == [] and not {p.name for p in run.saved} & set(RUN_FILES)


def test_the_copies_outlive_the_run_folder(folder):
    """And none of them is a link: later changes to the originals do not reach them."""
    logged(folder, *ARTIFACTS)
    for path in [p for p in folder.rglob("*") if p.is_file() and "wandb" not in p.parts]:
        path.write_text("changed")
        path.unlink()
    run = read_run(folder)
    for file in (f for a in run.artifacts for f in a.files):
        assert not file.path.is_symlink() and file.path.is_relative_to(folder / "wandb")
        assert file.name in json.loads(file.path.read_text())["file"]
    for name in RUN_FILES:
        kept = run.path.parent / "files" / name
        assert not kept.is_symlink() and json.loads(kept.read_text()) == {"file": name}


@pytest.mark.slow
def test_nothing_is_left_in_the_home_directory(folder):
    script = """
        import os, sys
        from core_torl.tracking.wandb_run import Tracker
        tracker = Tracker(dir=sys.argv[1], system_metrics=False, artifacts=["results"])
        tracker.log_table("per_concept", ["set"], [["math"]])
        tracker.log_files(sys.argv[1])
        tracker.finish()
        assert "WANDB_DATA_DIR" not in os.environ
    """
    home = folder.parent / "home"
    home.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "XDG_"))} | {"HOME": str(home)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(folder)], check=True, timeout=120, env=clean)
    left = [p.relative_to(home) for p in home.rglob("*") if p.is_file()]
    assert [p for p in left if p.parts[:2] != (".cache", "matplotlib")] == []  # its list of fonts is no affair of W&B
    assert {a.type for a in read_run(folder).artifacts} == {"run_table", "results"}


def test_a_place_that_the_user_named_is_kept(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "elsewhere"))
    _, run = logged(folder, "results")
    assert all(f.path.is_relative_to(tmp_path / "elsewhere") for f in run.artifacts[0].files)
