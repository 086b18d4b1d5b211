"""How much better than its group a trajectory did.

GRPO compares the N answers to one question with each other: an answer's advantage is its reward minus the group's mean,
divided by the group's standard deviation. Trajectories that could not be judged take no part in either.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, valid: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO's advantages (DeepSeekMath, eq. in 4.1.2; CORE section 3).

    rewards, valid: [groups, N]; a False in ``valid`` leaves the group's statistics and gets advantage 0. The standard
    deviation is the unbiased one, as in the published runs; ``normalize_std=False`` is Dr. GRPO. A group with fewer
    than two valid rewards, or with equal ones, gets zeros. Returns [groups, N] float32.
    """
    rewards, mask = rewards.float(), valid.to(torch.float32)
    rewards = torch.where(valid, rewards, torch.zeros_like(rewards))  # an unjudged reward may be NaN
    count = mask.sum(dim=1, keepdim=True)
    mean = (rewards * mask).sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (rewards - mean) * mask
    if normalize_std:
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    # One judged answer has nothing to be compared with; a constant group teaches nothing, whatever rounding leaves.
    highest = torch.where(valid, rewards, -torch.inf).max(dim=1, keepdim=True).values
    lowest = torch.where(valid, rewards, torch.inf).min(dim=1, keepdim=True).values
    return torch.where((count >= 2) & (highest > lowest), centred, torch.zeros_like(centred))
