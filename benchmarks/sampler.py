"""How fast does the embedded sampler answer? Tokens per second against transformers' own ``generate``.

Both sample 8 answers to each of 32 quizzes of the concept world, 256 rows side by side, from the shipped tiny policy.
Ours reads each prompt once and keeps its keys and values once for the 8 answers, and also returns the log-prob of every
token; ``generate`` returns tokens only. Two loads: 64 tokens for every answer (end tokens held back on both sides), and
answers that end when the policy ends them, where only tokens up to the end count.

    OMP_NUM_THREADS=1 python benchmarks/sampler.py [--threads 1] [--repeats 5]

The two ways alternate in one process, after one warm-up each; medians are printed. The reported log-probs are compared
with a float64 forward pass over prompt and answer, and so are those of a plain float32 pass: the noise to expect.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers.utils import logging as transformers_logging

from core_torl.config.paths import conf_dir
from core_torl.data.concept_world.concepts import CONCEPTS
from core_torl.data.concept_world.quizzes import make_quizzes
from core_torl.data.prompt import PromptTemplate
from core_torl.model.load import Policy, load_policy
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.transformers import TransformersSampler

PROMPTS, GROUP, NEW_TOKENS = 32, 8, 64
LOADS = {"64 tokens each": NEW_TOKENS, "to the end token": 0}  # what they are called, min_new_tokens


def make_requests(policy: Policy) -> list[SampleRequest]:
    fields: Any = OmegaConf.to_container(OmegaConf.load(Path(conf_dir()) / "model" / "prompt" / "tiny.yaml"))
    template = PromptTemplate(**{k: v for k, v in fields.items() if k != "defaults"})
    quizzes = make_quizzes(list(CONCEPTS), 1, 0, "train", test=False)[:PROMPTS]
    return [SampleRequest(template.encode(policy.tokenizer, q), GROUP, i) for i, q in enumerate(quizzes)]


def left_padded(requests: list[SampleRequest], pad_id: int) -> tuple[Tensor, Tensor]:
    longest = max(len(r.prompt_ids) for r in requests)
    ids = torch.tensor([[pad_id] * (longest - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
    mask = torch.tensor([[0] * (longest - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
    return ids, mask


def useful_tokens(answers: Tensor, eos_ids: list[int]) -> int:
    """Tokens up to and with the first end token of each row of ``generate``'s answers, [rows, tokens]."""
    ended = torch.isin(answers, torch.tensor(eos_ids)).long().cumsum(dim=1)
    before_end = (ended == 0).sum(dim=1)
    return int((before_end + (ended[:, -1] > 0)).sum())


def largest_errors(
    policy: Policy, requests: list[SampleRequest], results: list, held_back: list[int]
) -> tuple[float, float]:
    """Largest log-prob error of the sampler and of a plain float32 forward pass, both against float64.

    ``held_back`` are the end tokens that this load forbade.
    """
    exact = copy.deepcopy(policy.model).double()
    ours = plain = 0.0
    for request, group in zip(requests, results, strict=True):
        for sample in group:
            ids = torch.tensor([[*request.prompt_ids, *sample.token_ids]])
            found = []
            for model in (exact, policy.model):
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
                logits[:, held_back] = -torch.inf
                right = logits.log_softmax(dim=-1).gather(-1, ids[0, len(request.prompt_ids) :, None])
                found.append(right.squeeze(-1).double())
            ours = max(ours, float((found[0] - torch.tensor(sample.logprobs)).abs().max()))
            plain = max(plain, float((found[0] - found[1]).abs().max()))
    return ours, plain


def main() -> None:
    arguments = argparse.ArgumentParser(description="tokens per second of the embedded sampler and of generate")
    arguments.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments.add_argument("--repeats", type=int, default=5, help="alternated rounds; medians are printed")
    options = arguments.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    policy = load_policy(path="shipped:tiny")
    policy.model.eval()
    requests = make_requests(policy)
    ids, mask = left_padded(requests, policy.pad_id)
    sampler = TransformersSampler(
        policy.model, policy.tokenizer, engine="cascade", max_new_tokens=NEW_TOKENS, max_rows=PROMPTS * GROUP
    )

    def ours(least: int) -> tuple[int, list]:
        results = sampler.generate(requests, SamplingConfig(NEW_TOKENS, min_new_tokens=least))
        return sum(len(s.token_ids) for group in results for s in group), results

    def theirs(least: int) -> tuple[int, list]:
        out = policy.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, num_return_sequences=GROUP,
            min_new_tokens=least, max_new_tokens=NEW_TOKENS, pad_token_id=policy.pad_id,
        )  # fmt: skip
        return useful_tokens(out[:, ids.shape[1] :], sampler.eos_ids), []

    ways: dict[str, Callable[[int], tuple[int, list]]] = {"cascade": ours, "transformers.generate": theirs}
    rates: dict[tuple[str, str], list[float]] = {(load, way): [] for load in LOADS for way in ways}
    errors: dict[str, tuple[float, float]] = {}
    lengths: dict[tuple[str, str], float] = {}
    torch.manual_seed(0)
    for load, least in LOADS.items():
        for repeat in range(-1, options.repeats):  # the first round warms up
            for way, run in ways.items():
                start = time.perf_counter()
                tokens, results = run(least)
                seconds = time.perf_counter() - start
                if repeat >= 0:
                    rates[load, way].append(tokens / seconds)
                    lengths[load, way] = tokens / (PROMPTS * GROUP)
                elif results:
                    errors[load] = largest_errors(policy, requests, results, sampler.eos_ids if least else [])
    prompt_lengths = [len(r.prompt_ids) for r in requests]
    print(
        f"{PROMPTS} prompts of {min(prompt_lengths)} to {max(prompt_lengths)} tokens, {GROUP} answers each, "
        f"{options.threads} thread(s), {options.repeats} rounds"
    )
    print(f"{'load':<18}{'way':<24}{'tokens/answer':>14}{'tokens/s':>10}{'min':>8}{'max':>8}")
    for (load, way), values in rates.items():
        print(
            f"{load:<18}{way:<24}{lengths[load, way]:>14.1f}{statistics.median(values):>10.0f}"
            f"{min(values):>8.0f}{max(values):>8.0f}"
        )
    for load, (own, plain) in errors.items():
        print(f"{load}: largest log-prob error against float64 {own:.1e}; a plain float32 forward pass has {plain:.1e}")
    median = {key: statistics.median(values) for key, values in rates.items()}
    times = {load: median[load, "cascade"] / median[load, "transformers.generate"] for load in LOADS}
    print(f"to the end token: {times['to the end token']:.2f} times as many useful tokens a second")
    print(f"ratio sampler {times['64 tokens each']:.2f}")


if __name__ == "__main__":
    main()
