"""``reward=random``: a control that pays by the toss of a coin, so that nothing can be learned from being right.

If a policy improves under this reward, the gain does not come from the reward: it comes from the optimizer (clipping
and the policy's own habits), from the prompts, or from what a variant adds. Source: CORE, Table 5, "random reward"
(released: Bernoulli(0.5) for each response).

Only ``Score.value``, which training turns into advantages, is random. ``Score.correct`` and ``Score.outcome`` stay
true, so metrics and evaluation go on telling the truth. And because a CORE variant decides by ``Score.correct`` when to
intervene, **the trigger of a variant looks at correctness, not at the random value**.

The coins come from torch's global generator, which the spine seeds anew from (seed, step, rank) when an RL step begins:
a step can be repeated and resumed. An evaluation scores answers too and so uses up random numbers, but it stands
between two steps, and what it leaves behind is overwritten before training draws again. As the seed holds the rank, the
coins do depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from core_torl.reward.correctness import Correctness
from core_torl.trajectory import Score, Trajectory


class RandomReward(Correctness):
    """``correct`` with ``probability`` (0 to 1), else ``incorrect``, whatever the answer; None where Correctness is.

    The other arguments are those of Correctness, which still judges every answer for the metrics.

    Raises:
        ValueError: an argument is out of range; the message names its config key and the fix.
    """

    def __init__(self, probability: float = 0.5, **correctness: Any) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"reward.probability={probability}: a share between 0 and 1")
        super().__init__(**correctness)
        self.probability = float(probability)

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """One score per trajectory, in order; ``parts`` holds "random" unless the value is None."""
        scores = super().score(trajectories)
        # A coin for everyone, also for who cannot be judged: a timeout must not change what the others are paid.
        coins = (torch.rand(len(scores), dtype=torch.float64, device="cpu") < self.probability).tolist()
        return [self._paid(score, heads) for score, heads in zip(scores, coins, strict=True)]

    def _paid(self, score: Score, heads: bool) -> Score:
        if score.value is None:
            return score
        value = self.correct if heads else self.incorrect
        return replace(score, value=value, parts={"random": value})
