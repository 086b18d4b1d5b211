"""``intervention=worked_solution``: the quiz's own solution. Would any good trace do as well as the concept?"""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.intervention.base import Encode, TextIntervention
from core_torl.problem import Concept, Problem


class WorkedSolution(TextIntervention):
    """Raises ValueError, naming the first, if training problems have no solution."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        check_solutions(problems, "intervention=worked_solution")

    def text_for(self, problem: Problem, seed: int, encode: Encode) -> Concept:
        assert problem.solution is not None
        name = problem.concept.name if problem.concept else ""
        return Concept(f"{problem.uid}/solution", name, "", problem.solution)


def check_solutions(problems: Sequence[Problem], what: str) -> None:
    """Raises ValueError if a problem has no worked solution; ``what`` asks for one."""
    lacking = [p.uid for p in problems if not p.solution]
    if lacking:
        raise ValueError(
            f"{what}: {len(lacking)} of {len(problems)} training problems have no worked solution (the first is "
            f"{lacking[0]}); use data with solutions, or intervention=true_concept"
        )
