"""A policy of a few thousand parameters, its data and its modules: small enough for a test of the real loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from core_torl.data.concept_world.source import ConceptWorld
from core_torl.data.prompt import PromptTemplate
from core_torl.intervention.true_concept import TrueConcept
from core_torl.model.load import Policy
from core_torl.model.tiny import TinyArchitecture, build_tiny
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.objective.grpo import GRPO
from core_torl.problem import Problem
from core_torl.sampler.transformers import TransformersSampler
from core_torl.trajectory import Score, Trajectory
from core_torl.trigger.failure import Failure
from core_torl.variant.coached import Coached
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


RIGHT, WRONG, UNJUDGED = Score(1.0, True, "correct"), Score(0.0, False, "wrong"), Score(None, False, "timeout")
# What a rule gets: an answer, and its place among the answers of its prompt's kind (plain or primed) in this call.
Judge = Callable[[Trajectory, int], Score]


class Rule:
    """A reward by rule, one for answers under a plain prompt and one for primed ones; as it stands everybody fails."""

    def __init__(self, primed: Judge = lambda t, i: WRONG, plain: Judge = lambda t, i: WRONG) -> None:
        self.primed, self.plain = primed, plain
        self.tokenizer: Any = None  # set by build()

    def score(self, trajectories: list[Trajectory]) -> list[Score]:
        return [
            (self.plain if t.prompt_ids == TEMPLATE.encode(self.tokenizer, t.problem) else self.primed)(t, i)
            for i, t in enumerate(trajectories)
        ]

    def close(self) -> None:
        """Holds nothing."""


def load_problems() -> list[Problem]:
    return ConceptWorld(train_per_concept=2, test_per_concept=1).load().train[:20]


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return load_problems()


def make_policy(problems: list[Problem], seed: int = 0, scale: float = 1.0) -> Policy:
    """``scale`` above 1 gives distributions that depend on what was read; as initialised they are nearly uniform."""
    words = sorted({w for p in problems for w in TEMPLATE.user_text(p).split() if not w.lstrip("-").isdigit()})
    tokenizer = build_tokenizer(words)
    model = build_tiny(tokenizer, TinyArchitecture(layers=2, width=16, heads=2, mlp=32), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return Policy(model, tokenizer, adapted=False)


def build(
    problems: list[Problem],
    kind: type[PolicyGradient] = CoreBase,
    policy: Policy | None = None,
    objective: Any = None,
    reward: Any = None,
    max_new_tokens: int = 6,
    eos_ids: list[int] | None = None,
    sampling: dict[str, Any] | None = None,
    sampler: Callable[..., Any] = TransformersSampler,
    **changes: Any,
) -> PolicyGradient:
    coached = issubclass(kind, Coached)
    policy = policy or make_policy(problems, scale=10.0 if coached else 1.0)
    settings: dict[str, Any] = {
        "rl_steps": 4, "group_size": 4, "prompts_per_step": 4, "seed": 0, "temperature": 1.0, "fingerprint": {}, "lr": 1e-2,
        "problems": problems,
    }  # fmt: skip
    if coached:
        # Answers of six tokens are nearly all cut off: the gate against that has tests of its own.
        settings |= {"trigger": Failure(min_finished=0), "intervention": TrueConcept(problems)}
    reward = reward or (Rule() if coached else Evenness())
    if isinstance(reward, Rule):
        reward.tokenizer = policy.tokenizer
    settings_of_sampler = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids} | (sampling or {})
    return kind(
        policy=policy, sampler=sampler(policy.model, policy.tokenizer, **settings_of_sampler), reward_function=reward, objective=objective or GRPO(),
        encode=lambda p, c: TEMPLATE.encode(policy.tokenizer, p, c),
        encode_answer=lambda text: TEMPLATE.encode_answer(policy.tokenizer, text), **(settings | changes),
    )  # fmt: skip


@pytest.fixture
def make(problems: list[Problem]) -> Callable[..., Any]:
    return lambda *args, **changes: build(changes.pop("problems", problems), *args, **changes)


def watched(kind: type[PolicyGradient]) -> type[PolicyGradient]:
    """``kind`` that keeps every step's groups as they were sampled and as they were weighed, and its batch."""

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __init__(self, **settings: Any) -> None:
            self.sampled, self.weighed, self.batches = [], [], []
            super().__init__(**settings)

        def sample(self, *arguments):
            groups = super().sample(*arguments)
            self.sampled.append([list(g.trajectories) for g in groups])
            return groups

        def weigh(self, groups):
            self.weighed.append(groups)
            return super().weigh(groups)

        def learn(self, batch):
            self.batches.append(batch)
            super().learn(batch)

    return Watched


def meddled(kind: type[PolicyGradient], change: Callable[[Any], Any]) -> type[PolicyGradient]:
    """``kind`` whose primed samples are changed before anything is made of them; their scores stay."""

    class Meddled(kind):  # type: ignore[misc, valid-type]
        def coach(self, groups, counts):
            found = super().coach(groups, counts)
            for trajectory in (t for primed in found for t in primed.trajectories):
                trajectory.sample = change(trajectory.sample)
                trajectory.train_mask = (True,) * len(trajectory.token_ids)
            return found

    return Meddled


def other_ids(sample):
    return replace(sample, token_ids=tuple((i + 7) % 600 + 5 for i in sample.token_ids))


def shorter(sample):
    return replace(sample, token_ids=sample.token_ids[:-1], logprobs=sample.logprobs[:-1])


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
