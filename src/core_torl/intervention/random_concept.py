"""``intervention=random_concept``: some other quiz's concept. Is it the content that helps, or being coached at all?"""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.intervention.base import Encode, TextIntervention, concept_of, concepts_by_uid, others_of, rng_of
from core_torl.problem import Concept, Problem


class RandomConcept(TextIntervention):
    """A concept of another uid and text, drawn anew each time. Raises ValueError if there is only one concept."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        concepts = concepts_by_uid(problems)
        self.others = {uid: others_of(concept, concepts) for uid, concept in concepts.items()}
        if not all(self.others.values()):
            raise ValueError("intervention=random_concept: the training problems have one concept only; use more data")

    def text_for(self, problem: Problem, seed: int, encode: Encode) -> Concept:
        return rng_of("random_concept", seed).choice(self.others[concept_of(problem).uid])
