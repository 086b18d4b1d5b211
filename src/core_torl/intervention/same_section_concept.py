"""``intervention=same_section_concept``: a neighbour's concept, close in topic and wrong for the quiz."""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.intervention.base import Encode, TextIntervention, concept_of, concepts_by_uid, others_of, rng_of
from core_torl.problem import Concept, Problem

ALONE = ("error", "random")


class SameSectionConcept(TextIntervention):
    """Another concept of the quiz's own section.

    ``alone`` says what to do with a concept that has its section for itself: "error" refuses the data, "random" takes a
    concept of any other section. Raises ValueError accordingly.
    """

    def __init__(self, problems: Sequence[Problem], alone: str = "error") -> None:
        if alone not in ALONE:
            raise ValueError(f"intervention.alone={alone!r}: use one of {', '.join(ALONE)}")
        concepts = concepts_by_uid(problems)
        self.others: dict[str, list[Concept]] = {}
        for uid, concept in concepts.items():
            rest = others_of(concept, concepts)
            if not rest:
                raise ValueError("intervention=same_section_concept: there is one concept only; use more data")
            near = [c for c in rest if c.section == concept.section]
            if not near and alone == "error":
                raise ValueError(
                    f"intervention=same_section_concept: concept {uid} has the section {concept.section!r} for itself; "
                    "set intervention.alone=random or leave that section out"
                )
            self.others[uid] = near or rest

    def text_for(self, problem: Problem, seed: int, encode: Encode) -> Concept:
        return rng_of("same_section_concept", seed).choice(self.others[concept_of(problem).uid])
