"""Supervised fine-tuning on the quizzes' worked solutions: the baseline beside reinforcement learning.

The input is the plain quiz; the concept is never in it, as it is never in a test. (The published baseline had the
concept in its input and not in its tests, which handicaps it.) Nothing is sampled: a step's "answers" are the
solutions, one for each problem, and ``objective=likelihood`` makes them likelier. Full weights or LoRA, as
``model.lora.rank`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from core_torl.intervention.worked_solution import check_solutions
from core_torl.objective.likelihood import Likelihood
from core_torl.problem import Problem
from core_torl.trajectory import Group, Sample
from core_torl.variant.ahead import Answers
from core_torl.variant.policy_gradient import PolicyGradient


class SupervisedFineTuning(PolicyGradient):
    """One pass over the spine with given answers. Raises ValueError if a problem has no solution."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        if self.group_size != 1:
            raise ValueError(f"group_size={self.group_size}: variant=sft has one answer for each problem; set it to 1")
        if not isinstance(self.objective, Likelihood):
            raise ValueError("variant=sft has no answers to compare: it needs objective=likelihood")

    @classmethod
    def check_problems(cls, problems: Sequence[Problem]) -> None:
        check_solutions(problems, "variant=sft")

    def sample(self, problems: Sequence[Problem], step: int, answers: Answers | None = None) -> list[Group]:
        """Each problem's solution, ended, as its one trajectory."""
        groups = []
        for problem in problems:
            ids = (*self._parts["encode_answer"](expert_text(problem)), self.policy.eos_id)
            given = Sample(ids, (0.0,) * len(ids), "eos")
            trajectory = self.trajectory(problem, self.encode(problem, None), given)
            trajectory.behaviour = "recompute"  # nobody sampled it: there is no log-prob to compare with
            groups.append(Group(problem, [trajectory]))
        return groups

    def reward(self, groups: Sequence[Group]) -> None:
        """Grade the given answers, for the record; one that cannot be judged is learned from all the same."""
        super().reward(groups)
        for trajectory in (t for g in groups for t in g.trajectories):
            if trajectory.score is not None and trajectory.score.value is None:
                trajectory.score = replace(trajectory.score, value=0.0)


def expert_text(problem: Problem) -> str:
    """The worked solution, with the final answer in a box at its end."""
    assert problem.solution is not None
    if "\\boxed{" in problem.solution:
        return problem.solution
    return f"{problem.solution} \\boxed{{{problem.answer}}}"
