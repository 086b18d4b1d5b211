"""Attention that keeps a prompt's keys and values once for all the answers to it.

While a group of N answers grows, every answer attends to the same prompt. Rows that share a prompt stand side by side
in a block, so the prompt part of attention is one matrix product per block over one copy of its keys; only the answers'
own keys and values are kept per row, in buffers that are written in place. Rows may stand at different places in their
answers, because some have waited for a tool. The model's forward stays transformers' own: this module is a cache class
and an attention function, registered under the name ``NAME``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import AttentionInterface

NAME = "core_torl_cascade"
_FIRST_CAPACITY = 64  # tokens of answer that a buffer holds before it has to grow


class CascadeLayer(CacheLayerMixin):
    """Keys and values of one layer: the prompts' once per block, the answers' once per row."""

    is_sliding = False
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.prompt_keys: Tensor | None = None  # [blocks, kv heads, head size, prompt length], transposed once
        self.prompt_values: Tensor | None = None  # [blocks, kv heads, prompt length, head size]
        self.answer_keys: Tensor | None = None  # [rows, kv heads, capacity, head size]
        self.answer_values: Tensor | None = None
        self.length = 0  # answer tokens written so far, by the row that has most
        self.lengths: Tensor | None = None  # [rows] the same for each row, where they differ
        self.decoding = False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: buffers are made when the first tokens come."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.decoding:
            self.prompt_keys, self.prompt_values = key_states.transpose(-1, -2).contiguous(), value_states.contiguous()
            return key_states, value_states
        if self.answer_keys is None or self.length == self.answer_keys.shape[2]:
            self._grow(key_states, value_states)
        assert self.answer_keys is not None and self.answer_values is not None
        if self.lengths is None:
            self.answer_keys[:, :, self.length] = key_states[:, :, 0]
            self.answer_values[:, :, self.length] = value_states[:, :, 0]
        else:
            rows = torch.arange(len(self.lengths), device=key_states.device)
            self.answer_keys[rows, :, self.lengths] = key_states[:, :, 0]
            self.answer_values[rows, :, self.lengths] = value_states[:, :, 0]
        self.length += 1
        return self.answer_keys[:, :, : self.length], self.answer_values[:, :, : self.length]

    def _grow(self, key: Tensor, value: Tensor) -> None:
        capacity = _FIRST_CAPACITY if self.answer_keys is None else 2 * self.answer_keys.shape[2]
        # Zeros, because places that a row has not written yet are read (and weighed by 0) once rows differ in length.
        new_keys = key.new_zeros(key.shape[0], key.shape[1], capacity, key.shape[3])
        new_values = value.new_zeros(value.shape[0], value.shape[1], capacity, value.shape[3])
        if self.answer_keys is not None and self.answer_values is not None:
            new_keys[:, :, : self.length] = self.answer_keys[:, :, : self.length]
            new_values[:, :, : self.length] = self.answer_values[:, :, : self.length]
        self.answer_keys, self.answer_values = new_keys, new_values

    def arrange(self, blocks: Tensor, rows: Tensor) -> None:
        """Keep these blocks and rows, in this order. Indices may repeat."""
        assert self.prompt_keys is not None and self.prompt_values is not None
        self.prompt_keys, self.prompt_values = self.prompt_keys[blocks], self.prompt_values[blocks]
        if self.answer_keys is not None and self.answer_values is not None:
            self.answer_keys, self.answer_values = self.answer_keys[rows], self.answer_values[rows]

    def get_seq_length(self) -> int:
        prompt = 0 if self.prompt_keys is None else self.prompt_keys.shape[3]
        return prompt + self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class CascadeCache(Cache):
    """All layers, and what is the same for each of them: how rows share prompts and which prompt places are padding."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=CascadeLayer)
        self.rows_per_block = 1
        self.prompt_bias: Tensor | None = None  # [blocks, 1, 1, prompt length]: 0, or minus infinity on padding
        self.answer_bias: Tensor | None = None  # [rows, 1, 1, answer length]: minus infinity on places not yet written

    def start_decoding(self, prompt_mask: Tensor) -> None:
        """prompt_mask: [blocks, prompt length], True on real tokens."""
        for layer in self.layers:
            layer.decoding = True  # pyright: ignore[reportAttributeAccessIssue]
        bias = torch.zeros(prompt_mask.shape, dtype=torch.float32, device=prompt_mask.device)
        self.prompt_bias = bias.masked_fill(~prompt_mask, -torch.inf)[:, None, None, :]

    def write_at(self, lengths: Tensor) -> None:
        """Where each row's next token goes: [rows] answer tokens that it has so far. Call before each forward."""
        longest = int(lengths.max())
        ragged = bool((lengths != longest).any())
        device = self.prompt_bias.device if self.prompt_bias is not None else lengths.device
        places = lengths.to(device)
        self.answer_bias = None
        if ragged:
            unwritten = torch.arange(longest + 1, device=device)[None] > places[:, None]
            self.answer_bias = torch.zeros(unwritten.shape, device=device).masked_fill(unwritten, -torch.inf)[
                :, None, None
            ]
        for layer in self.layers:
            layer.length = longest  # pyright: ignore[reportAttributeAccessIssue]
            layer.lengths = places if ragged else None  # pyright: ignore[reportAttributeAccessIssue]

    def arrange(self, blocks: Tensor, rows: Tensor, rows_per_block: int) -> None:
        assert self.prompt_bias is not None
        self.prompt_bias = self.prompt_bias[blocks]
        self.rows_per_block = rows_per_block
        for layer in self.layers:
            layer.arrange(blocks, rows)  # pyright: ignore[reportAttributeAccessIssue]


