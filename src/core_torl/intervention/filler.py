"""``intervention=filler``: words without content, as long as the concept would be. Is it the text, or its length?"""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.intervention.base import Encode, TextIntervention, concept_of, concepts_by_uid, in_place_of
from core_torl.problem import Concept, Problem


class Filler(TextIntervention):
    """``words``, repeated and cut until the primed prompt has as many tokens as with the true concept.

    With a tokenizer that splits words the nearest length is taken. Raises ValueError if a problem has no concept or
    ``words`` is empty.
    """

    def __init__(self, problems: Sequence[Problem], words: str = "the answer is one of the options and") -> None:
        concepts_by_uid(problems)
        if not words.split():
            raise ValueError("intervention.words is empty: give a few words without content")
        self.words = words.split()
        self._made: dict[str, str] = {}

    def text_for(self, problem: Problem, seed: int, encode: Encode) -> Concept:
        concept = concept_of(problem)
        if problem.uid not in self._made:  # a quiz's own: tokens may join at the borders
            self._made[problem.uid] = self._fit(problem, concept, encode)
        return in_place_of(concept, self._made[problem.uid])

    def _text(self, count: int) -> str:
        return " ".join(self.words[i % len(self.words)] for i in range(count))

    def _fit(self, problem: Problem, concept: Concept, encode: Encode) -> str:
        """The number of words whose prompt comes nearest in tokens, by bisection: more words never make it shorter."""
        wanted = len(encode(problem, concept))

        def length(count: int) -> int:
            return len(encode(problem, in_place_of(concept, self._text(count))))

        low, high = 1, 2
        while length(high) < wanted:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if length(middle) < wanted else (low, middle)
        return self._text(min((low, high), key=lambda count: abs(length(count) - wanted)))
