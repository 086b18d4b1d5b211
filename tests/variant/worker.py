"""A real process that trains a coached variant: to be killed, or to be one of several ranks.

``python -m tests.variant.worker CASE FOLDER RANKS KILL_AT``, in the repository's root. Several cases, with commas between
them, run one after the other in the same processes; ``fsdp:CASE`` spreads the policy over the ranks, ``ddp:CASE`` and
``CASE`` do not.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from core_torl.model.load import Policy
from core_torl.model.sharding import is_sharded, whole
from core_torl.objective.grpo import GRPO
from core_torl.variant.checkpoint import RLCheckpoint
from core_torl.variant.core_cr import CoreCR
from core_torl.variant.core_hybrid import CoreHybrid
from core_torl.variant.core_kl import CoreKL
from core_torl.variant.policy_gradient import PolicyGradient
from core_torl.variant.strategy import strategy_of

from .conftest import RIGHT, WRONG, Rule, build, load_problems, make_policy

# Strong lambdas, so that a teacher that is not the right one shows in the weights.
STRONG = {"kl_lambda": 1.0, "minibatch_size": 8}
CASES: dict[str, tuple[type[PolicyGradient], dict[str, Any]]] = {
    "core_cr": (CoreCR, {"bonus_when": "only_if_correct"}),
    # Adam turns rounding in a gradient near zero into a step of the learning rate's size.
    "core_kl_current": (CoreKL, {"kl_lambda": 1.0, "lr": 1e-3}),
    "core_kl_old": (CoreKL, {"teacher": "old", **STRONG}),
    "core_kl_reference": (CoreKL, {"teacher": "reference", **STRONG}),
    "core_hybrid": (CoreHybrid, {"teacher": "old", **STRONG}),
    # Parts of some tokens each: ranks have different numbers of them. Old log-probs, a reference, a teacher of its own.
    "sized": (CoreKL, {"teacher": "old", "lr": 1e-3, "microbatch_tokens": 120, **STRONG}),
    "sized_reference": (CoreKL, {"teacher": "reference", "lr": 1e-3, "microbatch_tokens": 120, **STRONG}),
    "adapted": (CoreKL, {"teacher": "reference", "lr": 1e-3, "microbatch_tokens": 120, **STRONG}),
}


def killing(kind: type[PolicyGradient], at: int) -> type[PolicyGradient]:
    class Killed(kind):  # type: ignore[misc, valid-type]
        def learn(self, batch):
            if self.rl_step == at:
                os.kill(os.getpid(), signal.SIGKILL)
            super().learn(batch)

    return Killed


def recording(kind: type[PolicyGradient]) -> type[PolicyGradient]:
    """``kind`` that keeps the whole gradient of each optimizer step, and how many passes each step took."""

    class Recorded(kind):  # type: ignore[misc, valid-type]
        def __init__(self, **settings):
            super().__init__(**settings)
            self.gradients: list[dict[str, torch.Tensor]] = []
            self.passes: list[int] = []

        def _clip(self):
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            self.gradients.append({n: whole(p.grad).clone() for n, p in named})
            return super()._clip()

        def _microbatches(self, batch, rows):
            self.passes.append(0)
            for part in super()._microbatches(batch, rows):
                self.passes[-1] += 1
                yield part

        def auxiliary_losses(self, rows):
            self.passes.append(0)
            for part in super().auxiliary_losses(rows):
                self.passes[-1] += 1
                yield part

    return Recorded


def adapted_policy(plain: Policy) -> Policy:
    from peft import LoraConfig, get_peft_model

    plain.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain.model.enable_input_require_grads()
    torch.manual_seed(5)  # the adapters'
    settings = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    return Policy(get_peft_model(plain.model, settings), plain.tokenizer, adapted=True)


def untied_policy(plain: Policy) -> Policy:
    """With an output layer of its own, as models of 7 billion weights have: its shards need a gradient on each rank."""
    model = plain.model
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return plain


def module_of(case: str, steps: int, kill_at: int = -1, **changes) -> PolicyGradient:
    kind, settings = CASES[case]
    reward = Rule(
        lambda t, i: RIGHT if t.token_ids[0] % 2 else WRONG, lambda t, i: RIGHT if t.token_ids[0] % 9 == 0 else WRONG
    )
    problems = load_problems()
    if case == "adapted":
        changes["policy"] = adapted_policy(make_policy(problems, scale=10.0))
    if case == "sized_reference":
        changes["policy"] = untied_policy(make_policy(problems, scale=10.0))
    settings = settings | changes
    return build(
        problems, recording(killing(kind, kill_at)), reward=reward, objective=GRPO(kl_coef=0.01), rl_steps=steps,
        **settings,
    )  # fmt: skip


def train(
    module: PolicyGradient, ranks: int = 1, callbacks=(), ckpt: Path | None = None, strategy: str = "ddp"
) -> PolicyGradient:
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy_of(strategy, ranks) if ranks > 1 else "auto", max_epochs=1,
        logger=False, callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=str(ckpt) if ckpt else None, weights_only=True if ckpt else None)
    return module


def result_of(module: PolicyGradient) -> dict[str, Any]:
    """Whole tensors, so every rank has to ask."""
    state = {name: whole(tensor) for name, tensor in module.policy.trainable_state().items()}
    merged = dict(module.policy.merged())
    adam = module.optimizers().optimizer.state_dict()["state"]
    passes: list[Any] = [None] * module.trainer.world_size
    if len(passes) > 1:
        torch.distributed.all_gather_object(passes, module.passes)
    return {
        "weights": state, "merged": merged, "metrics": module.last_metrics, "gradients": module.gradients,
        "adam": {k: {n: whole(torch.as_tensor(v)) for n, v in s.items()} for k, s in adam.items()},
        "passes": passes, "sharded": is_sharded(module.model), "precision": str(module.trainer.precision),
    }  # fmt: skip


def main() -> None:
    cases, folder, ranks, kill_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for what in cases.split(","):
        strategy, _, case = what.rpartition(":")
        steps = 5 if kill_at >= 0 else 3
        own = folder / what.replace(":", "-") if strategy else folder
        changes = {"sampling": {"copy_weights": True}} if strategy == "fsdp" else {}
        every = 2 if kill_at >= 0 else 1
        callbacks = [RLCheckpoint(own, every, 9)] if kill_at >= 0 or strategy else []
        resumed = own / "resume.ckpt"
        module = train(
            module_of(case, steps, kill_at, **changes), ranks, callbacks, resumed if resumed.exists() else None,
            strategy or "ddp",
        )  # fmt: skip
        result = result_of(module)
        if strategy:
            module.policy.export(own / "policy", write=module.trainer.is_global_zero)
        if module.trainer.is_global_zero:
            torch.save(result, own / f"{ranks}.pt")


if __name__ == "__main__":
    main()
