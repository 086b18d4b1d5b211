"""The tool loop: a sampler whose answers may have Python run for them.

A turn ends when the policy opens an output block. Its program is run, what came out of it is appended **as token ids**,
and the answer goes on behind them. Nothing is decoded and encoded again: the tokens that the policy drew are the tokens
that are trained, and ``ToolCall.start`` and ``end`` say exactly which ones it did not draw.

Each answer is on its own. As soon as its result is back it goes on, while others are generated and others wait; the
embedded sampler keeps what it has read of an answer that waits. Where all that the sampler takes at once waits for
programs, it begins with the next. Draws depend on a row's seed and place alone, so the order in which results come back
changes nothing.

``call_budget`` (C) counts programs that were run. A turn that opens an output without a program costs nothing and is
told nothing. The answer is always continued after the last call. When the sandbox itself fails, after its own retries,
the answer is given up as "abort": nobody knows what the program would have done.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeAlias

from core_torl.code_blocks import OUTPUT, python_blocks, select
from core_torl.config.tool_checks import check_choice
from core_torl.sampler.generate_session import GenerateSession
from core_torl.sampler.protocol import Sampler, SampleRequest, SamplingConfig, Session, Weights, token_limit
from core_torl.sandbox.protocol import Execution, Sandbox
from core_torl.trajectory import Finish, Sample, ToolCall

_PARTS_AT_ONCE = 4  # parts of which some answers may wait for programs
Results: TypeAlias = "SimpleQueue[tuple[_Loop, int, Future[Execution]]]"


class ObservationRules(Protocol):
    def text(self, execution: Execution) -> str: ...


class ToolSampler:
    """A sampler with tools: see core_torl.sampler.protocol for what it promises, and this module's first lines.

    ``block_policy`` says which program of a turn is run: the last one, the first one, or all, one behind the other.
    ``budget_notice`` says what happens once no call is left: "none" (the paper: the policy is not told, and output
    blocks that it opens are its own invention), "message" (the last observation ends with ``notice``), "forbid_output"
    (an answer that opens another output block ends there).

    Raises:
        ValueError: a value is out of range; the message names its config key and the fix.
    """

    def __init__(
        self,
        sampler: Sampler,
        sandbox: Sandbox,
        tokenizer: Any,
        *,
        observation: ObservationRules,
        call_budget: int,
        block_policy: str = "last",
        budget_notice: str = "none",
        notice: str = "[no calls left]",
    ) -> None:
        if call_budget < 1:
            raise ValueError(f"tool.call_budget={call_budget}: a sampler with tools needs at least 1")
        check_choice("tool.block_policy", block_policy)
        check_choice("tool.budget_notice", budget_notice)
        self.sampler, self.sandbox, self.tokenizer, self.observation = sampler, sandbox, tokenizer, observation
        self.call_budget, self.block_policy, self.budget_notice = call_budget, block_policy, budget_notice
        self.notice = notice

    @property
    def sampling(self) -> SamplingConfig:
        return self.sampler.sampling

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> list[list[Sample]]:
        """Samples in the order of the requests, their calls among their tokens."""
        sampling = sampling or self.sampling
        parts = deque(self._parts([_watching(r, sampling) for r in requests]))
        loops: list[_Loop] = []
        results: Results = SimpleQueue()
        with ExitStack() as sessions:
            while parts or any(loop.unfinished for loop in loops):
                running = any(loop.session.running for loop in loops)
                at_once = sum(loop.unfinished for loop in loops)
                if parts and not running and at_once < _PARTS_AT_ONCE:
                    # What the sampler takes at once is under way; while all of it waits for programs, the next begins.
                    part = parts.popleft()
                    session = sessions.enter_context(self._session(part, sampling))
                    loops.append(_Loop(self, session, part, sampling, results))
                    continue
                self._take(results, wait=not running)
                for loop in loops:
                    loop.advance()
        flat = (sample for loop in loops for sample in loop.samples())
        return [[next(flat) for _ in range(r.n)] for r in requests]

    @staticmethod
    def _take(results: Results, wait: bool) -> None:
        """Send on every row whose result is there; wait for one if nothing else can be done."""
        while True:
            try:
                loop, row, future = results.get(block=wait)
            except Empty:
                return
            wait = False
            loop.observe(row, future)

    def _parts(self, requests: Sequence[SampleRequest]) -> Iterator[Sequence[SampleRequest]]:
        """What the sampler takes at once."""
        sampler: Any = self.sampler
        if requests:
            yield from sampler.parts(requests) if hasattr(sampler, "parts") else [requests]

    def _session(self, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> AbstractContextManager[Session]:
        sampler: Any = self.sampler
        if hasattr(sampler, "session"):
            return sampler.session(requests, sampling)
        return nullcontext(GenerateSession(sampler, requests, sampling))

    def observed(self, text: str, before: str) -> tuple[int, ...]:
        """Token ids of an observation behind an answer that ends in ``before``."""
        opening = "" if before.endswith("\n") else "\n"
        return encode_plainly(self.tokenizer, f"{opening}{text}\n```\n")

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def sync(self, weights: Weights, version: str) -> None:
        self.sampler.sync(weights, version)

    def sleep(self) -> None:
        self.sampler.sleep()

    def wake(self) -> None:
        self.sampler.wake()

    def close(self) -> None:
        self.sampler.close()
        self.sandbox.close()


def encode_plainly(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of ``text`` without any special token, also where it spells one: a program must not end an answer."""
    ids = tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    special = set(tokenizer.all_special_ids)
    if special.isdisjoint(ids):
        return ids
    # A tokenizer whose own vocabulary holds the special tokens: cut the text inside of each, so that none is seen.
    names = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    pieces = re.split("|".join(f"(?<={re.escape(n[:1])})(?={re.escape(n[1:])})" for n in names if n[1:]), text)
    return tuple(i for piece in pieces for i in tokenizer(piece, add_special_tokens=False)["input_ids"])


