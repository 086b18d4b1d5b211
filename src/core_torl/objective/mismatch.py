"""How far the sampler's probabilities are from the trainer's, and what the loss makes of it.

An answer is drawn by one program and learned from by another: other kernels, another precision, truncated sampling or
weights one step older give the drawn tokens other probabilities than the trainer sees. The gradient is then one of
answers that the policy would have drawn in other proportions. The distance is measured in every RL step. The weight
``w = p_trainer / p_sampler`` corrects it: under it the mean over drawn answers is the mean over the policy's own.
p_trainer is the policy before the step's first update, so that staleness and mismatch are one and the same ratio and
PPO's clip keeps its own (decoupled PPO: Hilton et al., arXiv 2110.00641; AReaL, arXiv 2505.24298).

The product of an answer's weights (level "sequence") is exact, and wild on long answers. One weight a token ("token")
leaves the rest of the answer uncorrected, and is calm; "sequence_mean", the geometric mean, lies between them. To bound
their variance weights are cut at ``high`` ("truncate": truncated importance sampling, TIS), or what lies outside
[low, high] is dropped ("mask": IcePop, arXiv 2510.18855, for tokens; masked importance sampling, MIS, for answers).

Where sampling is truncated (top_p, top_k, min_p) the sampler's log-probs are those of the tokens that were left, so a
token's weight is the probability of all of them. What could not be drawn stays without a gradient: the corrected one is
the policy's own, restricted to the answers that can be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core_torl.objective.divergences import kl_estimate

CORRECTIONS = ("none", "truncate", "mask")
LEVELS = ("token", "sequence", "sequence_mean")
OUTSIDE = (0.9, 1.1)  # a ratio in here is numerical noise; what lies outside is counted, whatever the bounds are
# exp() of a larger log-ratio overflows. Smaller ones go to 0, as they should.
_MAX_LOG_RATIO = 20.0


@dataclass
class Mismatch:
    """Sums and extremes over compared tokens, all detached scalars; the ratio is p_trainer / p_sampler.

    ``gap_*`` is |log ratio|; ``kl_sum`` the k3 estimate of KL(sampler || trainer); ``sequence_ratio_*`` the extremes of
    the geometric means of answers, 0 and infinity where nothing was compared. A NaN makes its sum and its extremes NaN.
    """

    tokens: Tensor
    gap_sum: Tensor
    gap_max: Tensor
    kl_sum: Tensor
    ratio_sum: Tensor
    ratio_max: Tensor
    outside: Tensor
    sequence_ratio_max: Tensor
    sequence_ratio_min: Tensor


@torch.no_grad()
def measure(trainer: Tensor, sampler: Tensor, compared: Tensor) -> Mismatch:
    """The distance over the tokens ``compared``; inputs are [rows, answer length], what else they hold is ignored."""
    trainer, sampler = torch.where(compared, trainer, 0.0), torch.where(compared, sampler, 0.0)
    log_ratio = trainer - sampler
    ratio = torch.where(compared, log_ratio.clamp(max=_MAX_LOG_RATIO).exp(), 0.0)
    counts = compared.sum(dim=1)
    mean_ratio = (log_ratio.sum(dim=1) / counts.clamp(min=1)).clamp(max=_MAX_LOG_RATIO).exp()
    has_any = counts > 0
    return Mismatch(
        tokens=counts.sum().float(),
        gap_sum=log_ratio.abs().sum(),
        gap_max=log_ratio.abs().max(),
        kl_sum=kl_estimate(sampler, trainer, "k3").sum(),
        ratio_sum=ratio.sum(),
        ratio_max=ratio.max(),
        # A NaN lies in no interval, so it counts as outside.
        outside=(compared & ~((ratio >= OUTSIDE[0]) & (ratio <= OUTSIDE[1]))).sum().float(),
        sequence_ratio_max=torch.where(has_any, mean_ratio, 0.0).max(),
        sequence_ratio_min=torch.where(has_any, mean_ratio, torch.inf).min(),
    )


@dataclass(frozen=True)
class Correction:
    """The weight that each token's loss is multiplied by; see the module for what the options mean.

    Raises ValueError, naming ``objective.correction*``, for an unknown option or bounds that exclude an exact sampler.
    """

    kind: str = "none"
    level: str = "token"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in CORRECTIONS:
            raise ValueError(f"objective.correction={self.kind!r}: use one of {', '.join(CORRECTIONS)}")
        if self.level not in LEVELS:
            raise ValueError(f"objective.correction_level={self.level!r}: use one of {', '.join(LEVELS)}")
        if not 0 <= self.low <= 1:
            raise ValueError(
                f"objective.correction_low={self.low}: must lie in [0, 1], or answers of an exact sampler would leave"
            )
        if not self.high >= 1:
            raise ValueError(
                f"objective.correction_high={self.high}: must be at least 1, or answers of an exact sampler would lose "
                "weight; .inf is no bound"
            )

    @property
    def active(self) -> bool:
        return self.kind != "none"

    @torch.no_grad()
    def weights(self, trainer: Tensor, sampler: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the tokens in ``mask``, and where a bound changed them: [rows, answer length] both.

        trainer, sampler: log-probs before the step's first update and at sampling, [rows, answer length]. Elsewhere the
        weight is 1. A token without probability at the trainer weighs nothing, and with it its whole answer at the two
        sequence levels. NaN stays NaN: a sampler that reports one is broken, and to drop its tokens would hide it.
        """
        log_ratio = torch.where(mask, trainer - sampler, 0.0)
        if self.level != "token":
            log_ratio = log_ratio.sum(dim=1, keepdim=True)
            if self.level == "sequence_mean":
                log_ratio = log_ratio / mask.sum(dim=1, keepdim=True).clamp(min=1)
            log_ratio = log_ratio.expand(mask.shape)
        raw = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
        above = raw > self.high
        if self.kind == "mask":
            bounded = above | (raw < self.low)
            weights = raw.masked_fill(bounded, 0.0)
        else:
            bounded = above
            weights = raw.masked_fill(bounded, self.high)
        return torch.where(mask, weights, 1.0), bounded & mask
