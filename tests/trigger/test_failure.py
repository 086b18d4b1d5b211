"""Guards when a coach is called: on failures at the concept, not on what a reward paid, a limit cut or a text mixed up."""

from __future__ import annotations

import pytest

from core_torl.problem import Concept, Problem
from core_torl.trajectory import Group, Sample, Score, Trajectory
from core_torl.trigger.failure import WHEN, Failure

QUIZ = Problem("q", "What?", "A", ("1", "2"), Concept("c", "norm", "s", "the norm"))
SUSPECT = Problem("q", "What?", "A", ("1", "2"), Concept("c", "norm", "s", "the trace", suspect=True))
RIGHT, WRONG, UNJUDGED, CUT = "right", "wrong", "unjudged", "wrong, cut by the limit"


def answer(kind: str, problem: Problem = QUIZ, value: float | None = None) -> Trajectory:
    paid = None if kind == UNJUDGED else value if value is not None else float(kind == RIGHT)
    score = Score(paid, kind == RIGHT, "timeout" if kind == UNJUDGED else kind)
    sample = Sample((5,), (-1.0,), "length" if kind == CUT else "eos")
    return Trajectory(problem, (1,), sample, "", (True,), score)


def group(*kinds: str, problem: Problem = QUIZ) -> Group:
    return Group(problem, [answer(kind, problem) for kind in kinds])


@pytest.mark.parametrize(
    ("answers", "all_wrong", "below_half", "always"),
    [
        ((WRONG,) * 4, True, True, True),
        ((WRONG, WRONG, WRONG, RIGHT), False, True, True),
        ((WRONG, WRONG, RIGHT, RIGHT), False, False, True),  # a half is not below a half
        ((RIGHT,) * 4, False, False, True),
        # Answers that nobody could judge are not there: neither wrong, nor part of the share.
        ((WRONG, UNJUDGED, UNJUDGED, UNJUDGED), True, True, True),
        ((WRONG, RIGHT, UNJUDGED, UNJUDGED), False, False, True),
        ((WRONG, RIGHT, RIGHT, UNJUDGED), False, False, True),
        ((UNJUDGED,) * 4, False, False, False),
    ],
)
def test_which_groups_fire(answers, all_wrong: bool, below_half: bool, always: bool):
    found = {when: Failure(when, pass_rate=0.5).fires(group(*answers)) for when in WHEN}
    assert found == {"all_wrong": all_wrong, "pass_rate": below_half, "never": False, "always": always}


def test_the_share_is_the_configured_one():
    one_of_four = group(WRONG, WRONG, WRONG, RIGHT)
    assert not Failure("pass_rate", pass_rate=0.25).fires(one_of_four)
    assert Failure("pass_rate", pass_rate=0.26).fires(one_of_four)
    # With 1 anything but a full group is a failure.
    assert Failure("pass_rate", pass_rate=1.0).fires(group(RIGHT, RIGHT, RIGHT, WRONG))
    assert not Failure("pass_rate", pass_rate=1.0).fires(group(RIGHT, RIGHT))


def test_answers_without_a_score_are_unjudged():
    unscored = answer(WRONG)
    unscored.score = None
    assert not Failure("always").fires(Group(QUIZ, [unscored, unscored]))


@pytest.mark.parametrize("when", ["all_wrong", "pass_rate", "always"])
def test_a_group_that_was_only_cut_off_has_not_failed_at_a_concept(when: str):
    cut = group(CUT, CUT, CUT, CUT)
    assert not Failure(when).fires(cut) and Failure(when).failed(cut)
    assert Failure(when, min_finished=0).fires(cut)


def test_the_gate_counts_judged_answers_that_ended_by_themselves():
    assert Failure(min_finished=1).fires(group(CUT, CUT, CUT, WRONG))
    assert not Failure(min_finished=2).fires(group(CUT, CUT, CUT, WRONG))
    assert Failure(min_finished=2).fires(group(CUT, CUT, WRONG, WRONG))
    # An unjudged answer ended, but says nothing about the concept.
    assert not Failure(min_finished=1).fires(group(CUT, CUT, UNJUDGED, UNJUDGED))


@pytest.mark.parametrize("when", ["all_wrong", "pass_rate", "always"])
def test_a_suspect_concept_is_left_alone_unless_asked_for(when: str):
    failed = group(WRONG, WRONG, problem=SUSPECT)
    assert not Failure(when).fires(failed) and Failure(when).failed(failed)
    assert Failure(when, skip_suspect=False).fires(failed)


def test_a_problem_without_a_concept_has_no_suspect_one():
    plain = Problem("q", "What?", "A", ("1", "2"))
    assert Failure().fires(group(WRONG, WRONG, problem=plain))


def test_right_and_wrong_count_and_not_what_a_reward_paid():
    """A random reward pays wrong answers 1 and right ones 0; the trigger must not follow it."""
    assert Failure().fires(Group(QUIZ, [answer(WRONG, value=1.0), answer(WRONG, value=0.0)]))
    assert not Failure().fires(Group(QUIZ, [answer(RIGHT, value=0.0), answer(WRONG, value=1.0)]))
    assert not Failure("pass_rate", pass_rate=0.5).fires(Group(QUIZ, [answer(RIGHT, value=0.0)] * 2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"when": "sometimes"}, "trigger.when='sometimes': use one of all_wrong, pass_rate, never, always"),
        ({"pass_rate": 0.0}, "trigger.pass_rate=0.0: a share in (0, 1]"),
        ({"pass_rate": 1.1}, "trigger.pass_rate=1.1: a share in (0, 1]"),
        ({"min_finished": -1}, "trigger.min_finished=-1: must be 0 (gate off) or larger"),
    ],
)
def test_values_out_of_range_are_refused(settings, says: str):
    with pytest.raises(ValueError) as error:
        Failure(**settings)
    assert str(error.value) == says
