"""What a coach puts in front of a policy that has failed: the prompt is primed and sampled again, never in a test.

An intervention turns a problem into primed prompts. The usual one is the plain prompt's own template with a text in the
concept's place, so that nothing but this text differs between the two. Problems are known by their ``uid``: no text is
ever looked up by a text.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from core_torl.problem import Concept, Problem

Encode = Callable[[Problem, Concept | None], tuple[int, ...]]
EncodeAnswer = Callable[[str], tuple[int, ...]]
# Prompt token ids, and how many answers to draw from them.
PrimedPrompt = tuple[tuple[int, ...], int]


@runtime_checkable
class Intervention(Protocol):
    """An option of the config group ``intervention``. Its constructor sees the training problems and may refuse them.

    ``needs_primed_training`` says that answers to its prompts make no sense under the plain prompt.
    """

    needs_primed_training: bool

    def prime(
        self, problem: Problem, count: int, seed: int, encode: Encode, encode_answer: EncodeAnswer
    ) -> list[PrimedPrompt]:
        """Primed prompts for ``count`` answers in all; the same for the same seed. Empty: nothing can be done."""
        ...


class TextIntervention:
    """Base of the options that put one text in the concept's place of the template."""

    needs_primed_training = False

    def text_for(self, problem: Problem, seed: int, encode: Encode) -> Concept:
        """What fills the concept's place."""
        raise NotImplementedError

    def prime(
        self, problem: Problem, count: int, seed: int, encode: Encode, encode_answer: EncodeAnswer
    ) -> list[PrimedPrompt]:
        return [(encode(problem, self.text_for(problem, seed, encode)), count)]


def concept_of(problem: Problem) -> Concept:
    """The problem's own concept. Raises ValueError naming the problem if it has none."""
    if problem.concept is None:
        raise ValueError(
            f"data: problem {problem.uid} has no concept, which this intervention needs; use data with concepts or "
            "intervention=generic_hint"
        )
    return problem.concept


def concepts_by_uid(problems: Sequence[Problem]) -> dict[str, Concept]:
    """All concepts of these problems, known by uid. Raises ValueError if a problem has none, or one uid two texts."""
    found: dict[str, Concept] = {}
    for problem in problems:
        concept = concept_of(problem)
        if found.setdefault(concept.uid, concept) != concept:
            raise ValueError(f"data: concept {concept.uid} of problem {problem.uid} has two different texts")
    return found


def others_of(concept: Concept, concepts: dict[str, Concept]) -> list[Concept]:
    """Concepts that say something else, in the order of their uids.

    Data may give several uids one text (the published quizzes do): such a twin is the true concept after all.
    """
    return [c for _, c in sorted(concepts.items()) if c.text != concept.text]


def rng_of(*parts: int | str) -> random.Random:
    """A random stream with a name; the same on every machine."""
    return random.Random(hashlib.sha256("/".join(map(str, parts)).encode()).digest())


def in_place_of(concept: Concept, text: str) -> Concept:
    """A text that takes the concept's place in a prompt, under the concept's own name."""
    return replace(concept, text=text)
