"""Answers in progress in a vLLM engine of this process: each turn of a row is a request of its own.

A turn that ends leaves the engine; when its row is resumed, prompt, answer and given tokens go back as a new prompt.
Their keys and values are still in the prefix cache, so that little more than the given tokens is read, and the row goes
on beside the others at once.

A vLLM request owns a generator that starts from its seed, so a resumed row draws from a stream of its own, made from
(seed, place, tokens so far). It is reproducible, but not what the row would have drawn without the interruption.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from core_torl.sampler.protocol import SampleRequest, SamplingConfig, token_limit
from core_torl.sampler.vllm_engine import Engine
from core_torl.sampler.vllm_params import answer_seed, sampling_parameters, seed_of
from core_torl.trajectory import Finish, Sample


class EngineSession:
    """See core_torl.sampler.protocol.Session. Several may be open on one engine: each takes its own answers only."""

    def __init__(
        self, engine: Engine, requests: Sequence[SampleRequest], sampling: SamplingConfig, eos_ids: Sequence[int]
    ) -> None:
        self.engine, self.sampling, self.eos_ids = engine, sampling, frozenset(eos_ids)
        self.of_row: list[tuple[SampleRequest, int, int]] = []  # each row's request, its seed, and its place in it
        self.samples: dict[int, Sample] = {}  # what each row has so far
        self._row_of: dict[str, int] = {}  # turns that run
        try:
            for request in requests:
                seed, parameters = seed_of(request), sampling_parameters(request, sampling, eos_ids)
                for place in range(request.first, request.first + request.n):
                    self.of_row.append((request, seed, place))
                    name = engine.add(request.prompt_ids, parameters, answer_seed(seed, place, request.start))
                    self._row_of[name] = len(self.of_row) - 1
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> int:
        return len(self._row_of)

    def advance(self) -> list[int]:
        """A token for each answer in the engine; returns the rows whose turn has ended, by it or by others' steps."""
        if not self._row_of:
            return []
        if self.engine.finished.keys().isdisjoint(self._row_of):
            self.engine.step()
        rows = []
        for name in self.engine.finished.keys() & self._row_of.keys():
            row = self._row_of.pop(name)
            self._take(row, to_sample(self.engine.finished.pop(name), self.eos_ids))
            rows.append(row)
        return sorted(rows)

    def _take(self, row: int, new: Sample) -> None:
        old = self.samples.get(row)
        if old is not None:
            ids, logprobs = old.token_ids + new.token_ids, old.logprobs + new.logprobs
            # A row is as old as its oldest turn.
            new = dataclasses.replace(new, token_ids=ids, logprobs=logprobs, weight_version=old.weight_version)
        self.samples[row] = new

    def answer(self, row: int) -> Sample:
        """The row's answer up to the end of its last turn. KeyError while its first turn runs."""
        return self.samples[row]

    def resume(self, row: int, token_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        old, (request, seed, place) = self.samples[row], self.of_row[row]
        left = token_limit(request, self.sampling) - len(old.token_ids)
        if len(token_ids) >= left:
            raise ValueError(f"row {row} has {left} tokens left, no room for {len(token_ids)} and one")
        ids = old.token_ids + tuple(token_ids)
        self.samples[row] = dataclasses.replace(old, token_ids=ids, logprobs=old.logprobs + (0.0,) * len(token_ids))
        rest = dataclasses.replace(
            request, prompt_ids=request.prompt_ids + ids, start=request.start + len(ids),
            max_new_tokens=left - len(token_ids), stop=stop,
        )  # fmt: skip
        parameters = sampling_parameters(rest, self.sampling, self.eos_ids)
        name = self.engine.add(rest.prompt_ids, parameters, answer_seed(seed, place, rest.start))
        self._row_of[name] = row

    def release(self, row: int) -> None:
        """Nothing is kept for a row that waits but its tokens; the engine forgets its keys when it needs the room."""

    def close(self) -> None:
        """Give up what still runs."""
        self.engine.abort(self._row_of)
        self._row_of.clear()


def to_sample(output: Any, eos_ids: frozenset[int]) -> Sample:
    """vLLM's CompletionOutput as a sample. Raises RuntimeError where it is not what was asked for."""
    ids, logprobs = tuple(output.token_ids), tuple(float(x) for x in output.logprobs.logprobs)
    if tuple(output.logprobs.token_ids) != ids:
        raise RuntimeError(f"sampler: vLLM returned {len(logprobs)} log-probs for an answer of {len(ids)} tokens")
    if not output.weight_versions:
        raise RuntimeError("sampler: vLLM did not say which weights it drew an answer with")
    version = output.weight_versions[0].version
    if output.finish_reason == "length":
        return Sample(ids, logprobs, "length", None, version)
    if output.finish_reason != "stop":
        raise RuntimeError(f"sampler: vLLM ended an answer with {output.finish_reason!r}")
    finish: Finish = "eos" if output.stop_reason in eos_ids else "stop"
    return Sample(ids, logprobs, finish, output.stop_reason, version)
