"""A policy of a few thousand parameters, its data and its modules: small enough for a test of the real loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from core_torl.data.concept_world.source import ConceptWorld
from core_torl.data.prompt import PromptTemplate
from core_torl.model.load import Policy
from core_torl.model.tiny import TinyArchitecture, build_tiny
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.objective.grpo import GRPO
from core_torl.problem import Problem
from core_torl.sampler.transformers import TransformersSampler
from core_torl.trajectory import Score, Trajectory
from core_torl.variant.core_base import CoreBase
from core_torl.variant.policy_gradient import PolicyGradient

TEMPLATE = PromptTemplate(
    "plain", "{concept}Question: {question}\n{options}Answer:", "{concept}{question}", "{text}\n", "{letter}. {text}\n"
)


class Evenness:
    """A dense reward that an untrained policy can earn: the share of even ids in an answer; above a half is right."""

    def __init__(self, excluded: Callable[[Trajectory], bool] = lambda _: False) -> None:
        self.excluded = excluded

    def score(self, trajectories: list[Trajectory]) -> list[Score]:
        return [self._score(t) for t in trajectories]

    def _score(self, trajectory: Trajectory) -> Score:
        if self.excluded(trajectory):
            return Score(None, False, "timeout")
        share = sum(i % 2 == 0 for i in trajectory.token_ids) / len(trajectory.token_ids)
        return Score(share, share > 0.5, "correct" if share > 0.5 else "wrong")

    def close(self) -> None:
        """Holds nothing."""


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return ConceptWorld(train_per_concept=2, test_per_concept=1).load().train[:20]


def make_policy(problems: list[Problem], seed: int = 0) -> Policy:
    words = sorted({w for p in problems for w in TEMPLATE.user_text(p).split() if not w.lstrip("-").isdigit()})
    tokenizer = build_tokenizer(words)
    return Policy(
        build_tiny(tokenizer, TinyArchitecture(layers=2, width=16, heads=2, mlp=32), seed), tokenizer, adapted=False
    )


@pytest.fixture
def make(problems: list[Problem]) -> Callable[..., PolicyGradient]:
    def build(
        kind: type[PolicyGradient] = CoreBase,
        policy: Policy | None = None,
        objective: Any = None,
        reward: Any = None,
        **changes: Any,
    ) -> PolicyGradient:
        policy = policy or make_policy(problems)
        settings: dict[str, Any] = {
            "rl_steps": 4, "group_size": 4, "prompts_per_step": 4, "seed": 0, "temperature": 1.0, "fingerprint": {}, "lr": 1e-2,
        }  # fmt: skip
        sampler = TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=6)
        return kind(
            policy=policy, sampler=sampler, reward_function=reward or Evenness(), objective=objective or GRPO(),
            problems=changes.pop("problems", problems), encode=lambda p, c: TEMPLATE.encode(policy.tokenizer, p, c), **(settings | changes),
        )  # fmt: skip

    return build


def fit(module: PolicyGradient, callbacks: list[pl.Callback] | None = None, ckpt: Path | None = None) -> PolicyGradient:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=callbacks or [], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=str(ckpt) if ckpt else None, weights_only=True if ckpt else None)
    return module


def weights(module: PolicyGradient) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
