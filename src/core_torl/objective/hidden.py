"""The last hidden states of a model at the positions that predict an answer, and losses made of them and the head.

Logits of a large vocabulary are what fills a GPU's memory: 1,024 tokens of 151,936 float32 logits are 0.6 GB, hidden
states of the same tokens a few MB. Losses that need the whole distribution therefore start from hidden states and apply
the head slice by slice, see head.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core_torl.objective.head import HeadIsNotLast, Read, head_of, named_scale, run_with, through_head
from core_torl.objective.token_batch import TokenBatch

__all__ = ["answer_hidden", "answer_read", "check_head", "head_of"]

_REFUSED = "losses over the whole vocabulary do not do that yet; use variant=core_cr"


def answer_read(model: Any, batch: TokenBatch, read: Read) -> Tensor:
    """``read(states, head)`` inside the forward pass; states: [rows, answer length, hidden size], as in answer_hidden.

    Raises HeadIsNotLast, see head.py.
    """
    return through_head(
        model, lambda states, head: read(states[:, :-1], head), input_ids=batch.ids,
        attention_mask=batch.attention_mask, position_ids=batch.positions, use_cache=False,
        logits_to_keep=batch.answer_length + 1,
    )  # fmt: skip


def answer_hidden(model: Any, batch: TokenBatch) -> Tensor:
    """Hidden states whose head logits predict ``batch.answer_ids``: [rows, answer length, hidden size]."""
    return answer_read(model, batch, lambda states, _: states)


@torch.no_grad()
def check_head(model: Any, ids: Tensor) -> None:
    """Raises ValueError if the model does more to its logits than its head (caps or scales them, say).

    ids: [1, tokens], any valid token ids.
    """
    named = named_scale(model)
    if named:  # a cap is nearly linear on small logits, so the numbers alone would not tell
        raise ValueError(f"variant: {named} in this model's config caps or scales its logits: {_REFUSED}")
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        plain, ours = run_with(model, lambda states, head: head(states), input_ids=ids, use_cache=False)
    except HeadIsNotLast as error:
        raise ValueError(f"variant: of this model, {error}: {_REFUSED}") from error
    finally:
        for module, mode in training:
            module.training = mode
    gap = float((plain.float() - ours.float()).abs().max() / plain.abs().max().clamp(min=1e-6))
    if not gap < 1e-2:
        raise ValueError(
            f"variant: this model's logits differ from its head's by {gap:.1%} (it caps or scales them): {_REFUSED}"
        )
