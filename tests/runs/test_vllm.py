"""Whole runs with a vLLM engine in the trainer's process: what is sampled is what the trainer has, step after step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core_torl.tracking.mirror import read_jsonl
from core_torl.variant.checkpoint import found, read
from tests.sampler.vllm_here import NEEDS_VLLM

from .conftest import SMALL

pytestmark = [*NEEDS_VLLM, pytest.mark.slow]
VLLM = ("sampler=vllm", "sampler.kv_cache_mb=64", "sampler.enforce_eager=true", "logger.mode=disabled", "rl_steps=3")


def steps(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "reward/accuracy" in row]


@pytest.mark.parametrize(
    "extra",
    [
        ("variant=core_cr", "variant.lr=1e-3"),
        ("variant=core_base", "reward=random", "variant.lr=1e-2", "model.lora.rank=4", "sampler.weights=lora"),
        ("variant=core_base", "reward=random", "variant.lr=1e-3", "variant.overlap=true"),
    ],
    ids=["coached", "adapters alone", "sampled ahead"],
)
def test_sampler_and_trainer_agree_in_every_step(front_door, tmp_path, extra):
    """``policy/sync_gap`` is measured on a prompt of several blocks after each hand-over of weights that have moved."""
    assert front_door("train", *SMALL, *VLLM, *extra, f"hydra.run.dir={tmp_path}") == 0
    rows = steps(tmp_path)
    assert [row["train/rl_step"] for row in rows] == [1, 2, 3]
    assert all(row["policy/sync_gap"] < 1e-4 for row in rows)
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    if "variant.overlap=true" not in extra:
        assert all(row["policy/sampler_logprob_gap_max"] < 1e-4 for row in rows)
    kept = found(tmp_path / "checkpoints")
    one, three = read(kept[min(kept)])["state_dict"], read(kept[3])["state_dict"]
    assert len(kept) > 1 and max(float((one[n] - three[n]).abs().max()) for n in one) > 1e-4
    assert json.loads((tmp_path / "results.json").read_text())["after"]


@pytest.mark.sandbox
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed: `make bubblewrap`")
def test_answers_with_programs_are_continued_in_the_engine(front_door, tmp_path):
    """ToRL: answers wait for their programs in sessions; what stands behind an observation is still on-policy."""
    small = (
        "experiment=torl/world", "variant.tool_call_budget=2", "prompts_per_step=3", "group_size=4",
        "evaluation.max_problems=3", "evaluation.samples=0", "data.train=200", "sampler.block_size=32",
    )  # fmt: skip
    assert front_door("train", *small, *VLLM, f"hydra.run.dir={tmp_path}") == 0
    rows = steps(tmp_path)
    assert len(rows) == 3 and all(row["policy/sync_gap"] < 1e-4 for row in rows)
    assert all(row["policy/sampler_logprob_gap_max"] < 1e-4 for row in rows)
    assert sum(row["tool/calls_per_response"] for row in rows) > 0.5


@pytest.mark.ddp
def test_two_ranks_have_an_engine_each_and_one_set_of_weights(tmp_path):
    """An engine that left its process group behind would be taken for the ranks' own, and each rank train by itself.

    Lightning then reduces nothing: the ranks' weights go apart, and the samples of a step are not counted together.
    """
    command = [
        sys.executable, "-m", "core_torl.train", *SMALL, *VLLM, "trainer=ddp", "variant.lr=1e-3", "rl_steps=2",
        "evaluation.max_problems=2", "evaluation.samples=0", f"hydra.run.dir={tmp_path}",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = steps(tmp_path)
    assert len(rows) == 2 and all(row["policy/sync_gap"] < 1e-4 for row in rows)
    assert [row["train/samples"] for row in rows] == [16, 32]  # of both ranks
    assert all(torch.isfinite(t).all() for t in read(found(tmp_path / "checkpoints")[2])["state_dict"].values())
