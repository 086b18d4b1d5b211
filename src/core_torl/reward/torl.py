"""``reward=torl``: +1 for a right answer, -1 for any other, and, as an ablation, a penalty for code that does not run.

The answer is the last box that the policy wrote **outside** code and outside output blocks. A tool's output is never
read: observations are not in ``Trajectory.turns``. An output block that the policy made up itself, and a box in a
program or in a string that it prints, are no answers either; the released grader takes the last box wherever it stands,
also in a tool's output.

Source: ToRL, section 2.3.3, Tables 1 and 2. The paper's main runs have no penalty; the ablation (Figure 6) has -0.5.
Its wording and its released code differ in whom it hits, and so ``scope`` says it:

* ``failed_code``, the paper: a response that holds a program which did not run cleanly;
* ``no_success``, the code in effect: a response whose last run was not clean, and one that had nothing run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from core_torl.code_blocks import outside_blocks
from core_torl.reward.correctness import Correctness
from core_torl.trajectory import Score, ToolCall, Trajectory

SCOPES = ("failed_code", "no_success")


class TorlReward(Correctness):
    """Correctness of the answer outside all blocks, plus ``executability`` (0 or less) for those in ``scope``.

    The other arguments are those of Correctness.

    Raises:
        ValueError: an argument is out of range; the message names its config key and the fix.
    """

    def __init__(
        self,
        correct: float = 1.0,
        incorrect: float = -1.0,
        executability: float = 0.0,
        scope: str = "failed_code",
        **correctness: Any,
    ) -> None:
        if isinstance(executability, bool) or not (math.isfinite(executability) and executability <= 0):
            raise ValueError(f"reward.executability={executability}: a penalty, so 0 or less (the paper's is -0.5)")
        if scope not in SCOPES:
            raise ValueError(f"reward.scope={scope!r}: use {' or '.join(SCOPES)}")
        super().__init__(correct, incorrect, **correctness)
        self.executability, self.scope = float(executability), scope

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """One score per trajectory, in order; ``parts``: "correctness", "executability", unless the value is None.

        A trajectory whose sandbox failed earns None: that says nothing about the policy.
        """
        answers = [replace(t, text=answer_text(t.turns), turns=()) for t in trajectories]
        scores = super().score(answers)
        return [self._with_penalty(score, t.sample.calls) for score, t in zip(scores, trajectories, strict=True)]

    def _with_penalty(self, score: Score, calls: Sequence[ToolCall]) -> Score:
        if score.value is None:
            return score
        if any(call.status == "infrastructure" for call in calls):
            return replace(score, value=None, parts={})
        penalty = self.executability if in_scope(calls, self.scope) else 0.0
        return replace(score, value=score.value + penalty, parts={**score.parts, "executability": penalty})


def answer_text(turns: Sequence[str]) -> str:
    """What may hold the final answer: the turns without their python and output blocks, one after the other.

    Turn by turn, because a turn that asks for a run ends with an open output block, which must not swallow the next.
    """
    return "\n".join(outside_blocks(turn) for turn in turns)


def in_scope(calls: Sequence[ToolCall], scope: str) -> bool:
    """Whether a response that made ``calls`` is penalised."""
    if scope == "failed_code":
        return any(call.status != "ok" for call in calls)
    return not calls or calls[-1].status != "ok"
