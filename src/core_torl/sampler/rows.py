"""The table of answers in progress, and how its rows are packed into blocks that share a prompt.

``Rows`` records what each answer holds so far, drawn or given, and decides when its turn ends. ``pack`` chooses how
many rows stand in one block: large blocks share more of the prompt, small ones leave fewer empty places once some
answers have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core_torl.sampler.draw import uniforms
from core_torl.sampler.protocol import SampleRequest, SamplingConfig, token_limit
from core_torl.sampler.stops import StopFinder
from core_torl.trajectory import Finish, Sample

_BLOCK_COST = 0.5  # what one more copy of a prompt costs, in rows; measured order of magnitude, not critical


@dataclass(frozen=True)
class Packing:
    """``places[b * per_block + j]`` is the row at place j of block b; ``live`` is False where a place is a filler."""

    blocks: Tensor  # [blocks] request of each block
    places: Tensor  # [blocks * per_block] row of each place
    live: Tensor  # [blocks * per_block] bool
    per_block: int


def pack(rows_of_request: dict[int, list[int]], largest: int) -> Packing:
    """Pack the rows of each request into blocks of one size, the cheapest among ``largest`` and the powers of two."""
    counts = [len(rows) for rows in rows_of_request.values()]
    sizes = {s for s in (1, 2, 4, 8, 16, 32, 64, 128) if s <= max(counts)} | {max(counts), largest}

    def cost(size: int) -> float:
        blocks = sum(-(-c // size) for c in counts)
        return blocks * size + _BLOCK_COST * blocks

    size = min(sorted(sizes), key=cost)
    blocks, places, live = [], [], []
    for request, rows in rows_of_request.items():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            fill = size - len(part)
            blocks.append(request)
            places += part + [part[0]] * fill
            live += [True] * len(part) + [False] * fill
    return Packing(torch.tensor(blocks), torch.tensor(places), torch.tensor(live), size)


class Rows:
    """Answers to ``requests``, one row each, in order. A row runs, waits (its turn has ended) or is gone."""

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        sampling: SamplingConfig,
        finder: StopFinder,
        eos_ids: Sequence[int],
    ) -> None:
        self.sampling, self.finder = sampling, finder
        self.eos_ids = torch.tensor(sorted(eos_ids))
        of_row = [(i, r) for i, r in enumerate(requests) for _ in range(r.n)]
        self.request_of_row = torch.tensor([i for i, _ in of_row])
        self.limit = torch.tensor([token_limit(r, sampling) for _, r in of_row])  # [rows] longest answer
        self.start = torch.tensor([r.start for _, r in of_row])  # [rows] tokens of the answer before this request
        self.stops = [sampling.stop if r.stop is None else r.stop for _, r in of_row]
        longest = int(self.limit.max())
        self.numbers = uniforms(requests, longest)  # [rows, longest]
        self.ids = torch.zeros(len(of_row), longest, dtype=torch.long)
        self.logprobs = torch.zeros(len(of_row), longest)
        self.length = torch.zeros(len(of_row), dtype=torch.long)
        self.waiting = torch.zeros(len(of_row), dtype=torch.bool)
        self.gone = torch.zeros(len(of_row), dtype=torch.bool)
        self.turn_start = [0] * len(of_row)  # where the tokens drawn since the last resume begin
        self.finish: dict[int, tuple[Finish, str | int | None]] = {}

    @property
    def running(self) -> Tensor:
        """[rows] bool."""
        return ~(self.waiting | self.gone)

    def active(self) -> dict[int, list[int]]:
        """Rows that run or wait, by request."""
        groups: dict[int, list[int]] = {}
        for row in (~self.gone).nonzero().flatten().tolist():
            groups.setdefault(int(self.request_of_row[row]), []).append(row)
        return groups

    def hold_back(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The logits of rows that may not end yet, without the end tokens. logits: [rows, vocabulary]; rows: [rows]."""
        if not self.sampling.min_new_tokens:
            return logits
        early = self.start[rows] + self.length[rows] < self.sampling.min_new_tokens
        forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool).index_fill_(0, self.eos_ids, True)
        return logits.masked_fill((early[:, None] & forbidden[None]).to(logits.device), -torch.inf)

    def record(self, rows: Tensor, ids: Tensor, logprobs: Tensor) -> list[int]:
        """Add a drawn token to each of ``rows``; returns the rows whose turn ended with it. All [rows]."""
        places = self.length[rows]
        self.ids[rows, places] = ids
        self.logprobs[rows, places] = logprobs
        self.length[rows] = places + 1
        eos, cut = torch.isin(ids, self.eos_ids), places + 1 >= self.limit[rows]
        found = self._stops_found(rows, ~eos) if any(self.stops) else {}
        ended = []
        for i in sorted({*found, *(eos | cut).nonzero().flatten().tolist()}):
            row = int(rows[i])
            self.finish[row] = (
                ("eos", int(ids[i])) if eos[i] else ("stop", found[i]) if i in found else ("length", None)
            )
            ended.append(row)
        self.waiting[ended] = True
        return ended

    def give(self, row: int, ids: Sequence[int], stop: tuple[str, ...]) -> None:
        """Send a waiting row on behind ``ids``. Raises ValueError if no token is left to draw."""
        length = int(self.length[row])
        if length + len(ids) >= self.limit[row]:
            raise ValueError(
                f"row {row} has {int(self.limit[row]) - length} tokens left, no room for {len(ids)} and one"
            )
        self.ids[row, length : length + len(ids)] = torch.tensor(list(ids), dtype=torch.long)
        self.length[row] = self.turn_start[row] = length + len(ids)
        self.stops[row] = stop
        self.waiting[row] = False
        self.finish.pop(row, None)

    def _stops_found(self, rows: Tensor, open_ended: Tensor) -> dict[int, str]:
        """index -> stop string, for those of ``rows`` where one has appeared. Both [rows]."""
        # Stop strings are held back like ends.
        late = open_ended & (self.start[rows] + self.length[rows] > self.sampling.min_new_tokens)
        found: dict[int, str] = {}
        for i in late.nonzero().flatten().tolist():
            row = int(rows[i])
            stop = self._stop_string(row) if self.stops[row] else None
            if stop is not None:
                found[i] = stop
        return found

    def _stop_string(self, row: int) -> str | None:
        length = int(self.length[row])
        if not self.finder.may_end(int(self.ids[row, length - 1]), self.stops[row]):
            return None
        return self.finder.find(self.ids[row, self.turn_start[row] : length].tolist(), self.stops[row])

    def sample(self, row: int, version: str) -> Sample:
        """One row as a sample. A row that still runs counts as cut by its length."""
        n = int(self.length[row])
        finish, stop = self.finish.get(row, ("length", None))
        return Sample(tuple(self.ids[row, :n].tolist()), tuple(self.logprobs[row, :n].tolist()), finish, stop, version)

    def samples(self, requests: Sequence[SampleRequest], version: str) -> list[list[Sample]]:
        """The finished table as samples, grouped by request."""
        rows = iter(range(len(self.stops)))
        return [[self.sample(next(rows), version) for _ in range(r.n)] for r in requests]
