"""``intervention=none``: nobody coaches. What variants without a coach have."""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.intervention.base import Encode, EncodeAnswer, PrimedPrompt
from core_torl.problem import Problem


class NoIntervention:
    needs_primed_training = False

    def __init__(self, problems: Sequence[Problem]) -> None:
        del problems

    def prime(
        self, problem: Problem, count: int, seed: int, encode: Encode, encode_answer: EncodeAnswer
    ) -> list[PrimedPrompt]:
        return []
