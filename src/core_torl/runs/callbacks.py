"""What happens between RL steps: an evaluation now and then, and tables of rollouts to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from core_torl.evaluation.protocol import SetResult
from core_torl.tracking.rollouts import merged, tables_of
from core_torl.trajectory import Group
from core_torl.variant.coached import Coached
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


class RolloutTables(pl.Callback):
    """Tables of rollouts of the first step, of every ``every``-th and of the last one, at most ``rows`` rows a kind.

    To tell what is newly solved it follows every step and remembers which problems have been solved and which were
    always wrong, over all ranks; a checkpoint holds both, so that a resumed run goes on rightly.
    """

    def __init__(self, tracker: Any, every: int, rows: int) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        self.tracker, self.every, self.rows = tracker, every, rows
        self.solved: set[str] = set()
        self.unsolved: set[str] = set()  # came, and were all wrong each time
        self._known: set[str] = set()  # uids of the training problems

    def state_dict(self) -> dict[str, Any]:
        return {"solved": sorted(self.solved), "unsolved": sorted(self.unsolved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.solved, self.unsolved = set(state_dict["solved"]), set(state_dict["unsolved"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PolicyGradient)
        self._known = {problem.uid for problem in pl_module.problems}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyGradient)
        groups, step = pl_module.last_sampled, pl_module.rl_step
        uids = [origin(group.problem.uid, self._known) for group in groups]
        newly = self.notice([*zip(uids, map(solves, groups), strict=True)])
        if not (step == 1 or pl_module.finished or step % self.every == 0):
            return
        coached = pl_module.last_interventions if isinstance(pl_module, Coached) else []
        own = tables_of(
            step, groups, [uid in newly and solves(group) is True for uid, group in zip(uids, groups, strict=True)],
            [(groups[primed.group], primed.trajectories) for primed in coached],
            lambda ids: pl_module.policy.decode(list(ids)), self.rows,
        )  # fmt: skip
        self.tracker.log_rollouts(step, merged(gathered(own), self.rows))

    def notice(self, outcomes: Sequence[tuple[str, bool | None]]) -> set[str]:
        """Take in this rank's (uid, solved) of one step, None if nothing was judged; the newly solved of all."""
        everybody = [outcome for part in gathered(outcomes) for outcome in part]
        right = {uid for uid, solved in everybody if solved}
        newly = right & self.unsolved
        self.solved |= right
        self.unsolved = (self.unsolved | {uid for uid, solved in everybody if solved is False}) - self.solved
        return newly


def solves(group: Group) -> bool | None:
    """Whether an answer of the group is right; None if none could be judged."""
    if any(t.score is not None and t.score.correct for t in group.trajectories):
        return True
    return False if group.all_wrong else None


def origin(uid: str, known: set[str]) -> str:
    """The uid of the training problem that a varied one came from: a variation adds to its end (``~`` and ``#``)."""
    shorter = uid
    while shorter and shorter not in known:
        shorter = shorter[: max(shorter.rfind("#"), shorter.rfind("~"), 0)]
    return shorter or uid


def gathered(own: Any) -> list[Any]:
    """This object of every rank, in their order."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return parts
