"""What the policy wrote, as a person reads it: a curve says that something changed, an answer says what.

Text of the policy and text of a tool look alike, so an answer with calls has its observations between marks. A line
that a policy or a program wrote itself and that opens like a mark gets a backslash: no text can pass for one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from core_torl.problem import Problem
from core_torl.trajectory import Trajectory

MARK = ">>> "
OBSERVATION, END = f"{MARK}observation (not sampled, not trained)", f"{MARK}end of observation"


def problem_text(problem: Problem) -> str:
    """The problem as a person reads it: its uid, the question, and one line an option."""
    options = [f"{letter}. {text}" for letter, text in zip(problem.letters, problem.options, strict=True)]
    return "\n".join([f"[{problem.uid}] {problem.question}", *options])


def marked_transcript(trajectory: Trajectory) -> str:
    """The answer with each call numbered, its status, and its observation between ``OBSERVATION`` and ``END``."""
    calls = trajectory.sample.calls
    turns = iter(trajectory.turns)
    parts = [_quoted(next(turns))]
    for number, call in enumerate(calls, start=1):
        said = f"\n{MARK}call {number} of {len(calls)}: {call.status}"
        if call.end > call.start:
            parts += [f"{said}\n{OBSERVATION}\n{_quoted(call.observation)}\n{END}\n```\n", _quoted(next(turns))]
        else:  # its sandbox failed, or the answer had no room left
            parts.append(f"{said}, nothing was shown\n")
    return "".join(parts)


def _quoted(text: str) -> str:
    return re.sub(r"(?m)^(?=\\*>>>)", r"\\", text)


def answer_row(rl_step: int, trajectory: Trajectory) -> dict[str, Any]:
    """One trajectory as a row. ``reward`` is None where nothing could be judged."""
    score, concept = trajectory.score, trajectory.problem.concept
    return {
        "rl_step": rl_step,
        "problem": problem_text(trajectory.problem),
        "concept": concept.name if concept else "",
        "reward": score.value if score else None,
        "outcome": score.outcome if score else "",
        "finish": trajectory.sample.finish,
        "tokens": len(trajectory.token_ids),
        "answer": trajectory.transcript,
    }


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the rows, at even distances and in their order."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]
