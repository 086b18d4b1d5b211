"""``intervention=generic_hint``: one sentence for every quiz. Does being told to be careful do the same?"""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.intervention.base import Encode, TextIntervention
from core_torl.problem import Concept, Problem


class GenericHint(TextIntervention):
    """Raises ValueError if ``text`` is empty."""

    def __init__(self, problems: Sequence[Problem], text: str = "Recall the definition first .") -> None:
        del problems
        if not text.strip():
            raise ValueError("intervention.text is empty: write the hint, or use another intervention")
        self.text = text

    def text_for(self, problem: Problem, seed: int, encode: Encode) -> Concept:
        return Concept("hint", problem.concept.name if problem.concept else "", "", self.text)
