"""Log-probs of the answer tokens under a policy, without ever holding the logits of all of them.

The language-model head is applied to the hidden states at answer positions alone, slice by slice (see head.py): the
head in its own precision, the softmax in float32. With more than one slice each one is computed again in the backward
pass, so that no [rows, tokens, vocabulary] tensor ever exists, neither of logits nor of their gradients. Where
everything fits into one slice, nothing is computed twice.

A model that caps or scales its logits is asked for them instead; that is said once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core_torl.objective.head import Head, HeadIsNotLast, through_head
from core_torl.objective.shared_prompts import can_share, join, prompt_groups, worth_sharing
from core_torl.objective.token_batch import TokenBatch

_SLICE_ELEMENTS = 32 * 1024 * 1024  # float32 elements of one slice: 128 MiB
# Models whose logits are more than their head's.
_OWN_LOGITS: weakref.WeakSet[Any] = weakref.WeakSet()


def answer_logprobs(
    model: Any, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False, share_prompts: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``batch.answer_ids`` and per-token entropies (zeros unless ``entropy``), [rows, answer length] each.

    Logits are divided by ``temperature``, the one the answers were sampled at, so that they are log-probs of the same
    distribution. ``share_prompts`` reads equal prompts once where that pays (see shared_prompts.py). At padding the
    values are meaningless and masked by the caller.
    """
    inputs, pick = _layout(model, batch, share_prompts)
    ids = batch.answer_ids.reshape(-1)
    found = None
    if model not in _OWN_LOGITS:

        def read(states: Tensor, head: Head) -> Tensor:
            return _in_slices(pick(states), ids, head, temperature, entropy)

        try:
            found = through_head(model, read, **inputs)
        except HeadIsNotLast as reason:
            _OWN_LOGITS.add(model)
            warnings.warn(
                f"of this model, {reason}: log-probs are made of its own logits, which takes more memory", stacklevel=2
            )
    if found is None:
        found = _in_slices(pick(model(**inputs).logits), ids, _whole, temperature, entropy)
    chosen, entropies = found.view(-1, batch.answer_length, 2).unbind(-1)
    return chosen, entropies


def _whole(logits: Tensor) -> Tensor:
    return logits


def _layout(model: Any, batch: TokenBatch, share_prompts: bool) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    """The model's inputs, and what picks the place that predicts each answer token out of what it returns.

    The latter turns [rows, places kept, width] into [rows * answer length, width].
    """
    length = batch.answer_length
    if share_prompts and can_share(model):
        groups = prompt_groups(batch)
        if worth_sharing(groups, batch.ids.shape[1] - length, length):
            layout = join(batch, groups, model.dtype)
            inputs = {
                "input_ids": layout.ids, "attention_mask": layout.mask, "position_ids": layout.positions,
                "use_cache": False, "logits_to_keep": layout.keep,
            }  # fmt: skip
            return inputs, lambda kept: kept.flatten(0, 1)[layout.predictions]
    inputs = {
        "input_ids": batch.ids, "attention_mask": batch.attention_mask, "position_ids": batch.positions,
        "use_cache": False, "logits_to_keep": length + 1,
    }  # fmt: skip
    # The place before a token predicts it; the last one predicts what nobody asked for.
    return inputs, lambda kept: kept[:, :-1].reshape(-1, kept.shape[-1])


def _in_slices(states: Tensor, ids: Tensor, head: Head, temperature: float, entropy: bool) -> Tensor:
    """states: [n, hidden size], ids: [n]. Returns log-probs of ids and, if asked for, entropies: [n, 2], float32."""
    with torch.no_grad():
        vocabulary = head(states[:1]).shape[-1]
    step = max(1, _SLICE_ELEMENTS // vocabulary)
    if len(ids) <= step:
        return _slice(states, ids, head, temperature, entropy)
    # A reentrant slice adds the head's gradient to its ``.grad`` right away. Otherwise autograd adds the slices'
    # gradients up first, in three tensors of the head's size. It needs an input that carries a gradient.
    parts: list[Any] = [
        checkpoint(_slice, part, part_ids, head, temperature, entropy, use_reentrant=states.requires_grad)
        for part, part_ids in zip(states.split(step), ids.split(step), strict=True)
    ]
    return torch.cat(parts)


def _slice(states: Tensor, ids: Tensor, head: Head, temperature: float, entropy: bool) -> Tensor:
    logits = head(states)
    if logits.dtype != torch.float64:
        logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    normalizer = logits.logsumexp(dim=-1)
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - normalizer
    if not entropy:
        return torch.stack([chosen, torch.zeros_like(chosen)], dim=-1)
    return torch.stack([chosen, normalizer - (logits.softmax(dim=-1) * logits).sum(dim=-1)], dim=-1)
