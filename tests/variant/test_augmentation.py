"""Training on varied problems: each draw is another one, a run can be repeated, and ranks do not matter."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from core_torl.augmentation.variations import Augmentation
from core_torl.data.concept_world.quizzes import redraw_quiz
from core_torl.problem import Problem
from core_torl.variant.core_base import CoreBase
from core_torl.variant.policy_gradient import PolicyGradient

from .conftest import fit, same, weights


class Note(CoreBase):
    """Keeps every sampled (problem, prompt) in order."""

    def weigh(self, groups):
        self.seen = [*getattr(self, "seen", []), *((g.problem, g.trajectories[0].prompt_ids) for g in groups)]
        return super().weigh(groups)


def augment(permute_options: bool = True, redraw_operands: bool = True) -> Callable[[Problem, int], Problem]:
    augmentation = Augmentation(permute_options, redraw_operands)
    return lambda problem, seed: augmentation.apply(problem, seed, redraw_quiz)


def passes_over_four(make, problems, **changes) -> Note:
    """Four steps over four problems: every problem once in each."""
    return fit(make(Note, problems=problems[:4], **changes))


def prompts_of(module: Note, problem: Problem) -> list[tuple[int, ...]]:
    return [prompt for seen, prompt in module.seen if seen.uid.split("~")[0].split("#")[0] == problem.uid]


@pytest.mark.parametrize("kinds", [(True, False), (False, True), (True, True)], ids=["order", "operands", "both"])
def test_two_passes_over_a_problem_ask_different_things_with_augmentation_and_the_same_without(make, problems, kinds):
    plain = passes_over_four(make, problems)
    varied = passes_over_four(make, problems, augment=augment(*kinds))
    for problem in problems[:4]:
        assert len(prompts_of(plain, problem)) == 4 and len(set(prompts_of(plain, problem))) == 1
        assert len(prompts_of(varied, problem)) == 4 and len(set(prompts_of(varied, problem))) > 1
    # The same problems in the same order: what differs is how they are asked.
    assert [p.concept for p, _ in varied.seen] == [p.concept for p, _ in plain.seen]
    assert varied.problems == plain.problems, "the training set itself stays as it is"


def test_a_run_can_be_repeated_and_another_seed_asks_other_things(make, problems):
    one, two = (passes_over_four(make, problems, augment=augment()) for _ in range(2))
    other = passes_over_four(make, problems, augment=augment(), seed=1)
    assert one.seen == two.seen and same(weights(one), weights(two))
    assert sorted(p for _, p in one.seen) != sorted(p for _, p in other.seen)


def test_an_augmentation_that_is_off_changes_nothing(make, problems):
    plain, off = passes_over_four(make, problems), passes_over_four(make, problems, augment=augment(False, False))
    assert plain.seen == off.seen and same(weights(plain), weights(off))


def test_what_is_asked_depends_on_the_step_alone_not_on_the_number_of_ranks(make, monkeypatch):
    module = make(augment=augment())

    def asked(step: int, ranks: int) -> list[Problem]:
        shares = []
        for rank in range(ranks):
            trainer = SimpleNamespace(world_size=ranks, global_rank=rank)
            monkeypatch.setattr(PolicyGradient, "trainer", trainer)
            monkeypatch.setattr(PolicyGradient, "global_rank", rank)
            shares.append(module._problems_of(step))
        return [shares[i % ranks][i // ranks] for i in range(sum(map(len, shares)))]

    assert asked(2, 1) == asked(2, 2) == asked(2, 4)
    assert asked(2, 1) != asked(3, 1)
