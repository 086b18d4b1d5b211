"""What the policies wrote, as a page shows it: a few answers of each cell, cut into text, program and tool output.

Answers in training come from a run's ``rollouts.jsonl``, the answers to the same test problem before and after training
from its ``transcripts.md``. A run has either, both or none of them. Only answers of the kind ``tools`` have marks that
say what a tool wrote; elsewhere a block of output may be the tool's or the policy's invention, and is not called an
observation. Everything here is foreign text: it is handed on as it stands, and the template escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_torl.reports.finished import Group
from core_torl.tracking.rollouts import read_rollouts
from core_torl.tracking.samples import END, MARK, OBSERVATION, spread

KINDS = {
    "newly_solved": "Newly solved: right for the first time",
    "triggered": "Triggered: without the concept in the prompt, and with it",
    "tools": "With a tool",
    "best": "Highest reward",
    "worst": "Lowest reward",
    "even": "At even distances",
}
A_KIND = 4  # rows of a kind that are shown, and problems of transcripts.md
LONGEST = 6000  # characters of an answer that are shown

_FENCE = re.compile(r"^```[ \t]*(\w*)[ \t]*\n(.*?)(?:^```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_CALL = re.compile(
    rf"(?:^```output[ \t]*\n)?^{re.escape(MARK)}(?P<status>call [^\n]*)\n"
    rf"(?:{re.escape(OBSERVATION)}\n(?P<said>.*?)\n{re.escape(END)}$\n?(?:^```[ \t]*$\n?)?)?",
    re.MULTILINE | re.DOTALL,
)
_PAIR = re.compile(
    r"^## (?P<problem>.*?)\n+Answer: (?P<answer>[^\n]*)\n+"
    r"Before \((?P<was>[^)\n]*)\):\n+````text\n(?P<before>.*?)\n````\n+"
    r"After \((?P<became>[^)\n]*)\):\n+````text\n(?P<after>.*?)\n````\n",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer; ``kind`` is text, code, output (a block of it), status (of a call) or observation."""

    kind: str
    text: str


@dataclass(frozen=True)
class Answer:
    """One answer under its heading, perhaps with what was made of it: right, wrong, a reward."""

    heading: str
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class Sample:
    """A problem and one answer to it, or two that stand side by side; ``facts`` are (name, value)."""

    problem: str
    facts: Sequence[tuple[str, str]]
    answers: Sequence[Answer]


@dataclass
class CellSamples:
    """What is shown of a cell: heading -> samples.

    ``runs`` says which runs they are from, ``broken`` which files could not be read.
    """

    label: str
    runs: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    blocks: dict[str, list[Sample]] = field(default_factory=dict)


def cell_samples(one: Group) -> CellSamples:
    """Samples of the first run of the cell that has any, by seed; a cell without any has no blocks."""
    found = CellSamples(one.label)
    for seed, run in sorted(one.runs.items()):
        blocks = run_samples(run.folder, found.broken)
        if blocks:
            found.runs.append(
                f"seed {seed}, {run.name}: the first seed that kept any, its samples at even distances and not chosen"
            )
            found.blocks = blocks
            break
    return found


def run_samples(folder: Path, broken: list[str]) -> dict[str, list[Sample]]:
    """Heading -> samples of one run; {} where it kept none. ``broken`` grows by a file that cannot be read."""
    blocks: dict[str, list[Sample]] = {}
    if (folder / "transcripts.md").is_file():
        text = (folder / "transcripts.md").read_text(encoding="utf-8", errors="replace")
        if pairs := spread(before_and_after(text), A_KIND):
            blocks["Before and after training"] = pairs
    if (folder / "rollouts.jsonl").is_file():
        try:
            rows = read_rollouts(folder / "rollouts.jsonl")
        except ValueError as error:
            broken.append(f"Not shown, for the file is broken: {error}.")
            return blocks
        for kind, heading in KINDS.items():
            own = [row for row in rows if row.get("kind") == kind]
            if own:
                blocks[heading] = [rollout(row) for row in spread(own, A_KIND)]
    return blocks


def before_and_after(text: str) -> list[Sample]:
    """The problems of a ``transcripts.md`` with their two answers; a part that reads otherwise is left out."""
    return [
        Sample(
            problem=found["problem"].strip(),
            facts=[("right answer", found["answer"].strip())],
            answers=[
                Answer(f"before training: {found['was']}", pieces(found["before"])),
                Answer(f"after training: {found['became']}", pieces(found["after"])),
            ],
        )
        for found in _PAIR.finditer(text)
    ]


def rollout(row: Mapping[str, Any]) -> Sample:
    """A row of ``rollouts.jsonl``, see ``tracking.rollouts``; a primed answer stands beside the plain one."""
    names = {
        "rl_step": "RL step", "concept": "concept", "shown": "shown to the primed one", "primed_right": "primed right",
        "reward": "reward", "outcome": "outcome", "calls": "calls", "tokens": "tokens", "finish": "ended by",
    }  # fmt: skip
    facts = [(name, _plain(row[key])) for key, name in names.items() if row.get(key) not in (None, "")]
    if row["kind"] == "triggered":
        answers = [
            Answer(
                f"{side} prompt: {row[f'{side}_outcome'] or 'not judged'}, reward {_plain(row[f'{side}_reward'])}",
                pieces(row[f"{side}_answer"]),
            )
            for side in ("plain", "primed")
        ]
    else:
        answers = [Answer("", marked_pieces(row["answer"]) if row["kind"] == "tools" else pieces(row["answer"]))]
    return Sample(row["problem"], facts, answers)


def pieces(text: str) -> list[Piece]:
    """An answer without marks in its stretches: blocks that open with ```output are output, others programs."""
    return _blocks(_cut(text), "output")


def marked_pieces(text: str) -> list[Piece]:
    """An answer with marks: what stands between them is an observation, output elsewhere the policy's own text."""
    found, end, text = [], 0, _cut(text)
    for call in _CALL.finditer(text):
        found += _blocks(text[end : call.start()], "text")
        found.append(Piece("status", call["status"]))
        if call["said"] is not None:
            found.append(Piece("observation", call["said"]))
        end = call.end()
    return found + _blocks(text[end:], "text")


def _blocks(text: str, output: str) -> list[Piece]:
    """Text and fenced blocks; ``output`` is the kind of a block of output."""
    found, end = [], 0
    for block in _FENCE.finditer(text):
        found.append(Piece("text", text[end : block.start()]))
        found.append(Piece(output if block[1] == "output" else "code", block[0]))
        end = block.end()
    found.append(Piece("text", text[end:]))
    return [Piece(piece.kind, piece.text.strip("\n")) for piece in found if piece.text.strip()]


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
