"""The last hidden states of a model at the positions that predict an answer, and the head that turns them into logits.

Logits of a large vocabulary are what fills a GPU's memory: 1,024 tokens of 151,936 float32 logits are 0.6 GB, hidden
states of the same tokens a few MB. Losses that need the whole distribution therefore start from hidden states and apply
the head slice by slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core_torl.objective.token_batch import TokenBatch

# What models call a cap or a factor on their logits.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
_REFUSED = "losses over the whole vocabulary do not do that yet; use variant=core_cr"


def head_of(model: Any) -> nn.Module:
    """The output embedding, adapters included."""
    return model.get_output_embeddings()


def answer_hidden(model: Any, batch: TokenBatch) -> Tensor:
    """Hidden states whose head logits predict ``batch.answer_ids``: [rows, answer length, hidden size]."""
    states = _decoder(model)(
        input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state  # [rows, prompt + answer, hidden size]
    return states[:, -batch.answer_length - 1 : -1]


def _decoder(model: Any) -> Any:
    """The model without its head; under adapters, the adapted modules."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.get_decoder()


@torch.no_grad()
def check_head(model: Any, ids: Tensor) -> None:
    """Raises ValueError if the model does more to its logits than its head (caps or scales them, say).

    ids: [1, tokens], any valid token ids.
    """
    config = getattr(model, "config", None)
    named = [n for n in _SCALES if getattr(config, n, None) not in (None, 1, 1.0)]
    if named:  # a cap is nearly linear on small logits, so the numbers alone would not tell
        raise ValueError(f"variant: {named[0]} in this model's config caps or scales its logits: {_REFUSED}")
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        plain = model(input_ids=ids, use_cache=False).logits.float()
        ours = head_of(model)(_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state).float()
    finally:
        for module, mode in training:
            module.training = mode
    gap = float((plain - ours).abs().max() / plain.abs().max().clamp(min=1e-6))
    if not gap < 1e-2:
        raise ValueError(
            f"variant: this model's logits differ from its head's by {gap:.1%} (it caps or scales them): {_REFUSED}"
        )
