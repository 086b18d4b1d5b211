"""The smallest training run that has everything in it."""

from __future__ import annotations

SMALL = (
    "rl_steps=2", "group_size=4", "prompts_per_step=4", "evaluation.max_problems=6", "evaluation.samples=1",
    "data.train_per_concept=4", "data.test_per_concept=1", "trainer.threads=1", "callbacks.checkpoint_every=1",
    "logger.system_metrics=false", "model.max_new_tokens=24",
)  # fmt: skip
