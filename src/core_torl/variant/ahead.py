"""Sampling the next step's answers while this step trains (``variant.overlap``).

The answers of step t+1 come from the policy as it was before step t's update: they are one RL step old, never more, for
the thread is waited for before the sampler gets new weights. Their importance ratio is taken against the log-probs that
they were sampled with. The sampler must have weights of its own. Answers in hand are part of a checkpoint, so that a
resumed run goes on with the same ones.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch

from core_torl.trajectory import Sample, ToolCall

Answers = list[list[Sample]]  # [problem][answer]


class Ahead:
    """One batch of answers in the making, or in hand. ``step``: the RL step that it is for."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.seconds = 0.0  # that the sampling took
        self._thread: threading.Thread | None = None
        self._answers: Answers | None = None
        self._error: BaseException | None = None

    def start(self, step: int, sample: Callable[[], Answers]) -> None:
        """Run ``sample`` in a thread of its own."""

        def work() -> None:
            started = time.perf_counter()
            try:
                self._answers = sample()
            except BaseException as error:  # noqa: BLE001 (raised again by wait, in the main thread)
                self._error = error
            self.seconds = time.perf_counter() - started

        self.step, self._answers, self._error = step, None, None
        # A daemon: when training fails, the process must not wait for answers that nobody will read.
        self._thread = threading.Thread(target=work, name=f"sample step {step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the answers are there. Raises what went wrong in sampling them."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take(self, step: int) -> Answers | None:
        """The answers for ``step``; None where there are none. They are kept until ``forget``."""
        self.wait()
        return self._answers if self.step == step else None

    def forget(self, step: int) -> None:
        """``step`` is done, and will not be asked for again."""
        if self.step == step:
            self._answers = None

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state(self, ranks: int) -> dict[str, Any] | None:
        """What a checkpoint keeps: the answers of all ranks, by the place of their problem in the step."""
        self.wait()
        held: Any = None if self._answers is None else (self.step, [[_packed(s) for s in a] for a in self._answers])
        every: list[Any] = [held]
        if ranks > 1:
            every = [None] * ranks
            torch.distributed.all_gather_object(every, held)
        if every[0] is None:
            return None
        by_place: list[Any] = [None] * sum(len(answers) for _, answers in every)
        for rank, (_, answers) in enumerate(every):
            by_place[rank::ranks] = answers
        return {"step": every[0][0], "seconds": self.seconds, "answers": by_place}

    def restore(self, state: dict[str, Any] | None, rank: int, ranks: int) -> None:
        """Take this rank's share of a checkpoint's answers, whatever the number of ranks that wrote it."""
        if state is not None:
            self.step, self.seconds = state["step"], state["seconds"]
            self._answers = [[_unpacked(s) for s in answers] for answers in state["answers"][rank::ranks]]


def _packed(sample: Sample) -> dict[str, Any]:
    """A sample in what ``torch.load(weights_only=True)`` reads. float64: a log-prob must come back as it was."""
    return {
        "ids": torch.tensor(sample.token_ids, dtype=torch.int64),
        "logprobs": torch.tensor(sample.logprobs, dtype=torch.float64),
        "rest": [sample.finish, sample.stop, sample.weight_version],
        "calls": [list(astuple(call)) for call in sample.calls],
    }


def _unpacked(packed: dict[str, Any]) -> Sample:
    calls: Sequence[Any] = packed["calls"]
    ids, logprobs = tuple(packed["ids"].tolist()), tuple(packed["logprobs"].tolist())
    return Sample(ids, logprobs, *packed["rest"], calls=tuple(ToolCall(*call) for call in calls))
