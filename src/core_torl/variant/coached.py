"""What CORE-CR, CORE-KL and their relatives share: notice a failure, prime the prompt, sample and score once more.

All primed prompts of an RL step go through **one** call of the sampler. Primed answers are scored like any other, on
what the policy wrote; their token ids are kept as sampled, end token included. A variant says what to do with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core_torl.intervention.base import Intervention
from core_torl.sampler.protocol import SampleRequest
from core_torl.trajectory import Group, Trajectory
from core_torl.trigger.failure import Failure
from core_torl.variant.policy_gradient import PolicyGradient, stream_seed


@dataclass(frozen=True)
class Primed:
    """The primed answers to the problem of group number ``group`` (its place in this rank's list)."""

    group: int
    trajectories: list[Trajectory]


class Coached(PolicyGradient):
    """Base of the variants with a coach; ``trigger`` and ``intervention`` come from the program.

    Primed prompts longer than ``max_prompt_tokens`` are left out, and so is a problem for which the intervention has
    none: their groups count as gated.
    """

    coached = True

    def __init__(
        self, *, trigger: Failure, intervention: Intervention, max_prompt_tokens: int | None = None, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self._parts |= {"trigger": trigger, "intervention": intervention}
        self.max_prompt_tokens = max_prompt_tokens if max_prompt_tokens is not None else math.inf
        self.last_interventions: list[Primed] = []  # of the last RL step, for people

    def triggered(self, groups: Sequence[Group]) -> list[int]:
        """Places of the groups that get an intervention."""
        trigger: Failure = self._parts["trigger"]
        fired = [i for i, group in enumerate(groups) if trigger.fires(group)]
        self._now.add("core/trigger_rate", len(fired))
        self._now.add("core/gated", sum(trigger.failed(g) and not trigger.open(g) for g in groups))
        self._now.count("groups", len(groups))
        return fired

    def coach(self, groups: Sequence[Group], counts: Mapping[int, int]) -> list[Primed]:
        """Primed answers, ``counts[i]`` for group ``i``, sampled in one call and scored. Every rank has to call it."""
        intervention: Intervention = self._parts["intervention"]
        requests: list[SampleRequest] = []
        owners: list[int] = []
        for i, count in counts.items():
            problem = groups[i].problem
            seed = stream_seed(self.seed, "primed", self.rl_step, problem.uid, self.place(i))
            prompts = intervention.prime(problem, count, seed, self.encode, self._parts["encode_answer"])
            if not prompts or any(len(ids) > self.max_prompt_tokens for ids, _ in prompts):
                self._now.add("core/trigger_rate", -1)
                self._now.add("core/gated", 1)
                continue
            for branch, (ids, n) in enumerate(prompts):
                requests.append(SampleRequest(ids, n, stream_seed(seed, "answers", branch)))
                owners.append(i)
        samples = self.draw(requests) if requests else []
        answers: dict[int, list[Trajectory]] = {}
        for i, request, drawn in zip(owners, requests, samples, strict=True):
            problem = groups[i].problem
            answers.setdefault(i, []).extend(self.trajectory(problem, request.prompt_ids, s) for s in drawn)
        self.reward([Group(groups[i].problem, trajectories) for i, trajectories in answers.items()])
        flat = [t for trajectories in answers.values() for t in trajectories]
        scored = judged(flat)
        self._now.add("core/primed_accuracy", sum(bool(t.score and t.score.correct) for t in scored))
        self._now.count("primed answers", len(scored))
        self._now.add("core/primed_tokens", sum(len(t.token_ids) for t in flat))
        self.last_interventions = [Primed(i, trajectories) for i, trajectories in answers.items()]
        return self.last_interventions

    def place(self, group: int) -> int:
        """The place of this rank's group among those of all ranks, so that draws do not depend on their number."""
        return self.global_rank + group * self._ranks


def judged(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Those that a reward could judge."""
    return [t for t in trajectories if t.score is not None and t.score.value is not None]
