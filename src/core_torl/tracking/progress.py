"""The steps as they pass, for a person who waits.

On a terminal a live bar shows the current RL step. Where the output goes to a file or a CI log, a live bar would leave
thousands of lines, so one plain line every few steps takes its place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol, cast

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

SHOWN = (
    ("reward", "reward/mean", "{:.3f}"),
    ("right", "reward/accuracy", "{:.1%}"),
    ("all wrong", "group/all_wrong", "{:.1%}"),
    ("tok/s", "rollout/tokens_per_s", "{:,.0f}"),
)


def step_text(metrics: Mapping[str, float]) -> str:
    """The shown metrics of one step as ``reward 0.412  right 38.0%``; those that are missing are left out."""
    return "  ".join(f"{label} {style.format(metrics[name])}" for label, name, style in SHOWN if name in metrics)


class Learner(Protocol):
    """What the bar reads of the module: the finished RL steps and the last step's metrics."""

    rl_step: int
    last_metrics: dict[str, float]


class StepProgress(Callback):
    """Shows RL steps on rank zero: a live bar on a terminal, else one line every ``plain_every`` steps.

    Reads ``pl_module.rl_step`` and ``pl_module.last_metrics`` after each training batch; one batch is one RL step.
    """

    def __init__(self, plain_every: int = 10, console: Console | None = None):
        if plain_every < 1:
            raise ValueError(f"plain_every must be at least 1, not {plain_every}")
        self.plain_every = plain_every
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._total: int | None = None
        self._first_step, self._started_at = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        total = trainer.num_training_batches
        self._total = int(total) if math.isfinite(total) else None
        # After a resume the bar starts where the run does, and the time left is measured from here.
        self._first_step, self._started_at = cast(Learner, pl_module).rl_step, time.monotonic()
        self._console = self._console or Console()
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("RL step"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=self._total, completed=self._first_step, text="")
            self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        learner = cast(Learner, pl_module)
        step, text = learner.rl_step, step_text(learner.last_metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        elif self._console is not None and self._is_due(step):
            of = "" if self._total is None else f"/{self._total}"
            line = "  ".join(filter(None, [f"RL step {step}{of}", text, self._left(step)]))
            # soft_wrap: a log line is never folded to the width of a terminal that is not there.
            self._console.print(Text(line), soft_wrap=True)

    def _is_due(self, step: int) -> bool:
        return step % self.plain_every == 0 or step in (self._first_step + 1, self._total)

    def _left(self, step: int) -> str:
        """The time left, at the mean pace since the start or the resume."""
        done = step - self._first_step
        if self._total is None or done < 1:
            return ""
        seconds = (time.monotonic() - self._started_at) / done * (self._total - step)
        return f"left {timedelta(seconds=round(seconds))}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
