"""How the ranks of a training share the work, as Lightning strategies: one process, DDP, or FSDP2.

Whatever the strategy, a checkpoint holds whole tensors under the model's own names and the optimizer's state by the
number of its parameter, so that each kind of run can go on from a checkpoint of each other kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from core_torl.model.sharding import shard_like, whole

# How long ranks wait for each other: the first one evaluates, and on long answers that takes longer than torch's half
# an hour.
PATIENCE = timedelta(hours=6)


def strategy_of(name: str, ranks: int) -> Strategy | str:
    """What Lightning's trainer takes for ``trainer.strategy``: auto, ddp or fsdp."""
    if name == "ddp":
        return DDPStrategy(timeout=PATIENCE)
    return Sharded(ranks) if name == "fsdp" else name


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks. ``configure_model`` of the module shards; checkpoints are those of a single process."""

    def __init__(self, ranks: int) -> None:
        super().__init__(
            data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=PATIENCE
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors in the CPU's memory; on other ranks than the first nothing is kept."""
        assert self.lightning_module is not None
        return gathered(self.lightning_module.state_dict(), self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As a single process would have it; every rank has to ask."""
        state = getattr(optimizer, "optimizer", optimizer).state_dict()
        held = {number: gathered(values, self.is_global_zero) for number, values in state["state"].items()}
        return {"state": held, "param_groups": state["param_groups"]}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(Path(checkpoint_path), weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {k: _share(v, parameters[number]) for k, v in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def gathered(tensors: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Whole tensors in the CPU's memory, one gathered at a time; {} where they are not to be kept."""
    held: dict[str, Any] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach()) if isinstance(tensor, Tensor) else tensor
        if keep:
            held[name] = full.cpu() if isinstance(full, Tensor) else full
    return held


def _share(value: Any, parameter: Tensor) -> Any:
    """Adam's moments have the parameter's shape and are sharded as it is; a count of steps is not."""
    if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim():
        return shard_like(value, parameter)
    return value
