"""What the policy wrote, as rows of a table: a curve says that something changed, a sample says what.

A row is a plain dict with the keys of ``SAMPLE_COLUMNS``. Of all rows of a step a few are shown, taken at even
distances, so that they come from different groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core_torl.problem import Problem
from core_torl.trajectory import Trajectory

SAMPLE_COLUMNS = ("rl_step", "problem", "concept", "reward", "outcome", "finish", "tokens", "answer")


def problem_text(problem: Problem) -> str:
    """The problem as a person reads it: its uid, the question, and one line an option."""
    options = [f"{letter}. {text}" for letter, text in zip(problem.letters, problem.options, strict=True)]
    return "\n".join([f"[{problem.uid}] {problem.question}", *options])


def sample_row(trajectory: Trajectory) -> dict[str, Any]:
    """One trajectory as a row, without its step. ``reward`` is None where nothing could be judged."""
    score, concept = trajectory.score, trajectory.problem.concept
    return {
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


def table_rows(rl_step: int, rows: Sequence[Trajectory | Mapping[str, Any]], count: int) -> list[list[Any]]:
    """At most ``count`` rows as lists in the order of ``SAMPLE_COLUMNS``; ValueError if a row lacks a column."""
    table = []
    for row in spread(rows, count):
        cells = sample_row(row) if isinstance(row, Trajectory) else row
        missing = [c for c in SAMPLE_COLUMNS[1:] if c not in cells]
        if missing:
            raise ValueError(f"a sample row lacks {', '.join(missing)}; its columns are {', '.join(SAMPLE_COLUMNS)}")
        table.append([rl_step, *(cells[c] for c in SAMPLE_COLUMNS[1:])])
    return table
