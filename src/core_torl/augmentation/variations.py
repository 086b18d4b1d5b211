"""Variations of a training problem: the same concept asked with other operands, or with its options in another order.

CORE gives a policy more than a quiz: a concept's text, and answers written under it. A fair objection is that any
richer data would have helped. These variations are the answer in the form of an experiment: each time an RL step draws
a training problem it is put anew, at no other cost and with no concept in the prompt. What a method gains beyond a run
with variations is not owed to variety.

A variation is a pure function of (problem, seed). Test problems never pass through here, and operands come from the
training share alone, so that the test set stays unseen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from core_torl.config.errors import UserError
from core_torl.problem import Problem

#: (problem, seed) -> the same concept with fresh operands; see ``core_torl.data.base.ProblemSets.redraw``.
Redraw = Callable[[Problem, int], Problem]


class Augmentation:
    """What may change about a training problem. With both off a problem stays itself.

    ``permute_options``: a quiz gets its options in a random order, all orders equally likely, and the key's letter
    follows its text, also in the box of a worked solution (letters elsewhere in its words stay as they are); problems
    whose order must stay (``Problem.permutable``) and open ones keep theirs.
    ``redraw_operands``: the data source asks the same concept with fresh operands and options.
    """

    def __init__(self, permute_options: bool = False, redraw_operands: bool = False) -> None:
        self.permute_options, self.redraw_operands = permute_options, redraw_operands

    @property
    def active(self) -> bool:
        """Whether any problem may change."""
        return self.permute_options or self.redraw_operands

    def check(self, train: Sequence[Problem], redraw: Redraw | None) -> None:
        """Refuse a variation that these training problems do not allow. Raises UserError."""
        if self.redraw_operands and redraw is None:
            raise UserError(
                "augmentation.redraw_operands=true: this data source cannot draw operands anew; set it to false or use "
                "data=concept_world"
            )
        if self.permute_options and not any(_may_permute(p) for p in train):
            raise UserError(
                "augmentation.permute_options=true: no training problem has options that may change places; set it to "
                "false"
            )

    def apply(self, problem: Problem, seed: int, redraw: Redraw | None) -> Problem:
        """``problem`` as it is asked this time; its uid starts with the uid of the problem it came from.

        Raises:
            ValueError: ``redraw_operands`` without a ``redraw``; ``check`` finds this before a run starts.
        """
        if self.redraw_operands:
            if redraw is None:
                raise ValueError("augmentation.redraw_operands=true needs a data source that draws operands anew")
            problem = redraw(problem, seed)
        if self.permute_options and _may_permute(problem):
            places = range(len(problem.options))
            # The uid has a part in it, so that problems varied with one seed do not all get the same order.
            order = random.Random(f"{seed}/options/{problem.uid}").sample(places, len(places))
            problem = _with_solution_of(problem, problem.permuted(order))
        return problem


def _with_solution_of(before: Problem, after: Problem) -> Problem:
    """``after`` with a solution that boxes the new letter: one that still boxed the old one would teach a mistake."""
    if not before.solution:
        return after
    return replace(after, solution=before.solution.replace(f"\\boxed{{{before.answer}}}", f"\\boxed{{{after.answer}}}"))


def _may_permute(problem: Problem) -> bool:
    return problem.is_choice and problem.permutable
