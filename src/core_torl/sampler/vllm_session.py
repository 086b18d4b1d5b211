"""Answers on vLLM servers that can be interrupted and sent on: each turn of an answer is a request of its own.

A turn's tokens so far come with the request; the server has them in its prefix cache, because a row stays with its
server. Rows run side by side and end in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from core_torl.sampler.protocol import SampleRequest, SamplingConfig, token_limit
from core_torl.sampler.vllm_client import Answer, Server
from core_torl.sampler.vllm_fleet import Group
from core_torl.sampler.vllm_params import seed_of
from core_torl.trajectory import Sample

Ask = Callable[[Group, SampleRequest, SamplingConfig], "Future[tuple[Server, Answer]]"]


class ServerSession:
    """See core_torl.sampler.protocol.Session. ``ask`` sends a request for one answer; ``version``: of the weights."""

    def __init__(self, ask: Ask, requests: Sequence[SampleRequest], sampling: SamplingConfig, version: str) -> None:
        self.ask, self.sampling, self.version = ask, sampling, version
        self.of_row: list[tuple[SampleRequest, Group]] = []
        for request in requests:
            group, seed = Group(), seed_of(request)
            self.of_row += [
                (dataclasses.replace(request, n=1, seed=seed, first=request.first + j), group) for j in range(request.n)
            ]
        self.samples: dict[int, Sample] = {}  # what each row has so far
        self.servers: set[Server] = set()  # that have answered
        self._under_way: dict[int, Future[tuple[Server, Answer]]] = {}
        self._ended: SimpleQueue[int] = SimpleQueue()
        for row, (request, group) in enumerate(self.of_row):
            self._send(row, request, group)

    def _send(self, row: int, request: SampleRequest, group: Group) -> None:
        future = self._under_way[row] = self.ask(group, request, self.sampling)
        future.add_done_callback(lambda _: self._ended.put(row))

    @property
    def running(self) -> int:
        return len(self._under_way)

    def advance(self) -> list[int]:
        """Wait for a row's turn to end; returns all that have ended by then."""
        if not self._under_way:
            return []
        rows = [self._ended.get()]
        while True:
            try:
                rows.append(self._ended.get_nowait())
            except Empty:
                break
        for row in rows:
            server, new = self._under_way.pop(row).result()
            self.servers.add(server)
            old = self.samples.get(row)
            ids, logprobs = (old.token_ids, old.logprobs) if old else ((), ())
            self.samples[row] = Sample(ids + new.token_ids, logprobs + new.logprobs, new.finish, new.stop, self.version)
        return rows

    def answer(self, row: int) -> Sample:
        return self.samples[row]

    def resume(self, row: int, token_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        (request, group), old = self.of_row[row], self.samples[row]
        left = token_limit(request, self.sampling) - len(old.token_ids)
        if len(token_ids) >= left:
            raise ValueError(f"row {row} has {left} tokens left, no room for {len(token_ids)} and one")
        ids = old.token_ids + tuple(token_ids)
        self.samples[row] = dataclasses.replace(old, token_ids=ids, logprobs=old.logprobs + (0.0,) * len(token_ids))
        rest = dataclasses.replace(
            request, prompt_ids=request.prompt_ids + ids, start=request.start + len(ids),
            max_new_tokens=left - len(token_ids), stop=stop,
        )  # fmt: skip
        self._send(row, rest, group)

    def release(self, row: int) -> None:
        """Nothing is kept for a row but its tokens."""

    def close(self) -> None:
        """Give up what is still under way."""
        for future in self._under_way.values():
            future.cancel()
