"""The same problem answered before and after training, side by side: what a table of shares cannot show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from core_torl.evaluation.protocol import Item, SetResult
from core_torl.problem import Problem
from core_torl.tracking.samples import problem_text


def telling(before: SetResult, after: SetResult, count: int) -> list[tuple[Item, Item]]:
    """Up to ``count`` problems, those that training turned from wrong to right first, then those it did not help."""
    earlier = {i.uid: i for i in before.items}
    pairs = [(earlier[i.uid], i) for i in after.items if i.uid in earlier]
    return sorted(pairs, key=lambda pair: pair[0].accuracy - pair[1].accuracy)[:count]


def transcripts_markdown(
    before: Sequence[SetResult], after: Sequence[SetResult], sets: Mapping[str, Sequence[Problem]], count: int = 2
) -> str:
    """A few problems of each set and way of decoding, with the first answer to each before and after training."""
    earlier = {r.label: r for r in before}
    parts = ["# Answers before and after training\n\nProblems that training turned from wrong to right come first.\n"]
    for result in after:
        problems = {p.uid: p for p in sets.get(result.name, [])}
        pairs = telling(earlier[result.label], result, count) if result.label in earlier else []
        for old, new in (pair for pair in pairs if pair[1].uid in problems):
            problem = problems[new.uid]
            parts.append(f"\n## {result.label}: {problem_text(problem)}\n\nAnswer: {problem.answer}\n")
            for when, item in (("Before", old), ("After", new)):
                verdict = (
                    "right" if item.accuracy == 1 else "wrong" if item.accuracy == 0 else f"{item.accuracy:.0%} right"
                )
                parts.append(f"\n{when} ({verdict}):\n\n````text\n{item.transcript.strip()}\n````\n")
    return "".join(parts)


def write_transcripts(
    path: Path, before: Sequence[SetResult], after: Sequence[SetResult], sets: Mapping[str, Sequence[Problem]]
) -> None:
    path.write_text(transcripts_markdown(before, after, sets), encoding="utf-8")
