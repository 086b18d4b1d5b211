"""``data=calculation_world``: open questions whose answer has to be computed, in one stage or in two."""

from __future__ import annotations

import random

from core_torl.data.base import ProblemSets
from core_torl.data.calculation_world.problems import ONE_STAGE, TWO_STAGE, make_problems, redraw_problem


class CalculationWorld:
    """Problems of the calculation world.

    ``two_stage_share`` of the ``train`` training problems need the first result for the second. The test sets
    ``one_stage`` and ``two_stage`` have ``test_per_stage`` problems each, with operands that no training problem has.
    """

    def __init__(
        self, two_stage_share: float = 0.5, train: int = 4000, test_per_stage: int = 140, seed: int = 0
    ) -> None:
        if not 0 <= two_stage_share <= 1:
            raise ValueError(f"data.two_stage_share={two_stage_share}: must lie in [0, 1]")
        # More would exhaust the smallest kind, the sums over a range.
        if not 1 <= train <= 8000:
            raise ValueError(f"data.train={train}: must lie in 1..8000")
        if not 1 <= test_per_stage <= 1000:
            raise ValueError(f"data.test_per_stage={test_per_stage}: must lie in 1..1000")
        self.two_stage_share, self.train, self.test_per_stage, self.seed = two_stage_share, train, test_per_stage, seed

    def load(self) -> ProblemSets:
        two = round(self.two_stage_share * self.train)
        train = make_problems(ONE_STAGE, self.train - two, self.seed, "train", test=False)
        train += make_problems(TWO_STAGE, two, self.seed, "train", test=False)
        random.Random(f"{self.seed}/order").shuffle(train)
        sets = {"one_stage": ONE_STAGE, "two_stage": TWO_STAGE}
        test = {
            name: make_problems(kinds, self.test_per_stage, self.seed, "test", test=True)
            for name, kinds in sets.items()
        }
        report: dict[str, object] = {
            "train": len(train), "train_two_stage": two, **{f"test/{name}": len(p) for name, p in test.items()},
        }  # fmt: skip
        return ProblemSets(train=train, test=test, report=report, redraw=redraw_problem)
