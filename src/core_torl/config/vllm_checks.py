"""Whether vLLM can be used here, said before anything heavy is loaded.

vLLM is optional and changes fast, so only versions that the samplers were tested with are taken. Its version is read
from its folder: importing it takes ten seconds and more, and builds for the CPU are distributed under other names, so
that package metadata does not know them.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from core_torl.config.errors import UserError, nearest

TESTED_VLLM = ((0, 32), (0, 33))  # from the first, below the second
INSTALL_VLLM = "pip install 'core-torl[vllm]'"
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("merged", "lora")


def vllm_version() -> str | None:
    """vLLM's version as its package states it; None where vLLM is not installed, "unknown" where it says nothing."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("_version.py")
    found = re.search(r"version = ['\"]([^'\"]+)['\"]", file.read_text()) if file.is_file() else None
    return found[1] if found else "unknown"


def check_vllm() -> str:
    """The installed version. Raises UserError, with the command that installs a right one, where there is none."""
    version = vllm_version()
    first, end = (".".join(map(str, v)) for v in TESTED_VLLM)
    if version is None:
        raise UserError(
            f"sampler: vLLM is not installed; {INSTALL_VLLM} (>={first},<{end}), or use sampler=transformers"
        )
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or not TESTED_VLLM[0] <= (int(numbers[1]), int(numbers[2])) < TESTED_VLLM[1]:
        raise UserError(
            f"sampler: vLLM {version} was never tested here; {INSTALL_VLLM} (>={first},<{end}), or use "
            "sampler=transformers"
        )
    return version


def check_choices(*, weights: str, sleep_level: int, gpu_memory_utilization: float, max_rows: int) -> None:
    """What can be said about single values of ``sampler=vllm``. Raises UserError."""
    if weights not in WEIGHTS:
        raise UserError(f"sampler.weights={weights!r}: use {' or '.join(WEIGHTS)}.{nearest(weights, WEIGHTS)}")
    if sleep_level not in (0, 1, 2):
        raise UserError(f"sampler.sleep_level={sleep_level}: use 0 (never), 1 (weights to host memory) or 2 (dropped)")
    if not 0 < gpu_memory_utilization <= 1:
        raise UserError(f"sampler.gpu_memory_utilization={gpu_memory_utilization}: a share of the device, in (0, 1]")
    if max_rows < 1:
        raise UserError(f"sampler.max_rows={max_rows}: must be at least 1")


def check_vllm_sampler(cfg: DictConfig) -> None:
    """Everything that can be said about ``sampler=vllm`` in a composed config; nothing for other samplers."""
    sampler = cfg.sampler
    if not sampler._target_.endswith(".VllmSampler"):
        return
    if not cfg.get("dry_run"):  # which runs anywhere, and says what is missing
        check_vllm()
    check_choices(
        weights=sampler.weights, sleep_level=sampler.sleep_level, max_rows=sampler.max_rows,
        gpu_memory_utilization=sampler.gpu_memory_utilization,
    )  # fmt: skip
    if sampler.weights == "lora" and not OmegaConf.select(cfg, "model.lora.rank"):
        raise UserError("sampler.weights=lora without adapters: set model.lora.rank, or sampler.weights=merged")
    for key in ("max_model_len", "block_size", "kv_cache_mb"):
        if sampler[key] is not None and sampler[key] < 1:
            raise UserError(f"sampler.{key}={sampler[key]}: must be at least 1, or null")
    if sampler.dtype is not None:
        check_dtype(sampler.dtype)
    check_room(cfg)
    if cfg.trainer.accelerator == "cuda" and OmegaConf.select(cfg, "variant.overlap"):
        raise UserError(
            "variant.overlap=true with sampler=vllm: engine and trainer share a GPU, so that neither would be faster; "
            "use sampler=vllm_server with GPUs of its own"
        )


def check_dtype(dtype: str) -> None:
    """The number format of an engine. Raises UserError."""
    if dtype not in DTYPES:
        raise UserError(f"sampler.dtype={dtype!r}: use {', '.join(DTYPES)}, or null.{nearest(dtype, DTYPES)}")


def check_room(cfg: DictConfig) -> None:
    """The engine must take the longest prompt and the longest answer together. Raises UserError."""
    room, prompt, answer = cfg.sampler.max_model_len, cfg.model.max_prompt_tokens, cfg.sampler.max_new_tokens
    if room is not None and room < prompt + answer:
        raise UserError(
            f"sampler.max_model_len={room} is for prompt and answer together, model.max_prompt_tokens={prompt} and "
            f"sampler.max_new_tokens={answer}: set it to {prompt + answer} at least, or lower one of these"
        )
