"""How the policy uses its tools, as ratios of sums, so that they can be added over ranks and steps.

The paper names six measures and leaves their denominators open (ToRL, Figure 5). Here each is written
down. Blocks are the closed python blocks that the policy wrote; runs are the programs that were run, failures of the
sandbox left out; a response is one answer, aborted ones left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from core_torl.code_blocks import OUTPUT, Block, layout
from core_torl.trajectory import ToolCall, Trajectory

Ratio = tuple[float, float]  # numerator, denominator
_BOX = re.compile(r"\\boxed\s*\{")
_UNKNOWN_NAME = re.compile(r"NameError: name '(\w+)' is not defined")


class _Response:
    """One answer taken apart once."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.calls = [c for c in trajectory.sample.calls if c.status != "infrastructure"]
        self.correct = trajectory.score is not None and trajectory.score.correct
        self.blocks: list[tuple[int, Block]] = []  # (turn, block)
        self.boxes: list[tuple[int, int, str]] = []  # (turn, place, what stands in it), outside code and outputs
        self.void = 0
        self.invented = 0  # output blocks that no run has answered
        # Turns that ended by asking for a run: those that got one, and one that was cut because no call was left.
        asked = len(trajectory.sample.calls) + (trajectory.sample.stop == OUTPUT)
        for turn, text in enumerate(trajectory.turns):
            found = layout(text)
            blocks, spans = found.blocks, found.outputs
            covered = [(b.start, b.end) for b in blocks] + spans
            boxes = [m for m in _BOX.finditer(text) if not any(a <= m.start() < b for a, b in covered)]
            self.blocks += [(turn, b) for b in blocks]
            self.boxes += [(turn, m.start(), _inside(text, m.end())) for m in boxes]
            self.void += not blocks and not boxes
            answered = turn < asked and bool(spans) and spans[-1][1] == len(text)
            self.invented += len(spans) - answered
        self.turns = len(trajectory.turns)

    @property
    def before_answer(self) -> int:
        """Blocks that stand before the box that counts."""
        turn, place, _ = self.boxes[-1]
        return sum((t, b.start) < (turn, place) for t, b in self.blocks)

    @property
    def self_corrected(self) -> bool:
        """A run that failed, a later one that did not, and a right answer."""
        failed = [c.status != "ok" for c in self.calls]
        return self.correct and True in failed and False in failed[failed.index(True) :]

    @property
    def cross_checked(self) -> bool:
        """A box before a run that ended without an error."""
        good = [i for i, c in enumerate(self.calls) if c.status == "ok"]
        return bool(good and self.boxes) and self.boxes[0][0] <= good[-1]

    @property
    def revised(self) -> bool:
        """A box before an observation, and another one in the end."""
        early = [value for turn, _, value in self.boxes if turn < self.turns - 1]
        last_turn, _, value = self.boxes[-1] if self.boxes else (0, 0, "")
        return bool(early) and last_turn == self.turns - 1 and early[-1] != value

    @property
    def used(self) -> bool:
        """The last good observation holds what the answer says."""
        good = [c for c in self.calls if c.status == "ok"]
        return bool(good and self.boxes) and self.boxes[-1][2].strip() in good[-1].observation


def _inside(text: str, start: int) -> str:
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i]
    return text[start:]


def _lost_name(calls: Sequence[ToolCall]) -> int:
    """Runs that failed for a name that an earlier program of the same answer bound: each run starts with nothing."""
    count = 0
    for i, call in enumerate(calls):
        missing = _UNKNOWN_NAME.search(call.observation) if call.status == "error" else None
        bound = rf"(?m)\b{missing[1]}\s*=(?!=)|(?:import|as|def)\s+{missing[1]}\b" if missing else ""
        count += bool(missing) and any(re.search(bound, earlier.code) for earlier in calls[:i])
    return count


def usage(trajectories: Sequence[Trajectory], call_budget: int) -> dict[str, Ratio]:
    """name -> (numerator, denominator) of every ratio ``tool/*``; always the same names."""
    kept = [t for t in trajectories if not t.aborted]
    responses = [_Response(t) for t in kept]
    n, correct = len(responses), sum(r.correct for r in responses)
    calls = [c for r in responses for c in r.calls]
    boxed = [r for r in responses if r.boxes and r.blocks]
    written = sum(len(r.blocks) for r in responses)
    every = [c for t in trajectories for c in t.sample.calls]
    tokens = [len(t.token_ids) for t in kept]

    def passed(of: Sequence[_Response]) -> Ratio:
        return sum(c.status == "ok" for r in of for c in r.calls), sum(len(r.calls) for r in of)

    return {
        "tool/code_ratio": (sum(bool(r.blocks) for r in responses), n),
        "tool/call_ratio": (sum(bool(r.calls) for r in responses), n),
        "tool/calls_per_response": (len(calls), n),
        "tool/pass_ratio": passed(responses),
        "tool/pass_ratio_correct": passed([r for r in responses if r.correct]),
        "tool/pass_ratio_incorrect": passed([r for r in responses if not r.correct]),
        "tool/executed_ratio": (len(calls), written),
        "tool/before_answer_ratio": (sum(r.before_answer for r in boxed), sum(len(r.blocks) for r in boxed)),
        "tool/effective_ratio": (sum(r.correct and r.used for r in responses), correct),
        "tool/hallucinated_output_ratio": (sum(r.invented > 0 for r in responses), n),
        "tool/budget_exhausted_ratio": (sum(len(r.calls) >= call_budget for r in responses), n if call_budget else 0),
        "tool/time_limit_ratio": (sum(c.status == "time_limit" for c in calls), len(calls)),
        "tool/other_limit_ratio": (sum(c.status in ("memory_limit", "output_limit") for c in calls), len(calls)),
        "tool/lost_name_ratio": (sum(_lost_name(r.calls) for r in responses), len(calls)),
        "tool/infrastructure_ratio": (sum(c.status == "infrastructure" for c in every), len(every)),
        "tool/aborted_ratio": (len(trajectories) - n, len(trajectories)),
        "tool/observation_tokens": (sum(c.end - c.start for c in calls), n),
        "tool/trainable_fraction": (sum(t.sample.drawn for t in kept), sum(tokens)),
        "tool/void_turn_ratio": (sum(r.void for r in responses), sum(r.turns for r in responses)),
        "tool/void_answer_ratio": (sum(r.void > 0 for r in responses), n),
        "tool/self_correction_ratio": (sum(r.self_corrected for r in responses), n),
        "tool/cross_check_ratio": (sum(r.cross_checked for r in responses), n),
        "tool/revision_ratio": (sum(r.revised for r in responses), n),
    }


def latencies(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Median and 95th percentile of the programs' seconds on the clock; 0 if nothing was run."""
    seconds = [c.seconds for t in trajectories for c in t.sample.calls if c.status != "infrastructure"] or [0.0]
    return {f"tool/latency_p{q}_s": float(np.percentile(seconds, q)) for q in (50, 95)}


def has_void_turn(trajectory: Trajectory) -> bool:
    """Whether a turn holds neither a whole program nor a box (SimpleTIR)."""
    return _Response(trajectory).void > 0
