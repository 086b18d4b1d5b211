"""The table of answers in progress, and how its rows are packed into blocks that share a prompt.

``Rows`` records what each answer has drawn so far and decides when it ends. ``pack`` chooses how many rows stand in one
block: large blocks share more of the prompt, small ones leave fewer empty places once some answers have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core_torl.sampler.draw import uniforms
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
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
    """Answers to ``requests``, one row each, in request order."""

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        sampling: SamplingConfig,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
    ) -> None:
        self.sampling, self.tokenizer = sampling, tokenizer
        self.eos_ids = torch.tensor(sorted(eos_ids))
        self.request_of_row = torch.tensor([i for i, r in enumerate(requests) for _ in range(r.n)])
        count = len(self.request_of_row)
        self.numbers = uniforms(requests, sampling.max_new_tokens)  # [rows, max new tokens]
        self.ids = torch.zeros(count, sampling.max_new_tokens, dtype=torch.long)
        self.logprobs = torch.zeros(count, sampling.max_new_tokens)
        self.length = torch.zeros(count, dtype=torch.long)
        self.done = torch.zeros(count, dtype=torch.bool)
        self.finish: dict[int, tuple[Finish, str | int | None]] = {}

    def active(self) -> dict[int, list[int]]:
        """Rows that still grow, by request."""
        groups: dict[int, list[int]] = {}
        for row in (~self.done).nonzero().flatten().tolist():
            groups.setdefault(int(self.request_of_row[row]), []).append(row)
        return groups

    def record(self, rows: Tensor, ids: Tensor, logprobs: Tensor, step: int) -> Tensor:
        """Write the tokens drawn at ``step`` for ``rows``; returns which of these rows ended with it. All [rows]."""
        self.ids[rows, step] = ids
        self.logprobs[rows, step] = logprobs
        self.length[rows] = step + 1
        ended = torch.isin(ids, self.eos_ids)
        for i in ended.nonzero().flatten().tolist():
            self.finish[int(rows[i])] = ("eos", int(ids[i]))
        if self.sampling.stop and step + 1 > self.sampling.min_new_tokens:
            for i, row in enumerate(rows.tolist()):
                stop = None if ended[i] else self._stop_string(row, step + 1)
                if stop is not None:
                    ended[i] = True
                    self.finish[row] = ("stop", stop)
        self.done[rows[ended]] = True
        return ended

    def _stop_string(self, row: int, length: int) -> str | None:
        # A token decodes to at least one byte, so a stop string of k bytes lies in the last k tokens and some slack.
        reach = max(len(s.encode()) for s in self.sampling.stop) + 4
        tail = self.tokenizer.decode(self.ids[row, max(0, length - reach) : length].tolist())
        return next((s for s in self.sampling.stop if s in tail), None)

    def samples(self, requests: Sequence[SampleRequest], version: str) -> list[list[Sample]]:
        """The finished table as samples, grouped by request. A row without an end was cut by its length."""
        result: list[list[Sample]] = []
        row = 0
        lengths, ids, logprobs = self.length.tolist(), self.ids.tolist(), self.logprobs.tolist()
        for request in requests:
            group = []
            for _ in range(request.n):
                n = lengths[row]
                finish, stop = self.finish.get(row, ("length", None))
                group.append(Sample(tuple(ids[row][:n]), tuple(logprobs[row][:n]), finish, stop, version))
                row += 1
            result.append(group)
        return result
