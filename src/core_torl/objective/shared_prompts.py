"""One forward pass over a prompt for all the answers to it.

The N answers of a group have the same prompt. Padded row by row, the model reads it N times; here a group becomes one
sequence, ``prompt answer_1 ... answer_N``, with positions that restart behind the prompt and a mask that lets an answer
see the prompt and itself. The log-probs and their gradient are those of the separate rows.

It pays while prompts are long beside the answers, because attention grows with the square of the joined sequence;
``worth_sharing`` weighs that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core_torl.objective.token_batch import TokenBatch


@dataclass(frozen=True)
class SharedLayout:
    """Inputs of the joined forward pass, and where each row's predictions stand in its logits."""

    ids: Tensor  # [groups, prompt length + slots * answer length]
    positions: Tensor  # the same shape
    mask: Tensor  # [groups, 1, length, length], additive: 0 where attention is allowed
    keep: int  # logits to ask for, counted from the end
    predictions: Tensor  # [rows * answer length], indices into logits of shape [groups * keep, vocabulary]


def prompt_groups(batch: TokenBatch) -> Tensor:
    """Number of the prompt of each row, equal where prompts are equal: [rows]."""
    prompts = batch.ids[:, : batch.ids.shape[1] - batch.answer_length]
    return torch.unique(prompts, dim=0, return_inverse=True)[1]


def can_share(model: Any) -> bool:
    """Whether ``model`` takes a mask of its own for each pair of tokens: full attention, in a kind that reads it."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and config._attn_implementation in ("sdpa", "eager")


def worth_sharing(groups: Tensor, prompt_length: int, answer_length: int) -> bool:
    """Whether joining the answers to each prompt pays; groups: [rows], the number of each row's prompt."""
    counts = groups.bincount()
    return joining_pays(len(groups), len(counts), int(counts.max()), prompt_length, answer_length)


def joining_pays(rows: int, prompts: int, slots: int, prompt_length: int, answer_length: int) -> bool:
    """Whether joining saves tokens without attention costing more than twice that of the separate rows.

    ``slots``: answers of the prompt that has the most.
    """
    joined, apart = prompt_length + slots * answer_length, prompt_length + answer_length
    return prompts * joined < rows * apart and prompts * joined**2 <= 2 * rows * apart**2


def join(batch: TokenBatch, groups: Tensor, dtype: torch.dtype) -> SharedLayout:
    """The joined layout of a batch whose rows have the prompts ``groups``: [rows]."""
    length, device = batch.answer_length, batch.ids.device
    prompt = batch.ids.shape[1] - length
    count, slots = int(groups.max()) + 1, int(groups.bincount().max())
    # The place of each row among the rows of its group.
    order = groups.argsort(stable=True)
    starts = torch.cat([groups.new_zeros(1), groups.bincount().cumsum(0)[:-1]])
    slot = torch.empty_like(groups)
    slot[order] = torch.arange(len(groups), device=device) - starts[groups[order]]
    first = order[starts]  # one row of each group, for its prompt

    def joined(rows: Tensor) -> Tensor:  # [rows, prompt + answer] -> [groups, prompt + slots * answer]
        answers = rows.new_zeros(count, slots, length)
        answers[groups, slot] = rows[:, prompt:]
        return torch.cat([rows[first, :prompt], answers.flatten(1)], dim=1)

    segment = torch.cat(
        [
            torch.zeros(prompt, dtype=torch.long, device=device),
            torch.arange(1, slots + 1, device=device).repeat_interleave(length),
        ]
    )
    place = torch.arange(len(segment), device=device)
    visible = (place[None, :] <= place[:, None]) & ((segment[None, :] == 0) | (segment[None, :] == segment[:, None]))
    allowed = visible[None] & joined(batch.attention_mask).bool()[:, None, :]
    allowed |= torch.eye(len(segment), dtype=torch.bool, device=device)  # padding sees itself: no empty softmax
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)
    keep = 1 + slots * length
    # Token t of slot k is predicted by the token before it; its first token by the end of the prompt.
    steps = torch.arange(length, device=device)[None, :]
    within = torch.where(steps == 0, 0, slot[:, None] * length + steps)
    predictions = (groups[:, None] * keep + within).flatten()
    return SharedLayout(joined(batch.ids), joined(batch.positions), mask[:, None], keep, predictions)
