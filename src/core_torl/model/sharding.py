"""A model whose weights, gradients and optimizer state are spread over the ranks: FSDP2 (``fully_shard``).

Each decoder layer is gathered when it runs and given back right after it; what is left (embeddings, the last norm, the
head) is gathered around the whole forward pass. Gradients are **summed** over the ranks, not averaged: the loss of a
step is one sum, divided once by what all ranks have (see variant/gradients.py).

Between forward passes all parameters are DTensors, the head too: nobody meets a whole tensor by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def shard(model: nn.Module, mesh: Any, half: bool = False, offload: bool = False, frozen: bool = False) -> None:
    """Spread ``model`` over the ranks of a one-dimensional device mesh, in place.

    Args:
        half: gather and compute in bfloat16; the shards, the gradients and the optimizer stay as they are.
        offload: the shards lie in the CPU's memory and each layer travels when it runs. For frozen models.
        frozen: the model only ever runs forward; its head stays gathered behind a pass, to be read by a loss.

    Raises:
        ValueError: this torch cannot sum gradients over shards.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(
            f"trainer.strategy=fsdp: torch {torch.__version__} is too old; install 2.8 or later, or use ddp"
        )
    settings: dict[str, Any] = {"mesh": mesh}
    if half:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in layers_of(model):
        fully_shard(layer, **settings, reshard_after_forward=True)
    fully_shard(model, **settings, reshard_after_forward=not frozen)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, as transformers names the classes that must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def is_sharded(model: nn.Module) -> bool:
    """Whether the ranks hold shards of this model."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where ranks hold shards; then every rank has to ask."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's share of a whole tensor that every rank has, laid out as ``parameter`` is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    tensor = tensor.to(like.to_local().device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; every module is left in the mode that it had (parts may be frozen in eval mode)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
