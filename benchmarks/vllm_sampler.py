"""Embedded sampler and vLLM in the same process, on the CPU, and what handing the weights over costs.

Both sample 8 answers of 64 tokens to each of 32 quizzes of the concept world from the shipped tiny policy, and both
return the log-prob of every token. One process, one thread, the two alternate after one warm-up each; medians of tokens
per second of processor time, which other work on the machine disturbs less than the clock. Then one hand-over of
weights: whole matrices with adapters merged in, or adapters alone.

    OMP_NUM_THREADS=1 python benchmarks/vllm_sampler.py [--repeats 5]

Needs vLLM; `make test-vllm` leaves an environment that has it. Nothing here speaks of GPUs or of models of a useful
size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from core_torl.model.load import Policy, load_policy
from core_torl.sampler.protocol import Sampler, SamplingConfig
from core_torl.sampler.transformers import TransformersSampler
from core_torl.sampler.vllm import VllmSampler
from sampler import GROUP, NEW_TOKENS, PROMPTS, make_requests

ENGINE: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "kv_cache_mb": 256, "enforce_eager": True, "max_model_len": 512}


def tokens_per_s(sampler: Sampler, policy: Policy) -> float:
    """Tokens per second of this process's processor time, every answer of full length."""
    start = time.process_time()
    results = sampler.generate(make_requests(policy), SamplingConfig(NEW_TOKENS, min_new_tokens=NEW_TOKENS))
    return sum(len(s.token_ids) for group in results for s in group) / (time.process_time() - start)


def sync_ms(weights: str, repeats: int) -> list[float]:
    """Milliseconds of each hand-over of a policy with adapters of rank 8."""
    lora = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}
    policy = load_policy(path="shipped:tiny", lora=lora)
    sampler = VllmSampler(policy.model, policy.tokenizer, weights=weights, **ENGINE)
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        sampler.sync(policy, str(i))
        times.append(1000 * (time.perf_counter() - start))
    sampler.close()
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    policy = load_policy(path="shipped:tiny")
    vllm = VllmSampler(policy.model, policy.tokenizer, max_rows=PROMPTS * GROUP, **ENGINE)
    vllm.sync(policy, "0")
    samplers: dict[str, Sampler] = {
        "cascade": TransformersSampler(policy.model, policy.tokenizer, engine="cascade", max_rows=PROMPTS * GROUP),
        "vllm": vllm,
    }
    rates: dict[str, list[float]] = {name: [] for name in samplers}
    for repeat in range(-1, repeats):
        for name, sampler in samplers.items():
            rate = tokens_per_s(sampler, policy)
            if repeat >= 0:
                rates[name].append(rate)
    print(f"{PROMPTS} prompts, {GROUP} answers of {NEW_TOKENS} tokens each, {repeats} rounds, one thread")
    for name, values in rates.items():
        print(f"{name:<8} {statistics.median(values):>8.0f} tokens/CPU s ({min(values):.0f}..{max(values):.0f})")
    vllm.close()
    for weights in ("merged", "lora"):
        times = sync_ms(weights, 2 * repeats)
        print(f"sync {weights:<7} {statistics.median(times):>6.1f} ms ({min(times):.1f}..{max(times):.1f})")
    print(f"ratio cascade/vllm {statistics.median(rates['cascade']) / statistics.median(rates['vllm']):.2f}")


if __name__ == "__main__":
    main()
