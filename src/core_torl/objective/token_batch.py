"""The only thing an objective sees: rows of token ids with masks, advantages and log-probs.

Prompts are padded on the left and answers on the right, so the first answer token stands in the same column of every
row: ``ids[:, prompt_length]``. All answer-side tensors are [rows, answer length].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from core_torl.trajectory import Behaviour


@dataclass
class TokenBatch:
    ids: Tensor  # [rows, prompt length + answer length] int64
    attention_mask: Tensor  # [rows, prompt length + answer length] int64, 0 on padding
    positions: Tensor  # [rows, prompt length + answer length] int64
    train_mask: Tensor  # [rows, answer length] bool: sampled by the policy and kept in the loss
    advantages: Tensor  # [rows] float32
    sampled_logprobs: Tensor  # [rows, answer length] float32, as the sampler reported them
    foreign: Tensor  # [rows] bool: sampled under another prompt than the one in the row (a primed one)
    guided: Tensor  # [rows] bool: foreign, and its importance ratio is taken against the sampled log-probs
    old_logprobs: Tensor | None = None  # [rows, answer length] of the policy before this step's first update
    reference_logprobs: Tensor | None = None  # [rows, answer length]

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def answer_length(self) -> int:
        return self.train_mask.shape[1]

    @property
    def answer_ids(self) -> Tensor:
        return self.ids[:, self.ids.shape[1] - self.answer_length :]

    def select(self, rows: Tensor | slice) -> TokenBatch:
        """Some rows, cut to the longest prompt and answer among them: padding that nobody needs costs time."""
        picked: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: dict[str, Any] = {k: None if v is None else v[rows] for k, v in picked.items()}
        part = TokenBatch(**cut)
        prompt = part.ids.shape[1] - part.answer_length
        mask = part.attention_mask.bool()
        left = int(mask[:, :prompt].any(dim=0).long().argmax()) if prompt else 0
        used = mask[:, prompt:].any(dim=0)
        right = int(used.long().sum()) if used.any() else 1
        for name in ("ids", "attention_mask", "positions"):
            setattr(part, name, getattr(part, name)[:, left : prompt + right])
        for name in ("train_mask", "sampled_logprobs", "old_logprobs", "reference_logprobs"):
            value = getattr(part, name)
            setattr(part, name, None if value is None else value[:, :right])
        return part

    @staticmethod
    def build(
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        masks: Sequence[Sequence[bool]],
        advantages: Tensor,
        pad_id: int,
        device: torch.device | str = "cpu",
        behaviours: Sequence[Behaviour] | None = None,
    ) -> TokenBatch:
        """Pad rows of token ids into one batch; the ids are used as they are, nothing is encoded again.

        ``behaviours``: see core_torl.trajectory; None says "policy" of every row.
        """
        left, right = max(map(len, prompts)), max(1, max(map(len, answers)))
        rows = len(prompts)
        ids = torch.full((rows, left + right), pad_id, dtype=torch.long)
        mask = torch.zeros(rows, left + right, dtype=torch.long)
        train = torch.zeros(rows, right, dtype=torch.bool)
        sampled = torch.zeros(rows, right)
        for i, (prompt, answer, values, trained) in enumerate(zip(prompts, answers, logprobs, masks, strict=True)):
            if not len(answer) == len(values) == len(trained):
                raise ValueError(f"row {i}: {len(answer)} ids, {len(values)} log-probs, {len(trained)} mask entries")
            ids[i, left - len(prompt) : left] = torch.tensor(prompt, dtype=torch.long)
            ids[i, left : left + len(answer)] = torch.tensor(answer, dtype=torch.long)
            mask[i, left - len(prompt) : left + len(answer)] = 1
            train[i, : len(answer)] = torch.tensor(trained, dtype=torch.bool)
            sampled[i, : len(answer)] = torch.tensor(values)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        kinds = ["policy"] * rows if behaviours is None else behaviours
        foreign, guided = torch.tensor([[b != "policy", b == "guided"] for b in kinds]).unbind(dim=1)
        parts = (ids, mask, positions, train, advantages.float(), sampled, foreign, guided)
        return TokenBatch(*(t.to(device) for t in parts))
