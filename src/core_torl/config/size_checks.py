"""Combinations of trainer, model and sampler that cannot work at size; they run before torch is imported."""

from __future__ import annotations

import importlib.util

from omegaconf import DictConfig

from core_torl.config.errors import UserError

STRATEGIES = ("auto", "ddp", "fsdp")


def check_trainer(cfg: DictConfig) -> None:
    """Strategy, and the number of processes that it stands for."""
    trainer = cfg.trainer
    if trainer.strategy not in STRATEGIES:
        raise UserError(f"trainer.strategy={trainer.strategy!r}: use auto, ddp or fsdp")
    if trainer.devices * trainer.num_nodes > 1 and trainer.strategy == "auto":
        raise UserError(
            f"trainer.devices={trainer.devices} with trainer.strategy=auto: set trainer.strategy=ddp or fsdp"
        )


def check_size(cfg: DictConfig) -> None:
    """What sharding and packed weights need of the rest of a training config."""
    quantization = cfg.model.quantization
    if cfg.variant.microbatch_tokens is not None and cfg.variant.microbatch_tokens < 1:
        raise UserError(
            f"variant.microbatch_tokens={cfg.variant.microbatch_tokens}: must be at least 1, or null to count rows"
        )
    if cfg.trainer.strategy == "fsdp":
        if cfg.sampler.get("copy_weights") is False:
            raise UserError(
                "trainer.strategy=fsdp: sampler=transformers works with the trainer's own weights, of which each "
                "process has a shard; set sampler.copy_weights=true, or use sampler=vllm"
            )
        if cfg.trainer.precision not in ("32-true", "bf16-mixed"):
            raise UserError(f"trainer.precision={cfg.trainer.precision} with trainer.strategy=fsdp: use bf16-mixed")
        if quantization is not None:
            raise UserError(
                f"model.quantization={quantization}: packed weights cannot be sharded; use trainer=gpu or ddp_gpu"
            )
    if quantization is None:
        return
    if quantization != "nf4":
        raise UserError(f"model.quantization={quantization!r}: use nf4, or null for none")
    if cfg.model.lora.rank == 0:
        raise UserError(
            f"model.quantization={quantization}: packed weights cannot be trained; set model.lora.rank=16, say"
        )
    if cfg.sampler.get("copy_weights"):
        raise UserError(
            f"model.quantization={quantization} with sampler.copy_weights=true: a copy of packed weights cannot take "
            "merged ones; set sampler.copy_weights=false, or use sampler=vllm"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantization={quantization} needs bitsandbytes, which is not installed: "
            "pip install 'core-torl[qlora]'"
        )
