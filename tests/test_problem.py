"""Guards problems and trajectories: the key follows its option, and a group is all wrong only if somebody was judged."""

from __future__ import annotations

import itertools

import pytest

from core_torl.problem import Problem
from core_torl.trajectory import Group, Sample, Score, Trajectory

QUIZ = Problem("quiz", "Which?", "C", ("w", "x", "right", "z"), tags=("gap",))


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_key_follows_its_option(order):
    moved = QUIZ.permuted(order)
    assert moved.options == tuple(QUIZ.options[i] for i in order)
    assert moved.options["ABCD".index(moved.answer)] == "right"
    assert (moved.question, moved.tags, moved.concept) == (QUIZ.question, QUIZ.tags, QUIZ.concept)


def test_permutations_have_names_of_their_own():
    names = {QUIZ.permuted(order).uid for order in itertools.permutations(range(4))}
    assert len(names) == 24 and QUIZ.uid not in names and all(n.startswith("quiz#") for n in names)
    assert QUIZ.options == ("w", "x", "right", "z"), "the quiz itself is left alone"


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4), (0, 1, 2, 3, 4), ()])
def test_no_permutation_is_a_one_line_error(order):
    with pytest.raises(ValueError, match="no permutation of its 4 options") as error:
        QUIZ.permuted(order)
    assert "\n" not in str(error.value)


def test_choice_and_open_questions():
    assert QUIZ.is_choice and QUIZ.letters == "ABCD"
    question = Problem("open", "How many?", "7")
    assert not question.is_choice and question.letters == ""


def trajectory(score: Score | None, finish="eos") -> Trajectory:
    return Trajectory(QUIZ, (1, 2), Sample((3, 4), (-1.0, -2.0), finish), "text", (True, True), score)


RIGHT, WRONG = Score(1.0, True, "right"), Score(0.0, False, "wrong")
UNJUDGED, NEVER = Score(None, False, "timeout"), None


@pytest.mark.parametrize(
    ("scores", "all_wrong"),
    [
        ([WRONG, WRONG], True),
        ([WRONG, RIGHT], False),
        ([WRONG, UNJUDGED, NEVER], True),
        ([UNJUDGED, UNJUDGED], False),
        ([NEVER], False),
        ([], False),
        ([UNJUDGED, RIGHT], False),
    ],
)
def test_a_group_is_all_wrong_if_all_that_were_judged_are(scores, all_wrong):
    assert Group(QUIZ, [trajectory(s) for s in scores]).all_wrong is all_wrong


def test_a_trajectory_shows_its_samples_tokens_and_whether_it_was_cut():
    assert trajectory(RIGHT).token_ids == (3, 4)
    assert [trajectory(RIGHT, f).truncated for f in ("eos", "stop", "abort", "length")] == [False, False, False, True]
