"""The tiny policy: a Llama of under one million parameters, warm-started on texts in minutes on two cores.

It exists so that everything the project does can be seen to work on a laptop. ``warm_start`` trains it from nothing on
a stream of weighted texts; which texts is not this module's business (see data/concept_world/corpus.py).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# (token ids, loss weight of each token as a target)
Weighted = tuple[list[int], list[float]]


@dataclass(frozen=True)
class TinyArchitecture:
    layers: int = 3
    width: int = 128
    heads: int = 4
    mlp: int = 512
    rope_theta: float = 1000.0
    max_length: int = 2048


def build_tiny(tokenizer: PreTrainedTokenizerFast, arch: TinyArchitecture, seed: int) -> LlamaForCausalLM:
    """A freshly initialised policy; the same seed gives the same weights."""
    torch.manual_seed(seed)
    ids: Any = tokenizer  # its stubs allow lists of ids
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arch.width,
        intermediate_size=arch.mlp,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.heads,
        max_position_embeddings=arch.max_length,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta},
        bos_token_id=ids.bos_token_id,
        eos_token_id=ids.eos_token_id,
        pad_token_id=ids.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(texts: Iterator[Weighted], batch_size: int, pool: int = 16) -> Iterator[list[Weighted]]:
    """Batches of texts of like length, in an order that hides the sorting."""
    turn = 0
    while True:
        chunk = sorted((next(texts) for _ in range(batch_size * pool)), key=lambda t: len(t[0]))
        order = torch.randperm(pool, generator=torch.Generator().manual_seed(turn)).tolist()
        yield from (chunk[i * batch_size : (i + 1) * batch_size] for i in order)
        turn += 1


def text_loss(model: LlamaForCausalLM, batch: Sequence[Weighted], total: float | None = None) -> Tensor:
    """Weighted mean cross-entropy over the target tokens. Padding stands to the right, so causality hides it.

    ``total`` is what the weighted sum is divided by; None: the batch's own weights.
    """
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    weights = torch.zeros(len(batch), longest)
    for row, (tokens, ws) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(ws)] = torch.tensor(ws)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [B, L-1, width]
    target, weight = ids[:, 1:], weights[:, 1:]
    chosen = weight > 0
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), target[chosen], reduction="none")
    return (losses * weight[chosen]).sum() / (weight[chosen].sum() if total is None else total)


def warm_start(
    model: LlamaForCausalLM,
    texts: Iterator[Weighted],
    *,
    steps: int,
    lr: float,
    batch_size: int,
    warmup_steps: int,
    decay: bool,
    on_step: Callable[[int, float, float], None],
    stop_below: float = 0.0,
    alike: bool = False,
) -> int:
    """Supervised training; ``on_step(step, loss, seconds)`` is called after each step. Returns the steps taken.

    The learning rate rises over ``warmup_steps`` and, with ``decay``, falls to zero along a cosine. Training ends
    before ``steps`` once the mean loss of the last hundred steps is below ``stop_below``.

    A batch holds texts of like length, and its loss is a mean: tokens of short texts count more than those of long
    ones. ``alike`` lets all tokens count the same (the sum is divided by the mean weight of the batches so far), so
    that short texts are learned at their share in the mixture and not above it.
    """
    recent: deque[float] = deque(maxlen=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream, started, step = batches(texts, batch_size), time.perf_counter(), 0
    weighed = 0.0
    model.train()
    for step in range(1, steps + 1):
        factor = min(1.0, step / max(1, warmup_steps))
        if decay:
            factor *= 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        batch = next(stream)
        weighed += sum(sum(weights[1:]) for _, weights in batch)
        loss = text_loss(model, batch, weighed / step if alike else None)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"warm start: the loss is {loss.item()} at step {step}; lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(float(loss.detach()))
        on_step(step, recent[-1], time.perf_counter() - started)
        if len(recent) == recent.maxlen and sum(recent) / len(recent) < stop_below:
            break
    model.eval()
    return step
