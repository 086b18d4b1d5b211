"""A sandbox that runs nothing, a policy that writes what a script says, and one that loves to open blocks."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch

from core_torl.code_blocks import OUTPUT
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sandbox.protocol import Execution
from core_torl.trajectory import Sample


class FakeSandbox:
    """``rule(code)`` says how a program ends, ``delay(code)`` after how many seconds."""

    concurrency = 64

    def __init__(self, rule: Callable[[str], Execution], delay: Callable[[str], float] = lambda code: 0.0) -> None:
        self.rule, self.delay, self.codes = rule, delay, []
        self.started = self.closed = False

    def start(self) -> None:
        self.started = True

    def submit(self, code: str) -> Future[Execution]:
        self.codes.append(code)
        future: Future[Execution] = Future()
        seconds = self.delay(code)
        if seconds:
            threading.Timer(seconds, lambda: future.set_result(self.rule(code))).start()
        else:
            future.set_result(self.rule(code))
        return future

    def close(self) -> None:
        self.closed = True


def by_content(code: str) -> Execution:
    """An ending that depends on the program alone, of every kind but a failing sandbox."""
    kind = zlib.crc32(code.encode()) % 5
    return [
        Execution("17\n", "", "ok", 0.01),
        Execution("", "", "ok", 0.01),
        Execution("3\n", "Traceback\nNameError: name 'x' is not defined\n", "error", 0.01),
        Execution("", "Traceback\nZeroDivisionError: division by zero\n", "error", 0.02),
        Execution("", "", "time_limit", 1.0),
    ][kind]


class ScriptedSampler:
    """Row ``j`` of request ``i`` writes ``scripts[i][j]``: what the policy says in each turn. It has no session."""

    def __init__(self, tokenizer, scripts: Sequence[Sequence[Sequence[str]]], max_new_tokens: int = 10_000) -> None:
        self.tokenizer, self.scripts = tokenizer, scripts
        self.sampling = SamplingConfig(max_new_tokens)
        self.turns: dict[tuple[int, int], int] = {}
        self.asked: list[SampleRequest] = []
        self.said: dict[tuple[int, int], list[int]] = {}  # every token that a row drew

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> list[list[Sample]]:
        sampling = sampling or self.sampling
        self.asked += requests
        return [[self._say(r, j, sampling) for j in range(r.first, r.first + r.n)] for r in requests]

    def _say(self, request: SampleRequest, j: int, sampling: SamplingConfig) -> Sample:
        key = (request.seed or 0, j)
        turn = self.turns.get(key, 0)
        self.turns[key] = turn + 1
        script = self.scripts[key[0]][j]
        text = script[turn] if turn < len(script) else "and that is all"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        stops = sampling.stop if request.stop is None else request.stop
        limit = sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        said, finish, stop = [], "eos", self.tokenizer.eos_token_id
        for i in [*ids, self.tokenizer.eos_token_id]:
            said.append(i)
            found = next((s for s in stops if s in self.tokenizer.decode(said)), None)
            if i == self.tokenizer.eos_token_id:
                break
            if found:
                finish, stop = "stop", found
                break
            if len(said) == limit:
                finish, stop = "length", None
                break
        self.said.setdefault(key, []).extend(said)
        return Sample(tuple(said), tuple(-0.1 * (k + 1) for k in range(len(said))), finish, stop)

    def sync(self, named_tensors, version) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


@pytest.fixture(scope="session")
def fake_sandbox():
    return FakeSandbox


@pytest.fixture(scope="session")
def endings():
    return by_content


@pytest.fixture(scope="session")
def scripted():
    return ScriptedSampler


@pytest.fixture(scope="session")
def talkative(make_tiny, tiny_tokenizer):
    """An untrained policy that mostly opens and closes blocks: its answers hold calls of every kind."""
    model = make_tiny(seed=3)
    bias = torch.zeros(len(tiny_tokenizer))
    words = {"```python": 4.5, "\n": 6.0, "```": 4.5, OUTPUT: 5.0, " 1": 4.0, "print": 4.0, "x": 3.0, "</s>": 1.0}
    for word, weight in words.items():
        ids = tiny_tokenizer(word, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1, word
        bias[ids[0]] = weight
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias)
    return model
