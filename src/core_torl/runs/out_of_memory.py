"""An error of the device's memory, said in one line that names what to turn down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig

from core_torl.config import UserError


@contextmanager
def advice_on_memory(cfg: DictConfig, doing: str) -> Iterator[None]:
    """Inside, running out of memory raises UserError; ``doing``: training, say."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        first = " ".join(str(error).split())
        # The allocator of the CPU raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in first:
            raise
        fix = "; ".join(remedies(cfg))
        raise UserError(f"out of memory while {doing} ({first[:120]}): {fix}") from error


def remedies(cfg: DictConfig) -> list[str]:
    """What may help in this configuration, the cheapest first."""
    variant, model, sampler = cfg.get("variant"), cfg.model, cfg.sampler
    found = []
    if variant is None:  # an evaluation
        pass
    elif variant.microbatch_tokens is None:
        longest = model.max_prompt_tokens + model.max_new_tokens
        found.append(f"set variant.microbatch_tokens={longest} (one longest row), or lower variant.microbatch_size")
    else:
        found.append(f"lower variant.microbatch_tokens={variant.microbatch_tokens}")
    if variant is not None and not model.gradient_checkpointing:
        found.append("set model.gradient_checkpointing=true")
    if "gpu_memory_utilization" in sampler:
        found.append(f"lower sampler.gpu_memory_utilization={sampler.gpu_memory_utilization}")
    elif "max_rows" in sampler:
        found.append(f"lower sampler.max_rows={sampler.max_rows}")
    if not model.offload_reference and model.lora.rank == 0 and variant is not None and cfg.objective.get("kl_coef"):
        found.append("set model.offload_reference=true")
    if variant is not None and model.lora.rank == 0:
        found.append("use model.lora.rank=16, or trainer=fsdp on several GPUs")
    return found or ["use a GPU with more memory"]
