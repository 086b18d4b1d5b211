"""An evaluation says where it differs from the training of its checkpoint."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from omegaconf import OmegaConf

from core_torl.runs.evaluation import warn_of_differences


@pytest.mark.parametrize(
    ("trained", "named"),
    [
        ({"tool.call_budget": 2, "reward._target_": "a.Correctness"}, ["tool.call_budget=2"]),
        ({"tool.call_budget": 0, "reward._target_": "a.TorlReward"}, ["reward._target_=a.TorlReward"]),
        ({"tool.call_budget": 0, "reward._target_": "a.Correctness"}, []),
        ({}, []),  # a checkpoint from before these were written down
    ],
)
def test_a_checkpoint_that_is_judged_in_another_way_is_told(caplog, trained, named):
    cfg = OmegaConf.create({"checkpoint": "run", "tool": {"call_budget": 0}, "reward": {"_target_": "a.Correctness"}})
    with caplog.at_level(logging.WARNING):
        warn_of_differences(cfg, trained)
    assert len(caplog.messages) == len(named)
    assert all(words in message for words, message in zip(named, caplog.messages, strict=True))


def test_a_sampler_with_weights_of_its_own_is_given_those_of_the_checkpoint(front_door, tmp_path):
    """A checkpoint whose norms are zero answers nothing rightly, whatever the policy that it started from can do."""
    run, checkpoint = tmp_path / "run", tmp_path / "broken.ckpt"
    common = ["logger.mode=disabled", "sampler.copy_weights=true", "evaluation.max_problems=4", "evaluation.samples=0"]
    assert front_door("train", "debug=limit", "rl_steps=1", "export=false", f"hydra.run.dir={run}", *common) == 0
    state = torch.load(run / "checkpoints" / "step-000001.ckpt", weights_only=True)
    for name, tensor in state["state_dict"].items():
        if "norm" in name:
            tensor.zero_()
    torch.save(state, checkpoint)
    reports = {}
    for file in (run, checkpoint):
        folder = tmp_path / f"of-{file.name}"
        assert front_door("evaluate", f"checkpoint={file}", f"hydra.run.dir={folder}", *common) == 0
        reports[file] = json.loads((folder / "results.json").read_text())["estimates"]["mastered/greedy/accuracy"]
    assert reports[run]["value"] == 1.0 and reports[checkpoint]["value"] == 0.0
