"""A small batch with everything that makes batches hard: uneven lengths, tokens left out of the loss, two signs."""

from __future__ import annotations

import pytest
import torch

from core_torl.objective.token_batch import TokenBatch


@pytest.fixture(scope="session")
def make_batch(tiny_tokenizer):
    """``make_batch(rows=7)``: rows of random ids; row 2 trains on few tokens, rows 3 and 5 have advantage 0."""

    def make(rows: int = 7, seed: int = 0, extra: list | None = None) -> TokenBatch:
        generator = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, count: int) -> list[int]:
            return torch.randint(low, high, (count,), generator=generator).tolist()

        prompts = [integers(3, len(tiny_tokenizer), n) for n in [3, 11, 6, 1, 8, 5, 9][:rows]]
        answers = [integers(3, len(tiny_tokenizer), n) for n in [5, 2, 12, 7, 1, 9, 4][:rows]]
        masks = [[True] * len(a) for a in answers]
        if rows > 2:
            masks[2] = [i in (0, 1, 7) for i in range(12)]  # most of it is a tool's output
        advantages = torch.tensor([1.5, -0.7, 0.4, 0.0, -1.2, 0.0, 0.9])[:rows]
        logprobs = [(-3 * torch.rand(len(a), generator=generator) - 2).tolist() for a in answers]
        return TokenBatch.build(prompts, answers, logprobs, masks, advantages, pad_id=0)

    return make
