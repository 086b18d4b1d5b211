"""Interruptible answers on top of any sampler that only has ``generate``: one call of it for all rows that run.

Simple and right, but every row waits for the slowest one of the call, and a sampler without a prefix cache reads a
resumed answer again from its first token. Samplers that can do better bring a session of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from core_torl.sampler.protocol import SampleRequest, SamplingConfig, token_limit
from core_torl.trajectory import Sample


class GenerateSession:
    """See core_torl.sampler.protocol.Session. ``sampler`` is anything with ``generate``."""

    def __init__(self, sampler: Any, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> None:
        self.sampler, self.sampling = sampler, sampling
        seeded = [
            r if r.seed is not None else dataclasses.replace(r, seed=int(torch.randint(2**62, ()))) for r in requests
        ]
        self.of_row = [(r, j) for r in seeded for j in range(r.n)]  # each row's request, and its number in it
        self.limit = [token_limit(r, sampling) for r, _ in self.of_row]
        self.fresh: list[SampleRequest] = seeded
        self.resumed: dict[int, tuple[str, ...]] = {}  # rows to go on with, and their stop strings
        self.samples: dict[int, Sample] = {}  # what each row has so far

    @property
    def running(self) -> int:
        return sum(r.n for r in self.fresh) + len(self.resumed)

    def advance(self) -> list[int]:
        """Every running row to the end of its turn."""
        if self.fresh:
            rows = list(range(len(self.of_row)))
            results = [s for group in self.sampler.generate(self.fresh, self.sampling) for s in group]
            self.fresh = []
        else:
            rows = list(self.resumed)
            results = (
                [g[0] for g in self.sampler.generate([self._rest(r) for r in rows], self.sampling)] if rows else []
            )
            self.resumed = {}
        for row, new in zip(rows, results, strict=True):
            old = self.samples.get(row)
            if old is not None:
                ids, logprobs = old.token_ids + new.token_ids, old.logprobs + new.logprobs
                new = dataclasses.replace(new, token_ids=ids, logprobs=logprobs)
            self.samples[row] = new
        return rows

    def _rest(self, row: int) -> SampleRequest:
        """What is left of a row, asked for as an answer of its own."""
        (request, j), so_far = self.of_row[row], self.samples[row].token_ids
        return dataclasses.replace(
            request, prompt_ids=request.prompt_ids + so_far, n=1, first=request.first + j,
            start=request.start + len(so_far), max_new_tokens=self.limit[row] - len(so_far), stop=self.resumed[row],
        )  # fmt: skip

    def answer(self, row: int) -> Sample:
        return self.samples[row]

    def resume(self, row: int, token_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        old = self.samples[row]
        left = self.limit[row] - len(old.token_ids)
        if len(token_ids) >= left:
            raise ValueError(f"row {row} has {left} tokens left, no room for {len(token_ids)} and one")
        self.samples[row] = dataclasses.replace(
            old, token_ids=old.token_ids + tuple(token_ids), logprobs=old.logprobs + (0.0,) * len(token_ids)
        )
        self.resumed[row] = stop

    def release(self, row: int) -> None:
        """Nothing is kept for a row but its tokens."""
