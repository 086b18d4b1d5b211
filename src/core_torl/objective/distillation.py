"""How far a student's next-token distribution is from a teacher's, over the whole vocabulary, in little memory.

CORE-KL (section 3, the loss beside GRPO) pulls the policy under the plain prompt towards itself under the primed
prompt, along an answer sampled from the primed one: ``sum_t KL(p(.|p_c, y_<t) || p(.|q, y_<t))``. Both distributions
are made from hidden states slice by slice, the head in its own precision and all after it in float32. Each slice is
computed again in the backward pass, so that no [tokens, vocabulary] tensor of all tokens ever exists. The teacher gives
no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core_torl.config.coach_checks import check_choice

SLICE_ELEMENTS = 16 * 1024 * 1024  # float32 elements of one slice of logits: 64 MiB
Head = Callable[[Tensor], Tensor]


@dataclass
class Divergence:
    """``total`` carries the student's gradient; ``per_token`` and ``gap`` are detached, [tokens].

    ``gap`` is log p_teacher - log p_student of the token that the answer has.
    """

    total: Tensor
    per_token: Tensor
    gap: Tensor


def divergence(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor,
    weights: Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    slice_elements: int = SLICE_ELEMENTS,
) -> Divergence:
    """``sum(weights * D)`` over tokens, D the divergence of the two next-token distributions.

    Args:
        student, teacher: hidden states, [tokens, hidden size]; only the student's carry a gradient.
        ids: the answer's tokens, [tokens], for ``gap``.
        weights: [tokens]; reduction and lambda are in here.
        student_head, teacher_head: hidden states -> logits [tokens, vocabulary].
        direction: "forward" KL(teacher || student) as in the paper, "reverse" KL(student || teacher), or
            "jensen_shannon", the mean of both towards their mixture (at most log 2).
        temperature: divides both logits; the one the answers were sampled at.
        slice_elements: logits of one slice; more than one slice are recomputed in the backward pass.

    Raises:
        ValueError: an unknown direction.
    """
    check_choice("direction", direction)
    if not len(ids):
        # The head takes part: where weights are sharded, each rank has to have a gradient for each of them.
        empty = (student.sum() + student_head(student).sum()) * 0.0
        return Divergence(empty, empty.detach().new_zeros(0), empty.detach().new_zeros(0))

    def part(states: Tensor, teacher_states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = _log_softmax(teacher_head(teacher_states), temperature)
        own = _log_softmax(student_head(states), temperature)
        gap = (target - own.detach()).gather(-1, tokens[:, None]).squeeze(-1)
        return _between(target, own, direction), gap

    vocabulary = student_head(student[:1].detach()).shape[-1]
    step = max(1, slice_elements // vocabulary)
    if len(ids) <= step:
        values, gaps = part(student, teacher, ids)
    else:
        # A reentrant slice adds the head's gradient to its ``.grad`` right away. Otherwise autograd adds the slices'
        # gradients up first, in three tensors of the head's size. It needs an input that carries a gradient.
        reentrant = student.requires_grad
        pieces = [
            checkpoint(part, *slices, use_reentrant=reentrant)
            for slices in zip(student.split(step), teacher.split(step), ids.split(step), strict=True)
        ]
        values, gaps = torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])  # pyright: ignore
    return Divergence((values * weights).sum(), values.detach(), gaps.detach())


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)


def _between(teacher: Tensor, student: Tensor, direction: str) -> Tensor:
    """Divergence of two log-distributions, [tokens, vocabulary] -> [tokens]."""
    if direction == "forward":
        return (teacher.exp() * (teacher - student)).sum(dim=-1)
    if direction == "reverse":
        return (student.exp() * (student - teacher)).sum(dim=-1)
    middle = torch.logaddexp(teacher, student) - math.log(2)
    return 0.5 * (teacher.exp() * (teacher - middle) + student.exp() * (student - middle)).sum(dim=-1)
