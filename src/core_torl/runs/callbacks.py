"""What happens between RL steps: an evaluation now and then, and tables of answers to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from core_torl.evaluation.protocol import SetResult
from core_torl.variant.policy_gradient import PolicyGradient


class EvaluateEvery(pl.Callback):
    """Evaluate on the main process every ``every`` RL steps; the last step is left to the evaluation after training."""

    def __init__(
        self,
        every: int,
        evaluate: Callable[[], list[SetResult]],
        metrics: Callable[[list[SetResult]], dict[str, float]],
        tracker: Any,
    ) -> None:
        self.every, self.evaluate, self.metrics, self.tracker = every, evaluate, metrics, tracker

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyGradient)
        step = pl_module.rl_step
        if trainer.is_global_zero and step % self.every == 0 and not pl_module.finished:
            self.tracker.log_metrics(self.metrics(self.evaluate()), step=step)


class SampleTables(pl.Callback):
    """A table of answers of the first step, of every ``every``-th and of the last one; 0 is off."""

    def __init__(self, tracker: Any, every: int) -> None:
        self.tracker, self.every = tracker, every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyGradient)
        step = pl_module.rl_step
        if self.every and (step == 1 or pl_module.finished or step % self.every == 0):
            self.tracker.log_samples(step, [t for g in pl_module.last_groups for t in g.trajectories])
