"""``intervention=expert_prefix``: the policy goes on from part of the quiz's worked solution (BREAD).

BREAD ("Branched Rollouts from Expert Anchors") answers a failed group by branching from prefixes of an expert's
solution, so that reasoning it cannot start it may at least finish. The primed prompt is the plain prompt followed by
the first tokens of the solution; what is trained is the continuation, given prompt and prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

from core_torl.intervention.base import Encode, EncodeAnswer, PrimedPrompt, rng_of
from core_torl.intervention.worked_solution import check_solutions
from core_torl.problem import Problem


class ExpertPrefix:
    """Each of the K continuations starts behind another share of the solution, drawn from [shortest, longest].

    BREAD searches for the shortest prefix that helps, by several rounds of sampling; here the K branches of one batched
    call spread over the range (stratified, seeded). Raises ValueError if a problem has no solution or the range is
    not within (0, 1).
    """

    needs_primed_training = True

    def __init__(self, problems: Sequence[Problem], shortest: float = 0.2, longest: float = 0.8) -> None:
        if not 0 < shortest <= longest < 1:
            raise ValueError(
                f"intervention.shortest={shortest}, intervention.longest={longest}: shares of the solution with "
                "0 < shortest <= longest < 1"
            )
        check_solutions(problems, "intervention=expert_prefix")
        self.shortest, self.longest = shortest, longest

    def prime(
        self, problem: Problem, count: int, seed: int, encode: Encode, encode_answer: EncodeAnswer
    ) -> list[PrimedPrompt]:
        assert problem.solution is not None
        prompt, solution = encode(problem, None), encode_answer(problem.solution)
        if len(solution) < 2:  # nothing would be left to say
            return []
        rng = rng_of("expert_prefix", seed)
        prompts = []
        for branch in range(count):
            share = self.shortest + (self.longest - self.shortest) * (branch + rng.random()) / count
            # At least one token is given, and at least one is left to say.
            length = min(max(1, round(share * len(solution))), len(solution) - 1)
            prompts.append((prompt + solution[:length], 1))
        return prompts
