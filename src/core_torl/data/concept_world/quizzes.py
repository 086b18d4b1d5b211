"""Quizzes of the embedded world: a concept's name, fresh operands, four options made from misconceptions.

The right value, the value of the concept's misconception and the values of other formulas over the same operands are
shuffled over A to D. Operands fall in a test or a training share by a hash of (shape, operands) alone, so a test quiz
has operands that no training quiz and no warm-start text of any concept ever used.
"""

from __future__ import annotations

import hashlib
import itertools
import random

from core_torl.data.concept_world.concepts import CONCEPTS, Shape, WorldConcept
from core_torl.problem import LETTERS, Concept, Problem

OPERAND_VALUES = range(7)
TEST_SHARE = 5  # one operand tuple in five belongs to the test share
OPTIONS = 4
_BY_UID = {c.uid: c for c in CONCEPTS}


def is_test_operands(shape: Shape, operands: dict[str, int]) -> bool:
    """Whether these operands are reserved for test quizzes; fixed for ever, independent of any seed."""
    digest = hashlib.sha256(shape.show(dict(operands)).encode()).digest()
    return digest[0] % TEST_SHARE == 0


def _usable(concept: WorldConcept, operands: dict[str, int], test: bool | None) -> bool:
    """In the wanted share, every number of both workings within the limit, and the two workings ending differently."""
    if test is not None and is_test_operands(concept.shape, operands) is not test:
        return False
    if concept.formula.value(operands) == concept.misconception.value(operands):
        return False
    return concept.formula.fits(operands) and concept.misconception.fits(operands)


def draw_operands(concept: WorldConcept, rng: random.Random, test: bool | None = None) -> dict[str, int]:
    """Random usable operands of the test share (True), the training share (False) or either (None)."""
    while True:
        operands = {x: rng.choice(OPERAND_VALUES) for x in concept.shape.letters}
        if _usable(concept, operands, test):
            return operands


def option_values(concept: WorldConcept, operands: dict[str, int], rng: random.Random) -> tuple[list[int], int]:
    """Four distinct values in random order and the place of the right one.

    The misconception is always among them; the others come from formulas of the same shape, then from neighbours.
    """
    right, wrong = concept.formula.value(operands), concept.misconception.value(operands)
    pool = [
        f.value(operands) for c in CONCEPTS if c.shape_name == concept.shape_name for f in (c.formula, c.misconception)
    ]
    pool = sorted({v for v in pool if abs(v) <= 99} - {right, wrong})
    rng.shuffle(pool)
    near = [v for d in range(1, 9) for v in (right + d, right - d) if v not in (right, wrong) and v not in pool]
    values = [right, wrong, *[*pool, *near][: OPTIONS - 2]]
    rng.shuffle(values)
    return values, values.index(right)


def question_text(name: str, operands: str) -> str:
    return f"What is the {name} of {operands} ?"


def make_quiz(concept: WorldConcept, operands: dict[str, int], rng: random.Random, uid: str) -> Problem:
    values, right = option_values(concept, operands, rng)
    return Problem(
        uid=uid,
        question=question_text(concept.name, concept.shape.show(dict(operands))),
        answer=LETTERS[right],
        options=tuple(map(str, values)),
        concept=Concept(concept.uid, concept.name, concept.section, concept.definition),
        solution=concept.formula.working(operands) + f" \\boxed{{{LETTERS[right]}}}",
        tags=("gap" if concept.gap else "mastered",),
    )


def make_quizzes(
    concepts: list[WorldConcept], per_concept: int, seed: int, split: str, test: bool | None
) -> list[Problem]:
    """Up to ``per_concept`` quizzes for each concept, no operands twice, the same for the same seed on every machine.

    A concept of two operands has fewer than fifty quizzes in all; it then gets all that there are.
    """
    quizzes: list[Problem] = []
    for concept in concepts:
        rng = random.Random(f"{seed}/{split}/{concept.uid}")
        letters = concept.shape.letters
        everything = list(itertools.product(OPERAND_VALUES, repeat=len(letters)))
        rng.shuffle(everything)
        fitting = (
            o for o in (dict(zip(letters, values, strict=True)) for values in everything) if _usable(concept, o, test)
        )
        for number, operands in enumerate(itertools.islice(fitting, per_concept)):
            quizzes.append(make_quiz(concept, operands, rng, f"{split}/{concept.uid}/{number}"))
    return quizzes


def redraw_quiz(problem: Problem, seed: int) -> Problem:
    """A quiz on the concept of ``problem`` with operands of the training share and options drawn anew.

    A pure function of (problem.uid, seed); the new uid is the old one, ``~`` and the seed's last six digits.

    Raises:
        ValueError: the problem's concept is not one of the embedded world.
    """
    concept = _BY_UID.get(problem.concept.uid) if problem.concept else None
    if concept is None:
        raise ValueError(f"{problem.uid}: not a quiz of the embedded world, its operands cannot be drawn anew")
    rng = random.Random(f"{seed}/redraw/{problem.uid}")
    operands = draw_operands(concept, rng, test=False)
    return make_quiz(concept, operands, rng, f"{problem.uid}~{seed % 10**6}")
