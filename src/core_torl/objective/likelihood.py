"""Supervised fine-tuning as an objective: make the given answers likelier, whatever they earned.

It is the baseline that the CORE paper sets beside reinforcement learning. Written as an objective it runs through the
same spine, with the same minibatches, optimizer and denominators.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from core_torl.objective.grpo import GRPO, Loss
from core_torl.objective.token_batch import TokenBatch


class Likelihood(GRPO):
    """Mean negative log-likelihood of the trained tokens; nothing is clipped or compared.

    ``normalize``, ``kl_coef``, ``kl_estimator``: as in GRPO. On given answers the last two are a penalty for moving
    away from the reference there, not an estimate of the KL divergence.
    """

    def __init__(self, normalize: str = "token", kl_coef: float = 0.0, kl_estimator: str = "k3") -> None:
        super().__init__(normalize=normalize, kl_coef=kl_coef, kl_estimator=kl_estimator)

    def advantages(self, rewards: Tensor, valid: Tensor) -> Tensor:
        """1 for every answer: [groups, N] -> [groups, N]."""
        return torch.ones_like(rewards)

    def loss(self, logprobs: Tensor, entropies: Tensor, batch: TokenBatch, denominator: Tensor) -> Loss:
        """``-sum(weight * log-prob) / denominator`` plus the penalty; logprobs: [rows, answer length]."""
        # Without an advantage GRPO's own term is zero, and so is its gradient: what is left is the penalty. (With an
        # advantage of 1 its gradient would be this one until the first optimizer step only, and then be clipped.)
        neutral = replace(batch, advantages=torch.zeros_like(batch.advantages))
        loss = super().loss(logprobs, entropies, neutral, denominator)
        weights = self._weights(batch.train_mask)
        likelihood = -(torch.where(batch.train_mask, logprobs, 0.0) * weights).sum() / denominator
        loss.total = loss.total + likelihood
        loss.policy = likelihood.detach()
        return loss
