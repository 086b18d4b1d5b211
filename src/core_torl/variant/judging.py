"""Scores for one RL step's answers, and when too many of them have none to go on.

An answer without a score is either one that the reward could not judge or one whose sandbox failed. Both leave the loss
and the statistics of their group. Above a share of them the run stops: something is broken, and it is not the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core_torl.trajectory import Trajectory


class Judging:
    """Counts over all ranks and over every call of one RL step: two timeouts among two primed answers break nothing.

    ``sum_over_ranks(tensor)`` sums in place; every rank has to call ``score`` equally often, because one that stopped
    alone would leave the others waiting. ``max_excluded`` and ``max_aborted`` are shares, see ``conf/variant``.
    """

    def __init__(
        self,
        rl_step: int,
        max_excluded: float,
        max_aborted: float,
        sum_over_ranks: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.rl_step, self.max_excluded, self.max_aborted = rl_step, max_excluded, max_aborted
        self.sum_over_ranks = sum_over_ranks
        # Answers that a reward saw and could not judge, that it saw, that a sandbox lost, and all of them.
        self.counts = torch.zeros(4, dtype=torch.float64, device=device)

    def score(self, reward: Any, every: Sequence[Trajectory]) -> None:
        """Score in place. Raises RuntimeError when too many could not be judged, or were lost to the sandbox."""
        seen = [t for t in every if not t.aborted]
        for trajectory, score in zip(seen, reward.score(seen), strict=True):
            trajectory.score = score
        unjudged = sum(t.score is None or t.score.value is None for t in seen)
        counts = torch.tensor([unjudged, len(seen), len(every) - len(seen), len(every)])
        self.counts += self.sum_over_ranks(counts.to(self.counts))
        unjudged, judged, aborted, total = self.counts.tolist()
        if aborted > self.max_aborted * total:
            raise RuntimeError(
                f"{aborted / total:.0%} of the answers of RL step {self.rl_step} were lost because the sandbox failed "
                f"(variant.max_aborted={self.max_aborted}): mend the sandbox, give it more workers, or lower the load"
            )
        if unjudged > self.max_excluded * judged:
            raise RuntimeError(
                f"{unjudged / judged:.0%} of the trajectories of RL step {self.rl_step} could not be judged "
                f"(variant.max_excluded={self.max_excluded}): look at reward/outcome/*, mend the reward or raise "
                "reward.timeout_s"
            )
