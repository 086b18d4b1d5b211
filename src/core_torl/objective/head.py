"""A forward pass in which a loss stands in the place of the head, so that nobody has to hold all logits.

The language-model head is the last and largest matrix of a model. Logits of 16 answers of 1,024 tokens over 151,936
entries are 10 GB in float32, the hidden states that they are made of 0.1 GB. ``through_head`` runs the model as it is,
with all its hooks, adapters and shards, and calls ``read(states, head)`` where the model calls its head; ``read``
applies the head to as many states at a time as it likes and returns something small. Because this happens inside the
forward pass, parameters that are gathered only while a module runs (FSDP) are there, and again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]  # hidden states [..., hidden size] -> logits [..., vocabulary]
Read = Callable[[Tensor, Head], Tensor]  # hidden states at the positions that were asked for, and the head

# What models call a cap or a factor on their logits.
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class HeadIsNotLast(ValueError):
    """The model does more to its logits than its head; the message says what."""


def head_of(model: Any) -> nn.Module:
    """The output embedding, adapters included."""
    return model.get_output_embeddings()


def named_scale(model: Any) -> str | None:
    """The name of a cap or factor on logits that this model's config sets, None without one."""
    config = getattr(model, "config", None)
    return next((n for n in _SCALES if getattr(config, n, None) not in (None, 1, 1.0)), None)


def run_with(model: Any, read: Read, **inputs: Any) -> tuple[Tensor, Tensor]:
    """One forward pass with ``read`` in the place of the head: (what the model returned as logits, what read returned).

    Raises HeadIsNotLast if the model did not call its output embedding exactly once, or has hooks behind it.
    """
    head, found = head_of(model), []
    if head._forward_hooks:  # they would be given what ``read`` returns, which is no logits
        raise HeadIsNotLast("hooks change what its output embedding returns")
    before = head.__dict__.get("forward")  # a forward that somebody has put on this very module
    own: Head = head.forward

    def stand_in(states: Tensor, *_: Any, **__: Any) -> Tensor:
        found.append(read(states, own))
        return found[-1]

    head.forward = stand_in
    try:
        returned = model(**inputs).logits
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
    if len(found) != 1:
        raise HeadIsNotLast(f"it calls its output embedding {len(found)} times in a forward pass")
    return returned, found[0]


def through_head(model: Any, read: Read, **inputs: Any) -> Tensor:
    """What ``read`` returned; ``inputs`` are the model's keyword arguments.

    Raises HeadIsNotLast if the model changes what its head returns: ``read`` would have seen other logits than the
    model's own. A factor of 1 and a cast to the same type change nothing.
    """
    if (name := named_scale(model)) is not None:  # a cap is nearly linear on small numbers: not to be told from them
        raise HeadIsNotLast(f"{name} in its config caps or scales its logits")
    returned, read_out = run_with(model, read, **inputs)
    if returned is not read_out and not (returned.shape == read_out.shape and returned.equal(read_out)):
        raise HeadIsNotLast("it changes what its head returns")
    return read_out
