"""How the rows of one pass are cut into parts that fit the memory: so many rows each, or so many token places.

A part is padded to its longest prompt and its longest answer, so rows of like length belong together. With a budget of
token places a part takes as many rows as fit, whatever their length: memory is bounded by what is really forwarded, and
short answers do not pay for long ones. Rows with one prompt can be read together (shared_prompts.py); a part counts as
what its forward pass really reads. The gradient is the same for any cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core_torl.objective.shared_prompts import joining_pays, prompt_groups
from core_torl.objective.token_batch import TokenBatch


@dataclass(frozen=True)
class Part:
    """Rows of one forward pass, the token places that it reads, and those of them that hold a token."""

    rows: list[int]
    places: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """One row's tokens; rows with the same ``group`` have the same prompt."""

    prompt: int
    answer: int
    group: int


def lengths_of(batch: TokenBatch) -> list[Lengths]:
    """Of each row of a batch."""
    prompt = batch.ids.shape[1] - batch.answer_length
    mask = batch.attention_mask
    columns = mask[:, :prompt].sum(dim=1).tolist(), mask[:, prompt:].sum(dim=1).tolist(), prompt_groups(batch).tolist()
    return [Lengths(*row) for row in zip(*columns, strict=True)]


def cut(lengths: Sequence[Lengths], rows: int, places: int | None, share: bool) -> list[Part]:
    """All rows in parts of at most ``rows`` rows, or, where ``places`` is given, of at most so many token places.

    A row that is longer than ``places`` is a part of its own. ``share``: rows with one prompt may be read together.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i].prompt + lengths[i].answer)
    # Within a prompt by length as well; the prompts by their longest row, so that like stands beside like.
    longest: dict[int, int] = {}
    for i in by_length:
        longest[lengths[i].group] = lengths[i].prompt + lengths[i].answer
    by_prompt = sorted(by_length, key=lambda i: (longest[lengths[i].group], lengths[i].group))
    if places is None:
        order = by_prompt if share else by_length
        return [_part(order[s : s + rows], lengths, share) for s in range(0, len(order), rows)]
    # Which order wastes least depends on whether prompts or answers differ more.
    by_answer = sorted(by_length, key=lambda i: lengths[i].answer)
    orders = [by_length, by_answer, *([by_prompt] if share else [])]
    plans = [_filled(order, lengths, places, share) for order in orders]
    return min(plans, key=lambda parts: sum(part.places for part in parts))


def _filled(order: Iterable[int], lengths: Sequence[Lengths], places: int, share: bool) -> list[Part]:
    """Parts that are filled one after the other, in this order."""
    parts: list[Part] = []
    held: list[int] = []
    size = _Size(share)
    for i in order:
        size.add(lengths[i])
        if held and size.places > places:
            parts.append(_part(held, lengths, share))
            held, size = [], _Size(share)
            size.add(lengths[i])
        held.append(i)
    return [*parts, _part(held, lengths, share)] if held else parts


def _part(rows: list[int], lengths: Sequence[Lengths], share: bool) -> Part:
    size = _Size(share)
    for i in rows:
        size.add(lengths[i])
    return Part(rows, size.places, size.tokens)


class _Size:
    """What a forward pass over some rows reads."""

    def __init__(self, share: bool) -> None:
        self.share = share
        self.rows = self.prompt = self.answer = 0
        self._groups: Counter[int] = Counter()
        self._slots = self._prompts = self._distinct = self._answers = 0

    def add(self, row: Lengths) -> None:
        self.rows += 1
        self.prompt, self.answer = max(self.prompt, row.prompt), max(self.answer, row.answer)
        if not self._groups[row.group]:
            self._distinct += row.prompt
        self._groups[row.group] += 1
        self._slots = max(self._slots, self._groups[row.group])
        self._prompts += row.prompt
        self._answers += row.answer

    @property
    def joined(self) -> bool:
        answer = max(1, self.answer)
        return self.share and joining_pays(self.rows, len(self._groups), self._slots, self.prompt, answer)

    @property
    def places(self) -> int:
        answer = max(1, self.answer)  # as TokenBatch: an empty answer still has a place
        if self.joined:
            return len(self._groups) * (self.prompt + self._slots * answer)
        return self.rows * (self.prompt + answer)

    @property
    def tokens(self) -> int:
        return self._answers + (self._distinct if self.joined else self._prompts)


def idle_part(batch: TokenBatch) -> TokenBatch:
    """The shortest row without anything to learn: for a rank that has to keep step with others and has no rows left."""
    shortest = int(batch.attention_mask.sum(dim=1).argmin())
    part = batch.select(slice(shortest, shortest + 1))
    return replace(part, train_mask=torch.zeros_like(part.train_mask), advantages=torch.zeros_like(part.advantages))


def picked(batch: TokenBatch, rows: Tensor, part: Part) -> TokenBatch:
    """The rows of a part, whose numbers count within ``rows``: [rows], numbers within the batch."""
    return batch.select(rows[torch.tensor(part.rows, device=rows.device)])
