"""Gradients of several ranks and of several losses: summed here, once for each optimizer step, and measured.

Ranks may have different numbers of parts to back-propagate, so DDP's own hooks, which sum after each backward pass,
would wait for each other for ever. FSDP has no choice: each of its passes is one of all ranks. There all ranks run as
many passes as the one with the most (``largest_over_ranks``), the others with rows that weigh nothing, and what a
backward pass leaves is the sum over the ranks already (see model/sharding.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core_torl.config.errors import UserError
from core_torl.model.sharding import whole


def sum_over_ranks(value: Tensor, ranks: int) -> Tensor:
    """``value`` summed in place over all ranks. Every rank has to call it."""
    if ranks > 1:
        torch.distributed.all_reduce(value)
    return value


def largest_over_ranks(value: int, ranks: int, device: torch.device) -> int:
    """The largest ``value`` of any rank. Every rank has to call it."""
    if ranks == 1:
        return value
    largest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def sum_gradients(parameters: Sequence[Tensor], ranks: int) -> None:
    """Sum each parameter's gradient over all ranks; zeros where a rank had nothing to learn from.

    A shard's gradient has been summed by the backward pass.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if not hasattr(parameter, "full_tensor"):
            sum_over_ranks(parameter.grad, ranks)


def take_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Take the gradients off the parameters, which get zeros instead."""
    taken: list[Tensor] = []
    for parameter in parameters:
        assert parameter.grad is not None
        taken.append(parameter.grad)
        parameter.grad = torch.zeros_like(parameter)
    return taken


def add_gradients(parameters: Sequence[Tensor], taken: Sequence[Tensor]) -> tuple[float, float]:
    """Add what was taken to what is there; returns the L2 norms of (taken, there before)."""
    own = norm_of([p.grad for p in parameters if p.grad is not None])
    for parameter, gradient in zip(parameters, taken, strict=True):
        assert parameter.grad is not None
        parameter.grad += gradient
    return norm_of(taken), own


def norm_of(tensors: Sequence[Tensor]) -> float:
    """The L2 norm of all numbers together."""
    return float(whole(torch.nn.utils.get_total_norm(list(tensors))))


def check_first_update(metrics: Any, started: bool, limit: float, ranks: int, device: torch.device) -> bool:
    """Before a process's first update nothing has moved: sampler and trainer agree, ratios are 1.

    ``started``: no update was ever made, so the KL to the reference is 0 as well. All ranks look at the largest values
    of any rank, so that they stop together. Returns whether anything could be compared. Raises UserError.
    """
    seen = torch.tensor([*metrics.deviations(), float(metrics.compared)], device=device)
    if ranks > 1:
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
    gap, ratio, kl, compared = seen.tolist()
    faults = {
        "sampler and trainer disagree in a token's log-prob": gap,
        "an importance ratio is off 1": ratio,
        "the KL to the reference is off 0": kl if started else 0.0,
    }
    for fault, value in faults.items():
        if not value <= limit:
            raise UserError(
                f"first-step check: {fault} by {value:.2e} (limit variant.first_step_gap={limit}): the passes do "
                "not run the same weights, temperature or precision, or dropout is on"
            )
    return compared > 0
