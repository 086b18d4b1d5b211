"""What is asked: a concept and a problem that may test it.

A problem is identified by its ``uid`` alone. Nothing in the project ever looks a problem or a concept up by its text:
two quizzes may share a stem and two theorems a title.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True, slots=True)
class Concept:
    """One piece of knowledge: a definition or a theorem (``c_q`` in CORE, section 3).

    ``text`` is what the coach may put before a question. ``suspect`` marks a text that probably belongs to another
    concept, so that interventions can skip it.
    """

    uid: str
    name: str
    section: str
    text: str
    suspect: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its key.

    ``options`` are option texts without letters; empty for an open question. ``answer`` is the letter of the right
    option for a choice question, else the gold expression. ``permutable`` is False where an option speaks about other
    options ("all of the above"), so their order must stay. ``tags`` name the sets a problem is reported in.
    """

    uid: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    concept: Concept | None = None
    solution: str | None = None
    tags: tuple[str, ...] = ()
    permutable: bool = True

    @property
    def is_choice(self) -> bool:
        return bool(self.options)

    @property
    def letters(self) -> str:
        """The option letters of this problem, ``"ABCD"`` for four options."""
        return LETTERS[: len(self.options)]

    def permuted(self, order: Sequence[int]) -> Problem:
        """The same quiz with option ``order[i]`` moved to place ``i``; the key's letter follows its text."""
        if sorted(order) != list(range(len(self.options))):
            raise ValueError(f"{self.uid}: {list(order)} is no permutation of its {len(self.options)} options")
        gold = LETTERS[list(order).index(LETTERS.index(self.answer))]
        return replace(
            self,
            uid=f"{self.uid}#{''.join(map(str, order))}",
            options=tuple(self.options[i] for i in order),
            answer=gold,
        )
