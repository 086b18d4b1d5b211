"""``reward=shuffled``: a control that pays each group what it earned, but to the wrong answers.

The true rewards are permuted inside each group of answers to one prompt. Unlike ``reward=random`` this keeps the number
of paid answers of every group, so advantages are as large, and groups without a signal as frequent, as under the true
reward; only the link between an answer and its pay is cut. A gain that survives is not learned from the reward.

Only ``Score.value`` is shuffled. ``Score.correct`` and ``Score.outcome`` stay true, so metrics and evaluation go on
telling the truth, and **the trigger of a CORE variant looks at correctness, not at the shuffled value**.

A group is a run of trajectories with the same problem uid and the same prompt: answers that a coach drew under another
prompt are a group of their own, and one that is alone (CORE-CR with one replacement) keeps its true value. Two groups
of one problem that stand side by side (where a pass over the data ends and the next begins with the same problem) are
shuffled as one.

Permutations come from torch's global generator, which the spine seeds anew from (seed, step, rank) when an RL step
begins: a step can be repeated and resumed, and an evaluation between two steps changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch

from core_torl.reward.correctness import Correctness
from core_torl.trajectory import Score, Trajectory


class ShuffledReward(Correctness):
    """The values of Correctness, permuted inside each group; None stays where it is and takes no part.

    Takes the arguments of Correctness.

    Raises:
        ValueError: an argument is out of range; the message names its config key and the fix.
    """

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """One score per trajectory, in order; ``parts`` holds "shuffled" unless the value is None."""
        scores = super().score(trajectories)

        def group(place: int) -> tuple[str, tuple[int, ...]]:
            return trajectories[place].problem.uid, trajectories[place].prompt_ids

        shuffled = list(scores)
        for _, run in groupby(range(len(scores)), key=group):
            judged = [place for place in run if scores[place].value is not None]
            order = torch.randperm(len(judged), device="cpu").tolist()
            for place, source in zip(judged, (judged[i] for i in order), strict=True):
                value = scores[source].value
                assert value is not None
                shuffled[place] = replace(scores[place], value=value, parts={"shuffled": value})
        return shuffled
