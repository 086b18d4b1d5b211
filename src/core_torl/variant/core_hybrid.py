"""CORE-Hybrid: a share rho of the failed groups learns by replacement (CR), the rest by KL.

The released repository has such a mix, which is inert there. All primed answers still come from one sampler call.
"""

from __future__ import annotations

import random
from typing import Any

from core_torl.trajectory import Group
from core_torl.variant.core_cr import CoreCR
from core_torl.variant.core_kl import CoreKL
from core_torl.variant.policy_gradient import stream_seed


class CoreHybrid(CoreCR, CoreKL):
    """Raises ValueError if ``rho`` is not a share."""

    def __init__(self, *, rho: float = 0.5, **rest: Any) -> None:
        if not 0 <= rho <= 1:
            raise ValueError(f"variant.rho={rho}: a share between 0 (all KL) and 1 (all CR)")
        super().__init__(**rest)
        self.rho = rho

    def intervene(self, groups: list[Group]) -> list[Group]:
        fired = self.triggered(groups)
        replacing = {i for i in fired if self.replaces(i, groups[i])}
        primed = self.coach(groups, {i: self.replaced if i in replacing else self.references for i in fired})
        self.keep(groups, [p for p in primed if p.group not in replacing])
        return self.replace(groups, [p for p in primed if p.group in replacing])

    def replaces(self, place: int, group: Group) -> bool:
        """A seeded toss for each group, so that it does not depend on the others or on the number of ranks."""
        toss = random.Random(stream_seed(self.seed, "hybrid", self.rl_step, group.problem.uid, self.place(place)))
        return toss.random() < self.rho
