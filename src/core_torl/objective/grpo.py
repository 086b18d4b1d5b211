"""GRPO: a clipped importance ratio times a group advantage, divided once by everything the step trains on.

The loss of a part of the batch is a **sum** divided by a denominator of the whole optimizer step, so adding up the
losses of the parts gives the same gradient however the batch is cut. (Averaging each part by its own token count, as
several frameworks did, weighs tokens by the company they keep.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core_torl.objective.advantages import group_advantages
from core_torl.objective.divergences import ESTIMATORS, kl_estimate
from core_torl.objective.token_batch import TokenBatch

NORMALIZERS = ("token", "sequence")


@dataclass
class Loss:
    """``total`` carries the gradient; ``metrics`` are sums over tokens that the caller divides by their counts."""

    total: Tensor
    policy: Tensor
    reference_kl: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    ratio_gap: Tensor
    clipped: Tensor
    old_kl: Tensor
    tokens: Tensor


class GRPO:
    """DeepSeekMath's GRPO as CORE and ToRL use it; pure functions of a TokenBatch.

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high] (equal: PPO; larger high: DAPO).
        normalize: "token" gives every trained token of the step the same weight, "sequence" every trajectory.
        normalize_std, advantage_eps: see group_advantages.
        kl_coef, kl_estimator: penalty towards the reference policy; 0 needs no reference.
        entropy_coef: bonus on the mean token entropy.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        normalize: str = "token",
        normalize_std: bool = True,
        advantage_eps: float = 1e-6,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
    ) -> None:
        if normalize not in NORMALIZERS:
            raise ValueError(f"objective.normalize={normalize!r}: use one of {', '.join(NORMALIZERS)}")
        if kl_estimator not in ESTIMATORS:
            raise ValueError(f"objective.kl_estimator={kl_estimator!r}: use one of {', '.join(ESTIMATORS)}")
        for key, value in (
            ("clip_low", clip_low),
            ("clip_high", clip_high),
            ("kl_coef", kl_coef),
            ("advantage_eps", advantage_eps),
        ):
            if value < 0:
                raise ValueError(f"objective.{key}={value}: must not be negative")
        if kl_estimator == "k1" and kl_coef > 0:
            # d/dtheta of -log r on the policy's own samples is the score function, whose mean is zero.
            raise ValueError(
                "objective.kl_estimator=k1 in the loss has a gradient of mean zero and pulls nowhere: use k3 or k2"
            )
        if clip_low >= 1:
            raise ValueError(f"objective.clip_low={clip_low}: must be below 1, or a ratio could be clipped to zero")
        self.clip_low, self.clip_high, self.normalize = clip_low, clip_high, normalize
        self.normalize_std, self.advantage_eps = normalize_std, advantage_eps
        self.kl_coef, self.kl_estimator, self.entropy_coef = kl_coef, kl_estimator, entropy_coef

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coef != 0

    def advantages(self, rewards: Tensor, valid: Tensor) -> Tensor:
        """[groups, N] -> [groups, N]."""
        return group_advantages(rewards, valid, normalize_std=self.normalize_std, eps=self.advantage_eps)

    def denominator(self, train_mask: Tensor) -> Tensor:
        """What one optimizer step divides by, for this rank's rows: trained tokens, or rows that have any. Scalar."""
        counts = train_mask.sum(dim=1)
        return (counts.sum() if self.normalize == "token" else (counts > 0).sum()).float()

    def _weights(self, train_mask: Tensor) -> Tensor:
        """Weight of each token before the division: [rows, answer length]."""
        weights = train_mask.float()
        return weights if self.normalize == "token" else weights / weights.sum(dim=1, keepdim=True).clamp(min=1)

    def loss(self, logprobs: Tensor, entropies: Tensor, batch: TokenBatch, denominator: Tensor) -> Loss:
        """The loss of these rows, already divided by the whole step's ``denominator``.

        logprobs, entropies: [rows, answer length] under the current policy, with gradient. ``batch.old_logprobs`` None
        means that the policy has not moved since sampling: the ratio is then exactly 1, with its gradient.
        """
        mask, weights = batch.train_mask, self._weights(batch.train_mask)
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        log_ratio = torch.where(mask, logprobs - old, 0.0)  # padding must not reach exp()
        ratio = log_ratio.exp()
        advantage = batch.advantages[:, None]
        clipped_ratio = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        per_token = -torch.minimum(ratio * advantage, clipped_ratio * advantage)
        policy = (per_token * weights).sum() / denominator
        total, reference_kl = policy, torch.zeros((), device=policy.device)
        if self.needs_reference:
            if batch.reference_logprobs is None:
                raise ValueError("objective.kl_coef > 0 needs reference log-probs in the batch")
            kl = kl_estimate(
                torch.where(mask, logprobs, 0.0), torch.where(mask, batch.reference_logprobs, 0.0), self.kl_estimator
            )
            reference_kl = (kl * weights).sum() / denominator
            total = total + self.kl_coef * reference_kl
        if self.needs_entropy:
            total = total - self.entropy_coef * (entropies * weights).sum() / denominator
        with torch.no_grad():
            trained = mask.float()
            outside = ((ratio * advantage) > (clipped_ratio * advantage)) & mask
            return Loss(
                total=total,
                policy=policy.detach(),
                reference_kl=reference_kl.detach(),
                ratio_sum=(ratio * trained).sum(),
                ratio_max=torch.where(mask, ratio, 0.0).max(),
                ratio_gap=torch.where(mask, (ratio - 1).abs(), 0.0).max(),
                clipped=outside.sum().float(),
                old_kl=((torch.expm1(-log_ratio) + log_ratio) * trained).sum(),
                tokens=trained.sum(),
            )
