"""A real process that trains a coached variant: to be killed, or to be one of several ranks.

``python -m tests.variant.worker CASE FOLDER RANKS KILL_AT``, in the repository's root.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from core_torl.objective.grpo import GRPO
from core_torl.variant.checkpoint import RLCheckpoint
from core_torl.variant.core_cr import CoreCR
from core_torl.variant.core_hybrid import CoreHybrid
from core_torl.variant.core_kl import CoreKL
from core_torl.variant.policy_gradient import PolicyGradient

from .conftest import RIGHT, WRONG, Rule, build, load_problems

# Strong lambdas, so that a teacher that is not the right one shows in the weights.
STRONG = {"kl_lambda": 1.0, "minibatch_size": 8}
CASES = {
    "core_cr": (CoreCR, {"bonus_when": "only_if_correct"}),
    # Adam turns rounding in a gradient near zero into a step of the learning rate's size.
    "core_kl_current": (CoreKL, {"kl_lambda": 1.0, "lr": 1e-3}),
    "core_kl_old": (CoreKL, {"teacher": "old", **STRONG}),
    "core_kl_reference": (CoreKL, {"teacher": "reference", **STRONG}),
    "core_hybrid": (CoreHybrid, {"teacher": "old", **STRONG}),
}


def killing(kind: type[PolicyGradient], at: int) -> type[PolicyGradient]:
    class Killed(kind):  # type: ignore[misc, valid-type]
        def learn(self, batch):
            if self.rl_step == at:
                os.kill(os.getpid(), signal.SIGKILL)
            super().learn(batch)

    return Killed


def module_of(case: str, steps: int, kill_at: int = -1, **changes) -> PolicyGradient:
    kind, settings = CASES[case]
    reward = Rule(
        lambda t, i: RIGHT if t.token_ids[0] % 2 else WRONG, lambda t, i: RIGHT if t.token_ids[0] % 9 == 0 else WRONG
    )
    settings = settings | changes
    return build(
        load_problems(), killing(kind, kill_at), reward=reward, objective=GRPO(kl_coef=0.01), rl_steps=steps, **settings
    )


def train(module: PolicyGradient, ranks: int = 1, callbacks=(), ckpt: Path | None = None) -> PolicyGradient:
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=1, logger=False,
        callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=str(ckpt) if ckpt else None, weights_only=True if ckpt else None)
    return module


def main() -> None:
    case, folder, ranks, kill_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    steps = 5 if kill_at >= 0 else 3
    module = train(module_of(case, steps, kill_at), ranks, [RLCheckpoint(folder, 2, 3)] if kill_at >= 0 else [])
    if module.trainer.is_global_zero:
        torch.save({"weights": module.model.state_dict(), "metrics": module.last_metrics}, folder / f"{ranks}.pt")


if __name__ == "__main__":
    main()
