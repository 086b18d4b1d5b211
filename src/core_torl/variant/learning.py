"""From one batch of weighed answers to new weights: minibatches, their parts, gradients, clipping, the optimizer.

The gradient of an optimizer step is a sum over its rows divided once, so neither the cut into parts that fit the memory
nor the number of ranks changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from core_torl.model.load import Policy
from core_torl.model.sharding import is_sharded, shard, whole
from core_torl.objective.logprobs import answer_logprobs
from core_torl.objective.mismatch import measure
from core_torl.objective.shared_prompts import can_share
from core_torl.objective.token_batch import TokenBatch
from core_torl.sampler.protocol import Sampler
from core_torl.variant.gradients import (
    add_gradients,
    check_first_update,
    largest_over_ranks,
    sum_gradients,
    sum_over_ranks,
    take_gradients,
)
from core_torl.variant.microbatches import Part, cut, idle_part, lengths_of, picked
from core_torl.variant.step_metrics import StepMetrics


class Learning(pl.LightningModule):
    """What every variant does with a TokenBatch. ``PolicyGradient`` sets the fields and makes the batches."""

    model: Any
    rl_step: int
    updates: int
    temperature: float
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup_steps: int
    grad_clip: float
    update_epochs: int
    minibatch_size: int
    microbatch_size: int
    microbatch_tokens: int | None
    skip_zero_advantage: bool
    share_prompts: bool
    first_step_gap: float | None
    _parts: dict[str, Any]
    _now: StepMetrics
    _frozen: Any
    _first_checked: bool
    settled: bool  # between two steps, or before anything of a step has moved
    _stale: bool  # whether an earlier policy sampled this step's answers

    def auxiliary_losses(self, rows: Tensor) -> Iterator[Tensor]:
        """A variant's own loss for the rows of one optimizer step, in parts that add up to it, already scaled.

        Each part is back-propagated before the next one is asked for: that is what bounds the memory.
        """
        yield from ()

    def learn(self, batch: TokenBatch) -> None:
        """Optimizer steps over the batch, ``minibatch_size`` trajectories each, ``update_epochs`` times."""
        share = self.minibatch_size // self._ranks
        cuts = [torch.arange(s, min(s + share, batch.rows), device=self.device) for s in range(0, batch.rows, share)]
        self.model.train()
        if self.objective.needs_reference:
            with self.policy.reference(self._frozen) as reference:
                batch.reference_logprobs = self._forward_only(reference, batch)
        self._now.exact_sampler = not self.sampler.sampling.truncates
        self._first_checked |= self._stale  # the sampler is not meant to agree; each hand-over has a check of its own
        if self._stale or len(cuts) * self.update_epochs > 1:
            # The policy moves between the optimizer steps: keep where it stood before the first one.
            batch.old_logprobs = self._forward_only(self.model, batch)
            self._compare_with_sampler(batch.old_logprobs, batch)
            if self._stale and not self.objective.corrects:
                # As PPO does: against the policy that answered. (A correction weighs the step between the two itself.)
                own = ~batch.foreign[:, None]
                batch.old_logprobs = torch.where(own, batch.sampled_logprobs, batch.old_logprobs)
        for _ in range(self.update_epochs):
            for rows in cuts:
                self._optimizer_step(batch, rows)

    # ---- one optimizer step --------------------------------------------------------------------------------------

    def _optimizer_step(self, batch: TokenBatch, rows: Tensor) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad(set_to_none=False)
        denominator = self._sum_over_ranks(self.objective.denominator(batch.train_mask[rows])).clamp(min=1)
        with self._own_gradient_sync():
            held = self._auxiliary_gradient(rows)
            for part in self._microbatches(batch, rows):
                logprobs, entropies = self._forward(self.model, part, self.objective.needs_entropy)
                if batch.old_logprobs is None:
                    self._compare_with_sampler(logprobs.detach(), part)
                loss = self.objective.loss(logprobs, entropies, part, denominator)
                self.manual_backward(loss.total)
                self._now.add_loss(loss, entropies, part.train_mask)
        self._check_first_update()
        sum_gradients(self._trained(), self._ranks)
        if held is not None:
            auxiliary, own = add_gradients(self._trained(), held)
            self._now.count("auxiliary updates", 1)
            self._now.add("core/auxiliary_grad_norm", auxiliary)
            self._now.add("core/auxiliary_grad_share", auxiliary / max(auxiliary + own, 1e-12))
        norm = self._clip()
        if not torch.isfinite(norm):
            raise FloatingPointError(f"RL step {self.rl_step}: the gradient norm is {norm.item()}; lower variant.lr")
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.updates + 1) / self.warmup_steps) if self.warmup_steps else self.lr
        self.settled = False
        optimizer.step()
        self.updates += 1
        self._now.optimizer_step(float(norm), optimizer.param_groups[0]["lr"])

    def _auxiliary_gradient(self, rows: Tensor) -> list[Tensor] | None:
        """The gradient of the variant's own loss over all ranks, taken off the parameters so that it can be measured.

        None where the variant has no such loss. Every rank takes part, also one without a row of its own.
        """
        if type(self).auxiliary_losses is Learning.auxiliary_losses:
            return None
        for part in self.auxiliary_losses(rows):
            self.manual_backward(part)
            self._now.add("loss/auxiliary", float(part.detach()))
            self._now.add("loss/total", float(part.detach()))
        sum_gradients(self._trained(), self._ranks)
        return take_gradients(self._trained())

    def _microbatches(self, batch: TokenBatch, rows: Tensor) -> Iterator[TokenBatch]:
        """The rows of one optimizer step in memory-sized parts of like length; rows without gradient are left out."""
        useful = batch.train_mask[rows].any(dim=1)
        if self.skip_zero_advantage and not (self.objective.needs_reference or self.objective.needs_entropy):
            useful &= batch.advantages[rows] != 0
        rows = rows[useful]
        parts = self._cut(batch.select(rows)) if len(rows) else []
        idle = self._idle_rounds(len(parts))
        for part in parts:
            self._now.add("train/padding", part.places - part.tokens)
            self._now.count("token places", part.places)
            yield picked(batch, rows, part)
        for _ in range(idle):
            yield idle_part(batch)

    def _cut(self, batch: TokenBatch) -> list[Part]:
        share = self.share_prompts and can_share(self.model)
        return cut(lengths_of(batch), self.microbatch_size, self.microbatch_tokens, share)

    def _idle_rounds(self, parts: int) -> int:
        """Passes that this rank has to make beyond its own ``parts``, to keep step with the rank that has the most.

        To be asked before the first one: where weights are sharded, each pass is one of all ranks.
        """
        return largest_over_ranks(parts, self._ranks, self.device) - parts if is_sharded(self.model) else 0

    def _forward(self, model: Any, part: TokenBatch, entropy: bool = False) -> tuple[Tensor, Tensor]:
        return answer_logprobs(model, part, self.temperature, entropy, self.share_prompts)

    @torch.no_grad()
    def _forward_only(self, model: Any, batch: TokenBatch) -> Tensor:
        """Log-probs of all answers under ``model``: [rows, answer length]; zeros right of each row's answer."""
        result = torch.zeros_like(batch.sampled_logprobs)
        everything, parts = torch.arange(batch.rows, device=self.device), self._cut(batch)
        idle = self._idle_rounds(len(parts))
        for part in parts:
            some = picked(batch, everything, part)
            logprobs, _ = self._forward(model, some)
            result[everything[part.rows], : some.answer_length] = logprobs
        for _ in range(idle):
            self._forward(model, idle_part(batch))
        return result

    def _compare_with_sampler(self, logprobs: Tensor, part: TokenBatch) -> None:
        """Record how far trainer and sampler are apart on trained tokens that both saw behind one prompt."""
        self._now.add_mismatch(measure(logprobs, part.sampled_logprobs, part.train_mask & ~part.foreign[:, None]))

    def _check_first_update(self) -> None:
        # Before an RL step's first update, that is: afterwards ratios are meant to move.
        if self.first_step_gap is not None and not self._first_checked and not self._now.updates:
            self._first_checked = check_first_update(
                self._now, self.updates == 0, self.first_step_gap, self._ranks, self.device
            )

    def _clip(self) -> Tensor:
        limit = self.grad_clip if self.grad_clip > 0 else float("inf")
        return whole(torch.nn.utils.clip_grad_norm_(self._trained(), limit))

    def _own_gradient_sync(self) -> Any:
        """Ranks may have different numbers of parts, so gradients are summed here, once, not by DDP each time."""
        strategy: Any = self.trainer.strategy
        return strategy.block_backward_sync() if self._ranks > 1 and not is_sharded(self.model) else nullcontext()

    # ---- small parts ---------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        return self._parts["policy"]

    @property
    def sampler(self) -> Sampler:
        return self._parts["sampler"]

    @property
    def objective(self) -> Any:
        return self._parts["objective"]

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size

    def _trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return sum_over_ranks(value, self._ranks)

    def configure_model(self) -> None:
        """Spread the policy, and frozen copies of it, over the ranks where the strategy is to (FSDP)."""
        mesh: Any = self.device_mesh
        if mesh is None or is_sharded(self.model):
            return
        mesh, half = mesh["data_parallel"], self.trainer.precision == "bf16-mixed"
        for frozen in self._frozen_models():
            shard(frozen, mesh, half, offload=self.policy.offload, frozen=True)
        shard(self.model, mesh, half)

    def _frozen_models(self) -> list[Any]:
        """Copies of the policy that are never trained."""
        return [] if self._frozen is None else [self._frozen]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self._trained(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
