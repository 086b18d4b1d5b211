"""Drawing one token a row, reproducibly, from the distribution whose log-probs are reported.

Each row owns a stream of uniform numbers made from its seed by a counter (splitmix64), so a row's answer depends on its
seed alone and not on the rows beside it, on batch cuts, or on any global generator. A token is drawn by inverting the
cumulative distribution at the row's next number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core_torl.sampler.protocol import SampleRequest, SamplingConfig


def _splitmix64(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def uniforms(requests: Sequence[SampleRequest], length: int) -> Tensor:
    """Numbers in [0, 1): [rows, length] float64, one row for each sample of each request, request by request."""
    seeds: list[int] = []
    starts: list[int] = []  # a continued answer goes on in its stream where it stood
    for request in requests:
        seed = request.seed if request.seed is not None else int(torch.randint(2**62, ()))
        seeds += [(seed * 0x9E3779B1 + request.first + i + 1) % 2**64 for i in range(request.n)]
        starts += [request.start] * request.n
    rows = _splitmix64(_splitmix64(np.array(seeds, dtype=np.uint64)))[:, None]
    places = np.array(starts, dtype=np.uint64)[:, None] + np.arange(length, dtype=np.uint64)[None, :]
    with np.errstate(over="ignore"):
        counters = rows + places * np.uint64(0xD1342543DE82EF95)
    return torch.from_numpy((_splitmix64(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def token_logprobs(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Log-probs of the distribution to sample from: [rows, vocabulary] float32, minus infinity where truncated away."""
    logits = logits.float()
    if sampling.temperature == 0:
        return torch.log_softmax(logits, dim=-1)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if not sampling.truncates:
        return logprobs
    if 0 < sampling.top_k < logprobs.shape[-1]:
        kth = logprobs.topk(sampling.top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < kth, -torch.inf).log_softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        # A token goes when the tokens before it already hold top_p of the mass; the most likely one always stays.
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logprobs = logprobs.masked_fill(drop, -torch.inf)
    if sampling.min_p > 0:
        floor = logprobs.max(dim=-1, keepdim=True).values + float(np.log(sampling.min_p))
        logprobs = logprobs.masked_fill(logprobs < floor, -torch.inf)
    return logprobs.log_softmax(dim=-1)


def draw(logits: Tensor, sampling: SamplingConfig, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row. logits: [rows, vocabulary]; numbers: [rows] in [0, 1). Returns ids and log-probs, [rows]."""
    logprobs = token_logprobs(logits, sampling)
    if sampling.temperature == 0:
        ids = logprobs.argmax(dim=-1, keepdim=True)
    else:
        # float64: with a vocabulary of 150,000 a float32 cumulative sum would lose the rare tokens.
        cumulative = logprobs.exp().double().cumsum_(dim=-1)
        target = numbers.to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
        ids = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    return ids.squeeze(-1), logprobs.gather(-1, ids).squeeze(-1)
