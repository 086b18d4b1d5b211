"""Answers in progress on the cascade: a row that waits for a tool keeps its keys and values while the others go on.

Every step works on all running rows at once: it draws a token for each row that has just been read to its end, then
reads one more token of each. A row that is resumed has the given tokens to read first, one a step beside the others'
draws, so nothing is ever read twice and no row waits for another. Rows that will not be resumed leave the batch once
enough of them have gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from core_torl.sampler.cascade import CascadeCache, cascade
from core_torl.sampler.draw import draw
from core_torl.sampler.rows import Rows, pack
from core_torl.trajectory import Sample

_SHRINK = 0.75  # pack again once this share of the places, or less, is needed


class CascadeSession:
    """See core_torl.sampler.protocol.Session. To be used with gradients off and the model in eval mode.

    ``prompts`` are the left-padded ids, their mask and their positions, each [requests, longest prompt];
    ``prompt_length`` [requests] counts real tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Rows,
        prompts: tuple[Tensor, Tensor, Tensor],
        prompt_length: Tensor,
        version: str,
    ) -> None:
        ids, mask, positions = prompts
        self.model, self.rows, self.version = model, rows, version
        self.device, self.prompt_length = ids.device, prompt_length
        self.cache = CascadeCache()
        self.read = torch.zeros(len(rows.length), dtype=torch.long)  # [rows] answer tokens that the model has read
        self._running = self._left = len(rows.length)
        logits = model(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # [requests, vocabulary]  # fmt: skip
        self.cache.start_decoding(mask)
        groups = rows.active()
        self.packing = pack(groups, max(map(len, groups.values())))
        blocks = self.packing.blocks.to(self.device)
        self.cache.arrange(blocks, self.packing.places.to(self.device), self.packing.per_block)
        self.logits = logits[blocks].repeat_interleave(self.packing.per_block, dim=0)  # [places, vocabulary]

    @property
    def running(self) -> int:
        return self._running

    def advance(self) -> list[int]:
        """Draw for every row that has been read to its end, then read one token of every running row."""
        if not self._running:
            return []
        ended = self._draw()
        self._running -= len(ended)
        if self._running:
            self._read()
        return ended

    def answer(self, row: int) -> Sample:
        return self.rows.sample(row, self.version)

    def resume(self, row: int, token_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self.rows.give(row, token_ids, stop)
        self._running += 1

    def release(self, row: int) -> None:
        self.rows.gone[row] = True
        self._left -= 1
        if not self._left:  # the session may stay open for a while: other parts have theirs open
            self.cache, self.logits = CascadeCache(), torch.empty(0)

    def _draw(self) -> list[int]:
        places = self.packing.places
        due = self.packing.live & self.rows.running[places] & (self.read == self.rows.length)[places]
        if not due.any():
            return []
        rows = places[due]
        every = bool(due.all())
        logits = self.logits if every else self.logits[due.to(self.device)]
        logits = self.rows.hold_back(logits, rows)
        ids, logprobs = draw(logits, self.rows.sampling, self.rows.numbers[rows, self.rows.length[rows]])
        return self.rows.record(rows, ids.cpu(), logprobs.cpu())

    def _read(self) -> None:
        self._shrink()
        places = self.packing.places
        at = self.read[places]
        # A place without a running row writes beyond what its row has read, where the row will overwrite it.
        with cascade(self.model, self.cache):
            self.cache.write_at(at)
            position = self.prompt_length[self.rows.request_of_row[places]] + at
            self.logits = self.model(
                input_ids=self.rows.ids[places, at][:, None].to(self.device),
                position_ids=position.to(self.device)[:, None],
                past_key_values=self.cache,
                use_cache=True,
            ).logits[:, -1]
        self.read += self.rows.running  # every running row has a place

    def _shrink(self) -> None:
        """Drop the places of rows that are gone, once there are enough of them."""
        packing = self.packing
        packing.live[self.rows.gone[packing.places]] = False
        if int(packing.live.sum()) > _SHRINK * len(packing.places):
            return
        place_of_row = {int(r): p for p, r in enumerate(packing.places.tolist()) if packing.live[p]}
        block_of_request: dict[int, int] = {int(r): b for b, r in enumerate(packing.blocks.tolist())}
        self.packing = pack(self.rows.active(), packing.per_block)
        if len(self.packing.places) >= len(packing.places):
            self.packing = packing
            return
        kept = torch.tensor([place_of_row[r] for r in self.packing.places.tolist()])
        blocks = torch.tensor([block_of_request[r] for r in self.packing.blocks.tolist()])
        self.cache.arrange(blocks.to(self.device), kept.to(self.device), self.packing.per_block)
        # Logits are read off anew by the forward that follows.
