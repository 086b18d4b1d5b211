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
from core_torl.objective.mismatch import Correction
from core_torl.objective.token_batch import TokenBatch

NORMALIZERS = ("token", "sequence")
GUIDED_RATIOS = ("clip", "shaping")
# exp() of a larger log-ratio overflows; a guided one has no natural bound.
_MAX_LOG_RATIO = 20.0


@dataclass
class Loss:
    """``total`` carries the gradient; the others are sums over tokens that the caller divides by their counts.

    ``foreign_*`` speak of rows that were sampled under a primed prompt: their ratio there is the true one, trained
    prompt over primed prompt, whatever the loss makes of it. The other ratios leave guided rows out, which start off 1;
    ``own_tokens`` counts the tokens of the rest. ``weighed_tokens`` are those that a correction weighs, ``weight_sum``
    adds up their weights, ``bounded`` counts those whose weight a bound changed; all 0 without a correction.
    """

    total: Tensor
    policy: Tensor
    reference_kl: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    ratio_gap: Tensor
    clipped: Tensor
    old_kl: Tensor
    tokens: Tensor
    own_tokens: Tensor
    foreign_tokens: Tensor
    foreign_gap: Tensor
    foreign_ratio_sum: Tensor
    foreign_ratio_max: Tensor
    foreign_clipped: Tensor
    weighed_tokens: Tensor
    weight_sum: Tensor
    bounded: Tensor


class GRPO:
    """DeepSeekMath's GRPO as CORE and ToRL use it; pure functions of a TokenBatch.

    Args:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high] (equal: PPO; larger high: DAPO).
        normalize: "token" gives every trained token of the step the same weight, "sequence" every trajectory.
        normalize_std, advantage_eps: see group_advantages.
        kl_coef, kl_estimator: penalty towards the reference policy; 0 needs no reference.
        entropy_coef: bonus on the mean token entropy.
        guided_ratio, shaping_gamma: for rows with behaviour "guided". "clip": the importance ratio p(y|q) /
            p_old(y|p_c), clipped like any other. "shaping": p(y|q) / (p(y|q) + shaping_gamma) instead of a ratio
            (the policy shaping of LUFFY), which keeps a gradient on tokens that the plain prompt makes unlikely.
        correction, correction_level, correction_low, correction_high: see core_torl.objective.mismatch. The weight
            multiplies all of a token's loss, penalty and entropy included, since all of it is a mean over tokens that
            the sampler drew. Foreign rows are left alone: they were drawn under another prompt, and guided_ratio is
            their answer to that. A token that the mask drops stays in the denominator: to divide by what is left would
            make the step larger the worse the sampler is, and would need every weight of the step, on every rank,
            before its first part. (TRL does the same; verl and slime take dropped tokens out.)
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
        guided_ratio: str = "clip",
        shaping_gamma: float = 0.1,
        correction: str = "none",
        correction_level: str = "token",
        correction_low: float = 0.5,
        correction_high: float = 2.0,
    ) -> None:
        if normalize not in NORMALIZERS:
            raise ValueError(f"objective.normalize={normalize!r}: use one of {', '.join(NORMALIZERS)}")
        if kl_estimator not in ESTIMATORS:
            raise ValueError(f"objective.kl_estimator={kl_estimator!r}: use one of {', '.join(ESTIMATORS)}")
        if guided_ratio not in GUIDED_RATIOS:
            raise ValueError(f"objective.guided_ratio={guided_ratio!r}: use one of {', '.join(GUIDED_RATIOS)}")
        if shaping_gamma <= 0:
            raise ValueError(f"objective.shaping_gamma={shaping_gamma}: must be larger than 0")
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
        self.guided_ratio, self.shaping_gamma = guided_ratio, shaping_gamma
        self.correction = Correction(correction, correction_level, correction_low, correction_high)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coef != 0

    @property
    def corrects(self) -> bool:
        """Whether the loss itself weighs the step from the policy that answered to the trainer's before its update."""
        return self.correction.active

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
        means that the policy has not moved in this step: its ratio is then exactly 1, with its gradient. Guided rows
        take the log-probs of their primed prompt instead.
        """
        mask, weights = batch.train_mask, self._weights(batch.train_mask)
        before = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        old = torch.where(batch.guided[:, None], batch.sampled_logprobs, before)
        alive, weighed, bounded = mask, torch.zeros_like(mask), torch.zeros_like(mask)
        correction = torch.ones_like(weights)
        if self.correction.active:
            weighed = mask & ~batch.foreign[:, None]
            correction, bounded = self.correction.weights(before, batch.sampled_logprobs, weighed)
            weights = weights * correction
            alive = mask & (weights != 0)  # a log-prob of minus infinity weighs 0, and 0 times NaN would be NaN
        log_ratio = torch.where(alive, logprobs - old, 0.0).clamp(max=_MAX_LOG_RATIO)  # padding must not reach exp()
        ratio = log_ratio.exp()
        advantage = batch.advantages[:, None]
        clipped_ratio = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        per_token = -torch.minimum(ratio * advantage, clipped_ratio * advantage)
        if self.guided_ratio == "shaping":
            probability = torch.where(alive, logprobs, 0.0).exp()
            shaped = -probability / (probability + self.shaping_gamma) * advantage
            per_token = torch.where(batch.guided[:, None], shaped, per_token)
        policy = (per_token * weights).sum() / denominator
        total, reference_kl = policy, torch.zeros((), device=policy.device)
        if self.needs_reference:
            if batch.reference_logprobs is None:
                raise ValueError("objective.kl_coef > 0 needs reference log-probs in the batch")
            kl = kl_estimate(
                torch.where(alive, logprobs, 0.0), torch.where(alive, batch.reference_logprobs, 0.0), self.kl_estimator
            )
            reference_kl = (kl * weights).sum() / denominator
            total = total + self.kl_coef * reference_kl
        if self.needs_entropy:
            total = total - self.entropy_coef * (torch.where(alive, entropies, 0.0) * weights).sum() / denominator
        with torch.no_grad():
            trained, own = mask.float(), mask & ~batch.guided[:, None]
            outside = ((ratio * advantage) > (clipped_ratio * advantage)) & mask
            if self.guided_ratio == "shaping":  # nothing is clipped there
                outside &= own
            foreign = mask & batch.foreign[:, None]
            gap = torch.where(foreign, batch.sampled_logprobs - logprobs, 0.0)
            true_ratio = torch.where(foreign, (-gap).clamp(max=_MAX_LOG_RATIO).exp(), 0.0)
            return Loss(
                total=total,
                policy=policy.detach(),
                reference_kl=reference_kl.detach(),
                ratio_sum=(ratio * own).sum(),
                ratio_max=torch.where(own, ratio, 0.0).max(),
                ratio_gap=torch.where(own, (ratio - 1).abs(), 0.0).max(),
                clipped=(outside & own).sum().float(),
                old_kl=((torch.expm1(-log_ratio) + log_ratio) * own).sum(),
                tokens=trained.sum(),
                own_tokens=own.sum().float(),
                foreign_tokens=foreign.sum().float(),
                foreign_gap=gap.sum(),
                foreign_ratio_sum=true_ratio.sum(),
                foreign_ratio_max=true_ratio.max(),
                foreign_clipped=(outside & foreign).sum().float(),
                weighed_tokens=weighed.sum().float(),
                weight_sum=torch.where(weighed, correction, 0.0).sum(),
                bounded=bounded.sum().float(),
            )
