"""Frozen weights in four bits under LoRA adapters (QLoRA, Dettmers et al. 2023): bitsandbytes' NF4, quantized twice.

Only the linear layers of the decoder are packed; embeddings, norms and the head stay as they are. Nothing here is
needed, nor bitsandbytes installed, as long as ``model.quantization`` is null.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from torch import Tensor

KINDS = ("nf4",)


def check_quantization(quantization: str | None, lora_rank: int) -> None:
    """Raises ValueError, on one line, for an unknown kind, without LoRA, and where bitsandbytes is missing."""
    if quantization is None:
        return
    if quantization not in KINDS:
        raise ValueError(f"model.quantization={quantization!r}: use nf4, or null for none")
    if lora_rank == 0:
        raise ValueError(
            f"model.quantization={quantization}: packed weights cannot be trained; set model.lora.rank=16, say"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.quantization={quantization} needs bitsandbytes, which is not installed: "
            "pip install 'core-torl[qlora]'"
        )


def nf4(device: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told; products are computed in ``dtype``."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantized(parameter: Any) -> bool:
    """Whether a parameter is packed."""
    return getattr(parameter, "quant_state", None) is not None


def dequantized(tensor: Tensor, parameter: Any) -> Tensor:
    """``tensor``, the contents of ``parameter``, unpacked if they are packed."""
    if not is_quantized(parameter):
        return tensor
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports] (an extra)

    state = parameter.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # On a CPU, a pass in eval mode packs the weights once more, which dequantize_4bit does not know of.
        tensor, state = functional._convert_weight_packed_for_cpu_inverse(tensor, copy.copy(state))
    return functional.dequantize_4bit(tensor, state)
