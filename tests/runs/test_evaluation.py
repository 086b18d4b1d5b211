"""An evaluation says where it differs from the training of its checkpoint."""

from __future__ import annotations

import logging

import pytest
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
