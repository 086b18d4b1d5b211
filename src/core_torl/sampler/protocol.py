"""What every sampler promises: token ids in, token ids and their log-probs out.

The contract (tests/sampler/test_contract.py holds every sampler to it):

- ``token_ids`` include the end-of-sequence or stop tokens; ``logprobs`` has the same length.
- Log-probs belong to the distribution that was sampled from, after temperature and truncation. At temperature 0 they
  are those of the untempered distribution.
- The same seed gives the same answer whatever else is in the batch, and a request's samples differ from each other.
- A stop string is found on decoded text, so ids may run past it inside the last token.
- A prompt that is empty or leaves no room for an answer is an error before anything is sampled.
- After ``sync`` no sample carries an older weight version.

A sampler may also be fed while it runs, which is what tools need: see ``Session``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from core_torl.trajectory import Sample


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """``n`` answers to one prompt. ``seed`` None draws a fresh seed from torch's global generator.

    The other fields let one answer be continued exactly as if it had never been interrupted: its tokens so far stand at
    the end of ``prompt_ids``, ``start`` is their number, ``first`` its place among the answers of the request that it
    began in. ``max_new_tokens`` and ``stop`` take the place of those in SamplingConfig where they are not None.
    """

    prompt_ids: tuple[int, ...]
    n: int = 1
    seed: int | None = None
    first: int = 0
    start: int = 0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How to sample. ``top_k`` 0 and ``top_p`` 1 switch truncation off; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"sampler.max_new_tokens={self.max_new_tokens}: must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"sampler.temperature={self.temperature}: must be 0 (greedy) or larger")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampler.top_p={self.top_p}: must lie in (0, 1]; 1 switches it off")
        if self.top_k < 0:
            raise ValueError(f"sampler.top_k={self.top_k}: must be 0 (off) or larger")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"sampler.min_p={self.min_p}: must lie in [0, 1); 0 switches it off")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(f"sampler.min_new_tokens={self.min_new_tokens}: must lie in 0..max_new_tokens")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn, so that sampled log-probs differ from a full softmax."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def token_limit(request: SampleRequest, sampling: SamplingConfig) -> int:
    """Longest answer to ``request``, in tokens."""
    return sampling.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens


class Weights(Protocol):
    """The trainer's weights, for a sampler that keeps weights of its own."""

    adapted: bool  # trained through LoRA adapters

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Whole, detached tensors under their Hugging Face names, adapters merged, one at a time.

        Where the trainer's weights are sharded, each tensor is gathered: every rank has to go through to the end.
        """
        ...

    def save_adapter(self, folder: Path) -> None:
        """Write the LoRA adapters as peft does."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Draws answers from the policy. See the module's contract."""

    sampling: SamplingConfig

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> list[list[Sample]]:
        """Samples in the order of the requests: ``result[request][sample]``. ``sampling`` None: the sampler's own."""
        ...

    def sync(self, weights: Weights, version: str) -> None:
        """Take over the trainer's weights under ``version`` and empty every cache."""
        ...

    def sleep(self) -> None:
        """Give memory back while the trainer works. ``generate`` and ``sync`` wake a sampler that sleeps."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Session(Protocol):
    """Answers in progress that can be interrupted by a stop string, given more tokens and sent on, each by itself.

    ``row`` counts answers over all requests, in order. A row's turn ends like an answer does; it then waits until it is
    resumed or released, while the others go on. A row's draws depend on its seed and its place in the answer alone, so
    the order in which rows are resumed changes nothing.
    """

    @property
    def running(self) -> int:
        """How many rows are not waiting."""
        ...

    def advance(self) -> list[int]:
        """Work on every running row, by one token or more; returns the rows whose turn has ended by it."""
        ...

    def answer(self, row: int) -> Sample:
        """The row's answer so far, from its first token: sampled and given ones, the latter with log-prob 0."""
        ...

    def resume(self, row: int, token_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        """Send a waiting row on behind ``token_ids``, with these stop strings. ValueError if no token is left to it."""
        ...

    def release(self, row: int) -> None:
        """A waiting row will not be resumed: its memory may be used for others."""
        ...
