"""Guards the controls that show a wrong concept: it is never the right one, under whatever uid."""

from __future__ import annotations

from collections import Counter

import pytest

from core_torl.intervention.random_concept import RandomConcept
from core_torl.intervention.same_section_concept import SameSectionConcept
from core_torl.intervention.true_concept import TrueConcept

from .conftest import concept, quiz


def test_the_true_concept_is_the_quizzes_own(problems, encode):
    intervention = TrueConcept(problems)
    for problem in problems:
        assert intervention.text_for(problem, 1, encode) is problem.concept


def test_a_random_concept_is_never_the_own_one_and_any_other(problems, encode):
    few = [quiz(f"q{i}", concept(f"c{i}", section=f"s{i % 2}")) for i in range(5)]
    intervention = RandomConcept(few)
    drawn = Counter(intervention.text_for(few[0], seed, encode).uid for seed in range(400))
    assert drawn.keys() == {"c1", "c2", "c3", "c4"} and min(drawn.values()) > 60
    again = RandomConcept(few[::-1])  # the order of the data decides nothing
    assert all(again.text_for(few[0], s, encode) == intervention.text_for(few[0], s, encode) for s in range(20))
    world = RandomConcept(problems)
    assert all(world.text_for(p, i, encode).uid != p.concept.uid for i, p in enumerate(problems))


def test_a_concept_of_the_same_section_is_a_neighbour(problems, encode):
    intervention = SameSectionConcept(problems)
    for seed, problem in enumerate(problems):
        given = intervention.text_for(problem, seed, encode)
        assert given.section == problem.concept.section and given.uid != problem.concept.uid
    drawn = {intervention.text_for(problems[0], seed, encode).uid for seed in range(300)}
    section = {p.concept.uid for p in problems if p.concept.section == problems[0].concept.section}
    assert drawn == section - {problems[0].concept.uid} and len(drawn) > 1


def test_the_same_text_under_another_uid_is_not_another_concept(encode):
    """The published quizzes give every run of a repeated title the same text."""
    quizzes = [quiz("q1", concept("a")), quiz("q2", concept("b", text="text of a")), quiz("q3", concept("c"))]
    for kind in (RandomConcept, SameSectionConcept):
        assert {kind(quizzes).text_for(quizzes[0], seed, encode).uid for seed in range(40)} == {"c"}


def test_a_concept_alone_in_its_section_is_refused_or_gets_any_other(encode):
    near = [quiz(f"q{i}", concept(f"c{i}", section="shared")) for i in range(3)]
    lonely = quiz("q9", concept("c9", section="own"))
    with pytest.raises(ValueError) as error:
        SameSectionConcept([*near, lonely])
    assert str(error.value) == (
        "intervention=same_section_concept: concept c9 has the section 'own' for itself; set intervention.alone=random "
        "or leave that section out"
    )
    intervention = SameSectionConcept([*near, lonely], alone="random")
    assert {intervention.text_for(lonely, s, encode).uid for s in range(60)} == {"c0", "c1", "c2"}
    assert {intervention.text_for(near[0], s, encode).uid for s in range(60)} == {"c1", "c2"}, "others keep theirs"
