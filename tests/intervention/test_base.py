"""Guards what all interventions promise: the concept alone differs, uids alone decide, counts and seeds hold."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from core_torl.config.build import build
from core_torl.config.schema import register
from core_torl.intervention.base import Intervention, concept_of, concepts_by_uid, in_place_of, others_of, rng_of
from core_torl.intervention.expert_prefix import ExpertPrefix
from core_torl.intervention.filler import Filler
from core_torl.intervention.random_concept import RandomConcept
from core_torl.intervention.same_section_concept import SameSectionConcept
from core_torl.intervention.true_concept import TrueConcept
from core_torl.problem import Concept

from .conftest import NAMES, PLAIN, concept, no_answer, quiz

CONF = Path(__file__).parents[2] / "conf"
TEXTS = [n for n in NAMES if n not in ("none", "expert_prefix")]


@functools.cache
def node(name: str) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("train", [f"intervention={name}"]).intervention


def option(name: str, problems) -> Intervention:
    """As a training run makes it, from its YAML file."""
    return build(node(name), problems)


def test_every_option_of_the_group_is_tested_here():
    assert {p.stem for p in (CONF / "intervention").glob("*.yaml")} == set(NAMES)


# ---- the contract of every option -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_option_keeps_the_contract(name: str, problems, encode, encode_answer):
    intervention = option(name, problems)
    assert isinstance(intervention, Intervention) and intervention.needs_primed_training is (name == "expert_prefix")
    for problem in problems[::7]:
        primed = intervention.prime(problem, 3, 11, encode, encode_answer)
        assert sum(n for _, n in primed) == (0 if name == "none" else 3), "as many answers as were asked for"
        assert all(n > 0 and ids and all(type(i) is int for i in ids) for ids, n in primed)
        assert all(isinstance(ids, tuple) and ids != encode(problem, None) for ids, _ in primed)
        again = option(name, problems).prime(problem, 3, 11, encode, encode_answer)
        assert primed == again, "a pure function of problem, count and seed"


@pytest.mark.parametrize("name", ["random_concept", "same_section_concept", "expert_prefix"])
def test_another_seed_draws_something_else(name: str, problems, encode, encode_answer):
    intervention = option(name, problems)
    drawn = {str(intervention.prime(problems[0], 2, seed, encode, encode_answer)) for seed in range(10)}
    assert len(drawn) > 1


@pytest.mark.parametrize("name", TEXTS)
def test_only_the_text_in_the_concepts_place_differs(name: str, problems, encode, tokenizer):
    """Cut the tokens of the text out of the primed prompt, and the plain prompt is left, token for token."""
    intervention = option(name, problems)
    for problem in problems[::5]:
        plain = encode(problem, None)
        ((primed, _),) = intervention.prime(problem, 1, 3, encode, no_answer)
        given = intervention.text_for(problem, 3, encode)
        text = tokenizer(PLAIN.concept.format(text=given.text), add_special_tokens=False)["input_ids"]
        assert len(primed) == len(plain) + len(text), "nothing else became longer or shorter"
        (start,) = [i for i in range(len(primed)) if primed[i : i + len(text)] == tuple(text)]
        assert primed[:start] + primed[start + len(text) :] == plain


@pytest.mark.parametrize("name", NAMES)
def test_quizzes_are_known_by_their_uid_and_not_by_their_text(name: str, encode, encode_answer):
    """Two quizzes with one stem: each gets what belongs to its own concept."""
    one, two, far = concept("one", "near"), concept("two", "near"), concept("far", "off")
    quizzes = [quiz("q1", one, "first \\boxed{A}"), quiz("q2", two, "second \\boxed{A}"), quiz("q3", far)]
    quizzes.append(quiz("q4", concept("farther", "off")))
    intervention = option(name, quizzes)
    first, second = (intervention.prime(q, 1, 5, encode, encode_answer) for q in quizzes[:2])
    assert quizzes[0].question == quizzes[1].question and quizzes[0].options == quizzes[1].options
    if name == "true_concept":
        assert (first, second) == ([(encode(quizzes[0], one), 1)], [(encode(quizzes[1], two), 1)])
    elif name == "same_section_concept":
        assert (first, second) == ([(encode(quizzes[0], two), 1)], [(encode(quizzes[1], one), 1)])
    elif name in ("worked_solution", "expert_prefix"):
        assert first != second


# ---- the pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TrueConcept, RandomConcept, SameSectionConcept, Filler])
def test_a_quiz_without_a_concept_is_named(kind):
    with pytest.raises(ValueError) as error:
        kind([quiz("q1", concept("a")), quiz("q2", None), quiz("q3", None)])
    assert str(error.value) == (
        "data: problem q2 has no concept, which this intervention needs; use data with concepts or "
        "intervention=generic_hint"
    )


@pytest.mark.parametrize("kind", [TrueConcept, RandomConcept, SameSectionConcept, Filler])
def test_two_texts_under_one_uid_are_refused(kind):
    with pytest.raises(ValueError) as error:
        kind([quiz("q1", concept("a", text="one")), quiz("q2", concept("b")), quiz("q3", concept("a", text="two"))])
    assert str(error.value) == "data: concept a of problem q3 has two different texts"


@pytest.mark.parametrize("name", ["worked_solution", "expert_prefix"])
def test_missing_solutions_are_counted_and_the_first_is_named(name: str):
    with pytest.raises(ValueError) as error:
        option(name, [quiz("q1", concept("a")), quiz("q2", concept("a"), None), quiz("q3", concept("a"), "")])
    assert str(error.value) == (
        f"intervention={name}: 2 of 3 training problems have no worked solution (the first is q2); use data with "
        "solutions, or intervention=true_concept"
    )


@pytest.mark.parametrize("name", ["random_concept", "same_section_concept"])
def test_a_single_concept_has_no_other(name: str):
    twin = quiz("q3", Concept("twin", "name", "s", "text of a"))  # another uid with the same text is no other concept
    for quizzes in ([quiz("q1", concept("a")), quiz("q2", concept("a"))], [quiz("q1", concept("a")), twin]):
        with pytest.raises(ValueError, match=f"^intervention={name}: .*one concept only; use more data$"):
            option(name, quizzes)


@pytest.mark.parametrize("name", ["none", "generic_hint"])
def test_options_that_need_nothing_take_any_problem(name: str, encode):
    bare = quiz("q", None, None)
    assert option(name, [bare]).prime(bare, 2, 0, encode, no_answer) is not None


def test_constructors_refuse_what_makes_no_sense():
    quizzes = [quiz("q1", concept("a")), quiz("q2", concept("b", "t"))]
    for make, says in (
        (lambda: Filler(quizzes, words=" "), "intervention.words is empty"),
        (lambda: SameSectionConcept(quizzes, alone="skip"), "intervention.alone='skip': use one of error, random"),
        (lambda: ExpertPrefix(quizzes, 0.0, 0.5), "intervention.shortest=0.0, intervention.longest=0.5"),
        (lambda: ExpertPrefix(quizzes, 0.6, 0.5), "0 < shortest <= longest < 1"),
        (lambda: ExpertPrefix(quizzes, 0.6, 1.0), "0 < shortest <= longest < 1"),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert says in str(error.value) and "\n" not in str(error.value)


def test_concepts_are_collected_once_and_found_by_uid():
    a, b = concept("a"), concept("b")
    assert concepts_by_uid([quiz("q1", b), quiz("q2", a), quiz("q3", b)]) == {"a": a, "b": b}
    assert concept_of(quiz("q", a)) is a


def test_others_have_another_uid_and_another_text():
    a, b, c, twin = concept("a"), concept("b"), concept("c"), concept("d", text="text of a")
    assert others_of(a, {x.uid: x for x in (twin, c, b, a)}) == [b, c]


def test_a_stream_depends_on_its_name_and_its_seed():
    draws = [rng_of(*parts).random() for parts in (("a", 1), ("a", 2), ("b", 1))]
    assert len(set(draws)) == 3 and rng_of("a", 1).random() == draws[0]


def test_a_text_in_a_concepts_place_keeps_its_name():
    a = concept("a")
    assert in_place_of(a, "words") == Concept("a", a.name, a.section, "words")
