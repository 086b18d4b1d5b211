"""What the policy did, in token ids, and what it earned.

Token ids and the log-probs they were sampled with are kept from the sampler to the loss. They are never decoded and
encoded again; ``Trajectory.text`` is a view for graders and for people.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from core_torl.problem import Problem

Finish = Literal["eos", "stop", "length", "abort"]
# Under which prompt an answer was sampled, seen from the prompt it is trained under: "policy": the same one.
# "recompute" and "guided": a primed one; its importance ratio starts at 1, or has the primed probability below the bar.
Behaviour = Literal["policy", "recompute", "guided"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer as a sampler returns it.

    ``token_ids`` include the end-of-sequence or stop tokens. ``logprobs`` has the same length and belongs to the
    distribution that was sampled from, temperature and truncation included.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    stop: str | int | None = None
    weight_version: str = "0"


@dataclass(frozen=True, slots=True)
class Score:
    """What a reward says of one trajectory.

    ``value`` is None when the trajectory could not be judged (a timeout, say): it then leaves the loss and the
    statistics of its group instead of counting as wrong. ``parts`` holds the named parts that add up to the value.
    """

    value: float | None
    correct: bool
    outcome: str
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Trajectory:
    """A prompt and one answer to it, scored.

    ``train_mask[t]`` is True where the policy itself sampled ``token_ids[t]``; observations of tools are False.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    sample: Sample
    text: str
    train_mask: tuple[bool, ...]
    score: Score | None = None
    behaviour: Behaviour = "policy"

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.sample.token_ids

    @property
    def truncated(self) -> bool:
        return self.sample.finish == "length"


@dataclass(slots=True)
class Group:
    """The N trajectories of one problem in one RL step."""

    problem: Problem
    trajectories: list[Trajectory]

    @property
    def all_wrong(self) -> bool:
        """True if every trajectory that could be judged is wrong, and at least one could."""
        judged = [t.score for t in self.trajectories if t.score is not None and t.score.value is not None]
        return bool(judged) and not any(s.correct for s in judged)
