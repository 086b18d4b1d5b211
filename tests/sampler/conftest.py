"""What a sampler's answers are held against: a plain forward pass and truncation written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core_torl.sampler.protocol import SampleRequest


def log_distribution(logits: np.ndarray, sampling) -> np.ndarray:
    """Log-probs of one row of logits under ``sampling``, one rule after the other, in float64. [vocabulary]"""
    if sampling.temperature == 0:
        return logits - np.logaddexp.reduce(logits)
    scaled = logits / sampling.temperature
    probs = np.exp(scaled - np.logaddexp.reduce(scaled))
    if sampling.top_k:
        smallest_kept = np.sort(probs)[::-1][min(sampling.top_k, len(probs)) - 1]
        probs = np.where(probs >= smallest_kept, probs, 0.0)
        probs = probs / probs.sum()
    if sampling.top_p < 1:
        kept, mass = np.zeros_like(probs), 0.0
        for i in np.argsort(-probs, kind="stable"):
            kept[i], mass = probs[i], mass + probs[i]
            if mass >= sampling.top_p:
                break
        probs = kept / kept.sum()
    probs = np.where(probs >= sampling.min_p * probs.max(), probs, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(probs / probs.sum())


@pytest.fixture(scope="session")
def log_distributions():
    """Function: [answer length, vocabulary] log-probs of an answer's places by one plain forward pass."""

    def compute(model, prompt, answer, sampling, eos_ids=()) -> np.ndarray:
        training = model.training
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
        model.train(training)
        rows = logits[len(prompt) - 1 : -1].double().numpy().copy()
        rows[: sampling.min_new_tokens, list(eos_ids)] = -np.inf
        return np.stack([log_distribution(row, sampling) for row in rows])

    return compute


@pytest.fixture(scope="session")
def largest_gap(log_distributions):
    """Function: the largest difference between reported log-probs and those of plain forward passes."""

    def compute(model, requests, results, sampling, eos_ids=()) -> float:
        gaps = [0.0]
        for request, group in zip(requests, results, strict=True):
            for sample in group:
                rows = log_distributions(model, request.prompt_ids, sample.token_ids, sampling, eos_ids)
                right = rows[np.arange(len(sample.token_ids)), list(sample.token_ids)]
                gaps.append(float(np.abs(right - np.array(sample.logprobs)).max()))
        return max(gaps)

    return compute


@pytest.fixture(scope="session")
def uneven_requests():
    """Function: requests with prompts of 1 to 30 tokens and groups of 1 to 7 answers."""

    def make(vocabulary: int, seed: int = 0, sizes=(1, 7, 2, 4)) -> list[SampleRequest]:
        rng = np.random.default_rng(seed)
        lengths = [1, 30, 9, 17, 4, 12, 25, 2][: len(sizes)]
        return [
            SampleRequest(tuple(map(int, rng.integers(3, vocabulary, length))), n, 1000 * seed + i)
            for i, (length, n) in enumerate(zip(lengths, sizes, strict=True))
        ]

    return make
