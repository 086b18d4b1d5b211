"""A varied problem is still the same question of the same concept, with a right key, and never a test question."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from core_torl.augmentation.variations import Augmentation
from core_torl.config.errors import UserError
from core_torl.data.base import ProblemSets
from core_torl.data.concept_world.concepts import CONCEPTS
from core_torl.data.concept_world.quizzes import draw_operands, is_test_operands, make_quiz, redraw_quiz
from core_torl.data.concept_world.source import ConceptWorld
from core_torl.problem import LETTERS, Concept, Problem

BY_UID = {c.uid: c for c in CONCEPTS}
QUIZ = Problem("q", "?", "B", ("zero", "one", "two", "three"))
ORDER, OPERANDS, BOTH = Augmentation(permute_options=True), Augmentation(redraw_operands=True), Augmentation(True, True)


@pytest.fixture(scope="module")
def sets() -> ProblemSets:
    return ConceptWorld(train_per_concept=3, test_per_concept=2).load()


def key_text(problem: Problem) -> str:
    return problem.options[LETTERS.index(problem.answer)]


def operands(problem: Problem) -> dict[str, int]:
    """Read back from the question's text, not from the program that wrote it."""
    assert problem.concept is not None
    shape, name = BY_UID[problem.concept.uid].shape, re.escape(problem.concept.name)
    pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(shape.pattern))
    found = re.fullmatch(f"What is the {name} of {pattern} \\?", problem.question)
    assert found, problem.question
    return {letter: int(value) for letter, value in found.groupdict().items()}


def is_of_the_test_share(problem: Problem) -> bool:
    assert problem.concept is not None
    return is_test_operands(BY_UID[problem.concept.uid].shape, operands(problem))


def test_with_both_off_a_problem_stays_itself(sets: ProblemSets):
    off = Augmentation()
    off.check(sets.train, None)
    assert not off.active
    assert all(off.apply(p, seed, sets.redraw) is p for seed, p in enumerate(sets.train))
    assert ORDER.active and OPERANDS.active


def test_the_key_follows_its_option_and_every_order_and_letter_comes_up():
    drawn = [ORDER.apply(QUIZ, seed, None) for seed in range(2400)]
    assert {key_text(p) for p in drawn} == {"one"}
    assert all(sorted(p.options) == sorted(QUIZ.options) for p in drawn)
    assert all(p.uid.startswith("q#") and p.question == QUIZ.question for p in drawn)
    orders = Counter(p.options for p in drawn)
    assert len(orders) == 24
    # 100 of each are expected; the bound is 4.5 standard deviations.
    assert all(abs(n - 100) < 4.5 * (100 * 23 / 24) ** 0.5 for n in orders.values())


def test_the_box_of_a_worked_solution_names_the_new_letter(sets: ProblemSets):
    for seed, problem in enumerate([*sets.train[:100], replace(QUIZ, solution="1 + 0 = 1, so \\boxed{B}")]):
        drawn = ORDER.apply(problem, seed, None)
        assert drawn.solution and drawn.solution.endswith(f"\\boxed{{{drawn.answer}}}")
        assert drawn.solution.split("\\boxed")[0] == (problem.solution or "").split("\\boxed")[0]
    assert all(ORDER.apply(QUIZ, seed, None).solution is None for seed in range(5))


def test_problems_with_one_seed_get_orders_of_their_own():
    orders = {ORDER.apply(replace(QUIZ, uid=f"q{i}"), 7, None).options for i in range(50)}
    assert len(orders) > 10


@pytest.mark.parametrize("problem", [replace(QUIZ, permutable=False), Problem("open", "?", "17")])
def test_a_problem_whose_order_must_stay_and_an_open_one_keep_it(problem: Problem):
    assert all(ORDER.apply(problem, seed, None) is problem for seed in range(20))


@pytest.mark.parametrize("augmentation", [OPERANDS, BOTH], ids=["operands", "both"])
def test_fresh_operands_are_never_test_operands_and_the_concept_and_the_key_are_right(
    augmentation: Augmentation, sets: ProblemSets
):
    rng = random.Random(0)
    changed = 0
    for seed in range(800):
        problem = rng.choice(sets.train)
        drawn = augmentation.apply(problem, seed, sets.redraw)
        assert drawn.concept is not None and drawn.concept == problem.concept
        assert drawn.tags == problem.tags and drawn.permutable == problem.permutable
        assert not is_of_the_test_share(drawn)
        concept, values = BY_UID[drawn.concept.uid], operands(drawn)
        assert key_text(drawn) == str(concept.formula.value(values))
        assert str(concept.misconception.value(values)) in drawn.options and len(set(drawn.options)) == 4
        assert drawn.uid.startswith(f"{problem.uid}~{seed % 10**6}")
        changed += drawn.question != problem.question
    assert changed > 700, "operands do vary"


def test_the_test_of_the_share_would_see_test_operands(sets: ProblemSets):
    assert all(is_of_the_test_share(p) for part in sets.test.values() for p in part)
    rng = random.Random(0)
    either = [make_quiz(c, draw_operands(c, rng), rng, "q") for c in CONCEPTS for _ in range(10)]
    assert any(is_of_the_test_share(p) for p in either), "operands of either share"


@pytest.mark.parametrize("augmentation", [ORDER, OPERANDS, BOTH], ids=["order", "operands", "both"])
def test_it_is_a_pure_function_of_problem_and_seed(augmentation: Augmentation, sets: ProblemSets):
    problem = sets.train[0]
    random.seed(1)
    first = [augmentation.apply(problem, seed, sets.redraw) for seed in range(30)]
    random.seed(2)
    backwards = [augmentation.apply(problem, seed, sets.redraw) for seed in reversed(range(30))]
    assert first == backwards[::-1]
    assert len({(p.question, p.options) for p in first}) > 10


def test_a_source_that_cannot_redraw_is_refused_in_one_line(sets: ProblemSets):
    with pytest.raises(UserError, match=r"augmentation\.redraw_operands=true.*set it to false") as caught:
        OPERANDS.check([QUIZ], None)
    assert "\n" not in str(caught.value)
    ORDER.check([QUIZ], None)
    BOTH.check(sets.train, sets.redraw)
    with pytest.raises(ValueError, match=r"augmentation\.redraw_operands"):
        OPERANDS.apply(QUIZ, 0, None)


def test_orders_that_nothing_can_change_are_refused():
    with pytest.raises(UserError, match=r"augmentation\.permute_options=true: no training problem"):
        ORDER.check([replace(QUIZ, permutable=False), Problem("open", "?", "17")], None)


@pytest.mark.parametrize("problem", [QUIZ, replace(QUIZ, concept=Concept("other/thing", "thing", "other", "?"))])
def test_a_quiz_of_another_source_cannot_be_redrawn(problem: Problem):
    with pytest.raises(ValueError, match="not a quiz of the embedded world"):
        redraw_quiz(problem, 0)
