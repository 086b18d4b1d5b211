"""What is asked of vLLM for one answer, as plain values: the same for an engine in this process and for a server.

A vLLM request owns a random generator that starts from its seed, so every answer gets a seed of its own, made from the
request's seed and the answer's place in it. An answer that is continued after an interruption is a request of its own
to vLLM and gets a fresh seed for the place where it goes on: reproducible, but not the draws that it would have made
without the interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from core_torl.sampler.protocol import SampleRequest, SamplingConfig, token_limit

LOWEST_TEMPERATURE = 0.01  # vLLM silently raises lower ones to it (sampling_params.py, _MAX_TEMP)


def seed_of(request: SampleRequest) -> int:
    """The request's seed, or a fresh one from torch's global generator."""
    return request.seed if request.seed is not None else int(torch.randint(2**62, ()))


def sample_seeds(request: SampleRequest) -> list[int]:
    """One seed for each of the request's ``n`` answers, each in [0, 2**63): a hash of seed, place and start.

    The i-th answer of a request and the first one of a request with ``first=i`` get the same seed.
    """
    seed = seed_of(request)
    return [answer_seed(seed, request.first + i, request.start) for i in range(request.n)]


def answer_seed(seed: int, place: int, start: int) -> int:
    """The seed of answer ``place`` of a request with ``seed``, going on at its token ``start``; in [0, 2**63)."""
    digest = hashlib.blake2b(f"{seed} {place} {start}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sampling_parameters(request: SampleRequest, sampling: SamplingConfig, eos_ids: Iterable[int]) -> dict[str, Any]:
    """Parameters of one answer to ``request`` but for its seed, under the names of vLLM's SamplingParams.

    Ends are named by us alone (``ignore_eos`` with ``stop_token_ids``), so that what ends an answer does not depend on
    files beside the model. Stop strings are looked for in text that keeps special tokens, as everywhere here.

    Raises:
        ValueError: a temperature that vLLM would silently replace.
    """
    if 0 < sampling.temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"sampler.temperature={sampling.temperature}: vLLM samples at {LOWEST_TEMPERATURE} at least, so log-probs "
            "would be wrong; use 0 (greedy) or a higher one"
        )
    truncate = sampling.temperature > 0
    limit = token_limit(request, sampling)
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if truncate else 1.0,
        "top_k": sampling.top_k if truncate else 0,
        "min_p": sampling.min_p if truncate else 0.0,
        "max_tokens": limit,
        "min_tokens": min(limit, max(0, sampling.min_new_tokens - request.start)),
        "stop": list(sampling.stop if request.stop is None else request.stop),
        "stop_token_ids": sorted(set(eos_ids)),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "logprobs": 0,
    }
