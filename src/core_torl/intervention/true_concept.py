"""``intervention=true_concept``: the concept that the quiz belongs to (CORE, section 3: ``p_c = c_q + q``)."""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.intervention.base import Encode, TextIntervention, concept_of, concepts_by_uid
from core_torl.problem import Concept, Problem


class TrueConcept(TextIntervention):
    """Raises ValueError if a training problem has no concept."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        concepts_by_uid(problems)

    def text_for(self, problem: Problem, seed: int, encode: Encode) -> Concept:
        return concept_of(problem)