def _watching(request: SampleRequest, sampling: SamplingConfig) -> SampleRequest:
    """The request, with the marker that asks for a run among its stop strings."""
    return dataclasses.replace(request, stop=(*(sampling.stop if request.stop is None else request.stop), OUTPUT))


class _Loop:
    """One session from its first token to its last. ``results`` gets (loop, row, future) as programs end."""

    def __init__(
        self,
        tools: ToolSampler,
        session: Session,
        requests: Sequence[SampleRequest],
        sampling: SamplingConfig,
        results: Results,
    ) -> None:
        self.tools, self.session, self.results = tools, session, results
        of_row = [r for r in requests for _ in range(r.n)]
        self.limit = [token_limit(r, sampling) for r in of_row]
        self.stops = [r.stop or (OUTPUT,) for r in of_row]
        self.calls: list[list[ToolCall]] = [[] for _ in of_row]
        self.turn_start = [0] * len(of_row)  # the first token behind the last observation
        self.finished: dict[int, Sample] = {}
        self.waiting: dict[int, str] = {}  # rows whose program runs

    @property
    def unfinished(self) -> bool:
        return len(self.finished) < len(self.calls)

    def samples(self) -> list[Sample]:
        return [self.finished[row] for row in range(len(self.calls))]

    def advance(self) -> None:
        """A step of every running row."""
        if self.session.running:
            for row in self.session.advance():
                self._end_of_turn(row)

    def _end_of_turn(self, row: int) -> None:
        answer = self.session.answer(row)
        if answer.finish != "stop" or answer.stop != OUTPUT:
            return self._finish(row, answer)
        if len(self.calls[row]) == self.tools.call_budget:  # with budget_notice=forbid_output
            return self._finish(row, answer)
        turn = self.tools.decode(answer.token_ids[self.turn_start[row] :])
        code = select(python_blocks(turn), self.tools.block_policy)
        if code is not None:
            self.waiting[row] = code
            future = self.tools.sandbox.submit(code)
            future.add_done_callback(lambda done: self.results.put((self, row, done)))
        elif len(answer.token_ids) < self.limit[row]:
            self.session.resume(row, (), self.stops[row])  # an output of nothing: the policy is on its own
        else:
            self._finish(row, answer, "length")

    def observe(self, row: int, future: Future[Execution]) -> None:
        """Append what came out of a row's program, and send the row on."""
        code, answer, calls = self.waiting.pop(row), self.session.answer(row), self.calls[row]
        try:
            execution = future.result()
        except CancelledError:
            execution = Execution("", "", "infrastructure", detail="the sandbox was closed")
        place = len(answer.token_ids)
        if execution.status == "infrastructure":
            calls.append(ToolCall(code, execution.status, "", place, place, execution.seconds))
            return self._finish(row, answer, "abort")
        text = self.tools.observation.text(execution)
        left = self.tools.call_budget - len(calls) - 1
        if not left and self.tools.budget_notice == "message":
            text = f"{text}\n{self.tools.notice}"
        ids = self.tools.observed(text, self.tools.decode(answer.token_ids[self.turn_start[row] :]))
        if place + len(ids) >= self.limit[row]:
            # No room for the observation and a token more: cut here, with what the policy wrote so far.
            calls.append(ToolCall(code, execution.status, text, place, place, execution.seconds))
            return self._finish(row, answer, "length")
        calls.append(ToolCall(code, execution.status, text, place, place + len(ids), execution.seconds))
        self.turn_start[row] = place + len(ids)
        watch = left > 0 or self.tools.budget_notice == "forbid_output"
        self.session.resume(row, ids, self.stops[row] if watch else self.stops[row][:-1])

    def _finish(self, row: int, answer: Sample, finish: Finish | None = None) -> None:
        if finish is not None:
            answer = dataclasses.replace(answer, finish=finish, stop=None)
        self.finished[row] = dataclasses.replace(answer, calls=tuple(self.calls[row]))
        self.session.release(row)
