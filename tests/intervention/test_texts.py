"""Guards the controls in the concept's place: filler as long as the concept, a hint, the quiz's own solution."""

from __future__ import annotations

import re
from functools import partial

import pytest

from core_torl.intervention.filler import Filler
from core_torl.intervention.generic_hint import GenericHint
from core_torl.intervention.none import NoIntervention
from core_torl.intervention.worked_solution import WorkedSolution
from core_torl.model.tiny_tokenizer import build_tokenizer

from .conftest import CHAT_TEMPLATE, concept, no_answer, quiz


def test_filler_is_as_long_as_the_concept_in_tokens_that_are_words(problems, encode):
    intervention = Filler(problems)
    lengths = set()
    for problem in problems:
        ((primed, _),) = intervention.prime(problem, 2, 0, encode, no_answer)
        assert len(primed) == len(encode(problem, problem.concept))
        lengths.add(len(primed))
    assert len(lengths) > 3, "concepts differ in length, and so does their filler"


def test_filler_comes_near_where_a_word_is_many_tokens(problems, template):
    """With a token a byte, no number of words may fit exactly: the nearest is half a word away at most."""
    bytes_only = build_tokenizer([])
    bytes_only.chat_template = CHAT_TEMPLATE
    encode = partial(template.encode, bytes_only)
    intervention = Filler(problems)
    for problem in problems[::3]:
        ((primed, _),) = intervention.prime(problem, 1, 0, encode, no_answer)
        wanted = len(encode(problem, problem.concept))
        assert wanted - len(encode(problem, None)) > 40 and abs(len(primed) - wanted) <= len(" options") / 2


def test_filler_says_nothing(problems, encode):
    words = ["the", "answer", "is", "one", "of", "the", "options", "and"]
    for problem in problems[::3]:
        text = Filler(problems).text_for(problem, 0, encode).text
        assert re.fullmatch("[a-z ]+", text), "no number, no formula"
        assert text.split() == [words[i % len(words)] for i in range(len(text.split()))]
        assert problem.concept.name not in text


@pytest.mark.parametrize("length", [1, 2, 3, 40])
def test_filler_fits_concepts_of_any_length(length: int, encode):
    problem = quiz("q", concept("c", text=" ".join(["trace"] * length)))
    text = Filler([problem]).text_for(problem, 0, encode).text
    assert len(text.split()) == length


def test_filler_of_ones_own_words(encode):
    problem = quiz("q", concept("c", text="trace trace trace"))
    assert Filler([problem], words="one of").text_for(problem, 0, encode).text == "one of one"


def test_a_hint_is_the_same_for_every_quiz(problems, encode):
    intervention = GenericHint(problems, "Recall the definition first .")
    assert {intervention.text_for(p, i, encode).text for i, p in enumerate(problems)} == {
        "Recall the definition first ."
    }
    with pytest.raises(ValueError, match=r"^intervention\.text is empty: write the hint"):
        GenericHint(problems, " ")


def test_a_worked_solution_is_the_quizzes_own(problems, encode):
    intervention = WorkedSolution(problems)
    for problem in problems:
        assert intervention.text_for(problem, 0, encode).text == problem.solution
    first, second = [p for p in problems if p.concept == problems[0].concept][:2]
    assert first.solution != second.solution, "the solution belongs to the quiz and not to its concept"


def test_nobody_coaches(problems, encode):
    assert NoIntervention(problems).prime(problems[0], 4, 0, encode, no_answer) == []
