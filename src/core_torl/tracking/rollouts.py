"""Which answers of an RL step are worth a look, as small tables: best, worst, newly solved, coached, with tools, any.

The rows are plain dicts; ``COLUMNS`` says which keys each kind has. They go to W&B as tables ``rollouts/KIND`` and to
``rollouts.jsonl`` in the run's folder, which needs neither W&B nor a reader. All answers are those of the policy under
the plain prompt, as they were before a coach replaced any; primed ones stand in ``triggered`` only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from core_torl.tracking.mirror import read_jsonl
from core_torl.tracking.samples import answer_row, marked_transcript, problem_text, spread
from core_torl.trajectory import Group, Trajectory

Row = dict[str, Any]
Tables = dict[str, list[Row]]
Decode = Callable[[Sequence[int]], str]

_ANSWER = ("rl_step", "problem", "concept", "reward", "outcome", "finish", "tokens", "answer")
COLUMNS: dict[str, tuple[str, ...]] = {
    "best": _ANSWER,
    "worst": _ANSWER,
    "newly_solved": _ANSWER,
    "triggered": (
        "rl_step", "problem", "concept", "shown", "plain_answer", "primed_answer", "plain_reward", "primed_reward",
        "plain_outcome", "primed_outcome", "primed_right",
    ),
    "tools": ("rl_step", "problem", "reward", "outcome", "calls", "answer"),
    "even": _ANSWER,
}  # fmt: skip


def tables_of(
    rl_step: int,
    groups: Sequence[Group],
    newly: Sequence[bool],
    interventions: Iterable[tuple[Group, Sequence[Trajectory]]],
    decode: Decode,
    count: int,
) -> Tables:
    """kind -> at most ``count`` rows each, of the groups of one RL step.

    ``newly[i]`` says whether group i is the first that solves its problem; ``interventions`` are groups as they were
    sampled and their primed answers; ``decode`` turns prompt ids into text.
    """
    flat = [t for g in groups for t in g.trajectories]
    judged = [[t for t in g.trajectories if _reward(t) is not None] for g in groups]
    # One answer a problem: the answers of one easy group would fill the table.
    best = [max(row, key=_reward) for row in judged if row]
    worst = [min(row, key=_reward) for row in judged if row]
    solved = [next(t for t in g.trajectories if _right(t)) for g, new in zip(groups, newly, strict=True) if new]
    coached = [_triggered(rl_step, group, primed, decode) for group, primed in interventions if primed]
    called = [t for t in flat if t.sample.calls]
    return {
        "best": [answer_row(rl_step, t) for t in sorted(best, key=_reward, reverse=True)[:count]],
        "worst": [answer_row(rl_step, t) for t in sorted(worst, key=_reward)[:count]],
        "newly_solved": [answer_row(rl_step, t) for t in spread(solved, count)],
        "triggered": spread(coached, count),
        "tools": [_with_calls(rl_step, t) for t in spread(called, count)],
        "even": [answer_row(rl_step, t) for t in spread(flat, count)],
    }


def merged(parts: Sequence[Tables], count: int) -> Tables:
    """The tables of all ranks as one, again at most ``count`` rows a kind.

    An answer that earned the least of the step is not among the best, nor one that earned the most among the worst:
    where all earned the same there is neither.
    """
    whole: Tables = {kind: [row for part in parts for row in part[kind]] for kind in COLUMNS}
    highest = max((row["reward"] for row in whole["best"]), default=0.0)
    lowest = min((row["reward"] for row in whole["worst"]), default=0.0)
    best = sorted((r for r in whole["best"] if r["reward"] > lowest), key=lambda r: r["reward"], reverse=True)
    worst = sorted((r for r in whole["worst"] if r["reward"] < highest), key=lambda r: r["reward"])
    return {kind: spread(rows, count) for kind, rows in whole.items()} | {"best": best[:count], "worst": worst[:count]}


def read_rollouts(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a ``rollouts.jsonl``, oldest first, each with ``kind`` and the columns of its kind.

    A torn last line is left out. Raises FileNotFoundError if there is no such file, ValueError for what is no row.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not {"kind", "rl_step"} <= row.keys():
            raise ValueError(f"{path}, line {number}: a row needs kind and rl_step")
    return rows


def inserted(plain: Sequence[int], primed: Sequence[int]) -> list[int]:
    """What the primed prompt has and the plain one has not: the stretch between their common end and beginning."""
    most = min(len(plain), len(primed))
    end = next((i for i in range(most) if plain[-1 - i] != primed[-1 - i]), most)
    start = next((i for i in range(most - end) if plain[i] != primed[i]), most - end)
    return list(primed[start : len(primed) - end])


def _triggered(rl_step: int, group: Group, primed: Sequence[Trajectory], decode: Decode) -> Row:
    """The first failed plain answer beside the first primed one, whatever it earned: no choice flatters the coach."""
    plain = next((t for t in group.trajectories if not _right(t)), group.trajectories[0])
    shown, concept = inserted(plain.prompt_ids, primed[0].prompt_ids), group.problem.concept
    return {
        "rl_step": rl_step,
        "problem": problem_text(group.problem),
        "concept": concept.name if concept else "",
        "shown": decode(shown).strip(),
        "plain_answer": plain.transcript,
        "primed_answer": primed[0].transcript,
        "plain_reward": _reward(plain),
        "primed_reward": _reward(primed[0]),
        "plain_outcome": plain.score.outcome if plain.score else "",
        "primed_outcome": primed[0].score.outcome if primed[0].score else "",
        "primed_right": f"{sum(map(_right, primed))} of {len(primed)}",
    }


def _with_calls(rl_step: int, trajectory: Trajectory) -> Row:
    row = answer_row(rl_step, trajectory) | {
        "calls": len(trajectory.sample.calls),
        "answer": marked_transcript(trajectory),
    }
    return {column: row[column] for column in COLUMNS["tools"]}


def _reward(trajectory: Trajectory) -> Any:
    return trajectory.score.value if trajectory.score else None


def _right(trajectory: Trajectory) -> bool:
    return trajectory.score is not None and trajectory.score.correct


def cells(kind: str, rows: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows as lists in the order of ``COLUMNS[kind]``; ValueError if one has other keys."""
    table = []
    for row in rows:
        if row.keys() != set(COLUMNS[kind]):
            raise ValueError(f"rollouts/{kind}: a row has {', '.join(row)}; its columns are {', '.join(COLUMNS[kind])}")
        table.append([row[column] for column in COLUMNS[kind]])
    return table
