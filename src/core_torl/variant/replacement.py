"""Which failed answers of a group give way, and what a primed answer in their place is worth.

The released code draws the places from Python's unseeded generator; here the choice is a pure function of its seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from core_torl.trajectory import Score, Trajectory


def choose(trajectories: Sequence[Trajectory], count: int, policy: str, seed: int) -> list[int]:
    """Places of ``count`` trajectories to replace, in ascending order; right answers are never given up for others.

    ``random``: uniformly (CORE, section 3); ``longest``: those with most tokens; ``truncated_first``: those cut by the
    token limit, then the others. Ties fall by the seed; answers that nobody could judge go last. Fewer are returned
    where fewer are not right.
    """
    places = [i for i, t in enumerate(trajectories) if not (t.score is not None and t.score.correct)]
    random.Random(seed).shuffle(places)
    if policy == "longest":
        places.sort(key=lambda i: -len(trajectories[i].token_ids))
    elif policy == "truncated_first":
        places.sort(key=lambda i: not trajectories[i].truncated)
    places.sort(key=lambda i: (score := trajectories[i].score) is None or score.value is None)
    return sorted(places[:count])


def with_bonus(score: Score, bonus: float, when: str) -> Score:
    """``R' = R + r_bonus`` (CORE, its method CR): always, only for a right answer, or never."""
    assert score.value is not None
    earned = bonus if when == "always" or (when == "only_if_correct" and score.correct) else 0.0
    return replace(score, value=score.value + earned, parts={**score.parts, "bonus": earned})
