"""What the policy did, in token ids, and what it earned.

Token ids and the log-probs they were sampled with are kept from the sampler to the loss. They are never decoded and
encoded again; ``Trajectory.text`` is a view for graders and for people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from core_torl.problem import Problem

Finish = Literal["eos", "stop", "length", "abort"]
# Under which prompt an answer was sampled, seen from the prompt it is trained under: "policy": the same one.
# "recompute" and "guided": a primed one; its importance ratio starts at 1, or has the primed probability below the bar.
Behaviour = Literal["policy", "recompute", "guided"]
# How a program that the policy wrote ended. "infrastructure": the sandbox failed, not the program.
ToolStatus = Literal["ok", "error", "time_limit", "memory_limit", "output_limit", "infrastructure"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One program that the policy had run, and what it was shown of it.

    The answer's tokens ``start`` to ``end`` (half open) are the observation: they were not sampled. The two are equal
    where nothing was shown, because the call failed with its sandbox or the answer had no room left. ``observation`` is
    the text between the fences, ``seconds`` the program's time on the clock.
    """

    code: str
    status: ToolStatus
    observation: str
    start: int
    end: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer as a sampler returns it.

    ``token_ids`` include the end-of-sequence or stop tokens. ``logprobs`` has the same length and belongs to the
    distribution that was sampled from, temperature and truncation included. With tools, the observations stand among
    the tokens, with log-prob 0; ``calls`` says where. ``finish`` is "abort" for an answer whose sandbox failed.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    stop: str | int | None = None
    weight_version: str = "0"
    calls: tuple[ToolCall, ...] = ()

    @property
    def sampled(self) -> tuple[bool, ...]:
        """For each token whether the policy drew it; False on observations."""
        mask = [True] * len(self.token_ids)
        for call in self.calls:
            mask[call.start : call.end] = [False] * (call.end - call.start)
        return tuple(mask)

    @property
    def drawn(self) -> int:
        """How many tokens the policy drew: ``sum(sampled)``, without building the mask."""
        return len(self.token_ids) - sum(call.end - call.start for call in self.calls)

    @property
    def turns(self) -> tuple[tuple[int, ...], ...]:
        """The policy's own tokens, cut where observations stand."""
        cuts = [(call.start, call.end) for call in self.calls if call.end > call.start]
        starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(self.token_ids)]
        return tuple(self.token_ids[a:b] for a, b in zip(starts, ends, strict=True))


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
    ``text`` is what the policy wrote, observations left out: the text that rewards read. ``turns`` is the same text cut
    where observations stood, so that ``text == "".join(turns)``; without tools there is one turn.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    sample: Sample
    text: str
    train_mask: tuple[bool, ...]
    score: Score | None = None
    behaviour: Behaviour = "policy"
    turns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.turns = self.turns or (self.text,)

    @classmethod
    def of(
        cls, problem: Problem, prompt_ids: tuple[int, ...], sample: Sample, decode: Callable[[list[int]], str]
    ) -> Trajectory:
        """A sampled answer as a trajectory. ``decode`` turns token ids into text without special tokens."""
        turns = tuple(decode(list(ids)) for ids in sample.turns)
        return cls(problem, prompt_ids, sample, "".join(turns), sample.sampled, turns=turns)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.sample.token_ids

    @property
    def aborted(self) -> bool:
        """Whether a sandbox failed on the way: such an answer is neither scored nor learned from."""
        return self.sample.finish == "abort"

    @property
    def transcript(self) -> str:
        """The text with observations where they stood, for people."""
        shown = [call for call in self.sample.calls if call.end > call.start]
        parts = [self.turns[0]]
        for call, turn in zip(shown, self.turns[1:], strict=True):
            parts += [f"\n{call.observation}\n```\n", turn]
        return "".join(parts)

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
