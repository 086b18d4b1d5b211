"""Log-probs of the answer tokens under a policy, computed on answer positions only.

The language-model head is the largest matrix of a model; asking it for answer positions alone (``logits_to_keep``)
skips the prompt. The softmax runs in float32 over slices of tokens, and each slice is recomputed in the backward pass
when the vocabulary is large, so a whole [rows, tokens, 150,000] float32 tensor never exists twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core_torl.objective.shared_prompts import can_share, join, prompt_groups, worth_sharing
from core_torl.objective.token_batch import TokenBatch

_SLICE_ELEMENTS = 32 * 1024 * 1024  # float32 elements of one slice: 128 MiB


def _slice_logprobs(logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """logits: [n, vocabulary], ids: [n]. Returns log-probs of ids and, if asked for, entropies, both [n]."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    normalizer = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - normalizer
    if not entropy:
        return chosen, torch.zeros_like(chosen)
    return chosen, normalizer - (logits.softmax(dim=-1) * logits).sum(dim=-1)


def answer_logprobs(
    model: Any, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False, share_prompts: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``batch.answer_ids`` and per-token entropies (zeros unless ``entropy``), [rows, answer length] each.

    Logits are divided by ``temperature``, the one the answers were sampled at, so that they are log-probs of the same
    distribution. ``share_prompts`` reads equal prompts once where that pays (see shared_prompts.py). At padding the
    values are meaningless and masked by the caller.
    """
    length = batch.answer_length
    flat, ids = _prediction_logits(model, batch, share_prompts), batch.answer_ids.reshape(-1)
    step = max(1, _SLICE_ELEMENTS // flat.shape[-1])
    if flat.shape[0] <= step:
        chosen, entropies = _slice_logprobs(flat, ids, temperature, entropy)
    else:
        parts: list[Any] = [
            checkpoint(_slice_logprobs, part, part_ids, temperature, entropy, use_reentrant=False)
            for part, part_ids in zip(flat.split(step), ids.split(step), strict=True)
        ]
        chosen, entropies = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return chosen.view(-1, length), entropies.view(-1, length)


def _prediction_logits(model: Any, batch: TokenBatch, share_prompts: bool) -> Tensor:
    """The logits that predict each answer token: [rows * answer length, vocabulary]."""
    length = batch.answer_length
    if share_prompts and can_share(model):
        groups = prompt_groups(batch)
        if worth_sharing(groups, batch.ids.shape[1] - length, length):
            layout = join(batch, groups, model.dtype)
            logits = model(
                input_ids=layout.ids,
                attention_mask=layout.mask,
                position_ids=layout.positions,
                use_cache=False,
                logits_to_keep=layout.keep,
            ).logits
            return logits.flatten(0, 1)[layout.predictions]
    logits = model(
        input_ids=batch.ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits[:, :-1]  # [rows, answer length, vocabulary]; the logits before a token predict it
    return logits.reshape(-1, logits.shape[-1])