_active: list[CascadeCache] = []


def cascade_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row over its block's prompt and its own answer.

    query: [rows, heads, 1, size]; key, value: [rows, kv heads, answer length, size]. Softmax in float32 over both parts
    at once. Returns [rows, 1, heads, size]. Options that change the scores (soft caps, sinks, windows) are refused.
    """
    for option in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"cascade attention does not know {option}")
    cache = _active[-1]
    layer: Any = cache.layers[module.layer_idx]  # pyright: ignore[reportArgumentType, reportCallIssue]
    rows, heads, _, size = query.shape
    kv_heads, per_block = key.shape[1], cache.rows_per_block
    share, blocks, scale = heads // kv_heads, rows // per_block, size**-0.5 if scaling is None else scaling
    prompt_length = layer.prompt_keys.shape[3]

    own = query.view(rows, kv_heads, share, size) * scale
    # [blocks, kv heads, rows per block * share, size]: all queries of a block against one copy of its prompt
    together = (
        own.view(blocks, per_block, kv_heads, share, size)
        .transpose(1, 2)
        .reshape(blocks, kv_heads, per_block * share, size)
    )
    prompt_scores = (together @ layer.prompt_keys).float() + cache.prompt_bias
    answer_scores = (own @ key.transpose(-1, -2)).float()  # [rows, kv heads, share, answer length]
    if cache.answer_bias is not None:
        answer_scores = answer_scores + cache.answer_bias
    # Bring the answers' scores into the blocks' order; they are the smaller part.
    answer_scores = (
        answer_scores.view(blocks, per_block, kv_heads, share, -1)
        .transpose(1, 2)
        .reshape(blocks, kv_heads, per_block * share, -1)
    )
    weights = torch.cat([prompt_scores, answer_scores], dim=-1).softmax(dim=-1).to(value.dtype)
    out = weights[..., :prompt_length] @ layer.prompt_values  # [blocks, kv heads, rows per block * share, size]
    out = out.view(blocks, kv_heads, per_block, share, size).transpose(1, 2).reshape(rows, kv_heads, share, size)
    answer_weights = weights[..., prompt_length:].reshape(blocks, kv_heads, per_block, share, -1).transpose(1, 2)
    out = out + answer_weights.reshape(rows, kv_heads, share, -1) @ value
    return out.reshape(rows, 1, heads, size), None


AttentionInterface.register(NAME, cascade_attention)


@contextmanager
def cascade(model: PreTrainedModel, cache: CascadeCache) -> Iterator[None]:
    """Within this block the model attends through ``cache``; its own attention is put back afterwards."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    _active.append(cache)
    try:
        yield
    finally:
        _active.pop()
        model.config._attn_implementation = before
