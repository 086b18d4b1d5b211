"""What makes two runs the same: everything in their config but where they write, what they show and how fast they are.

A sweep knows its jobs by this and not by the names of their folders, so that a job keeps its folder when another seed
is added in front of it, and is never mistaken for one with other settings. Files that a config names count with their
size and age: a policy that was made again under its old path is another input.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

# Groups and keys that say where a run writes, how it is watched and from where it goes on.
PLACES = ("paths", "logger", "callbacks", "resume", "reproduces", "trusted_targets")
# Keys, in whatever group, that change how fast or on what a run computes, and not what.
SPEED = (
    "microbatch_size", "microbatch_tokens", "share_prompts", "skip_zero_advantage", "engine", "max_rows", "workers",
    "wall_timeout_s", "gradient_checkpointing", "offload_reference", "recycle_after", "retries", "url", "concurrency",
    "allow_unsafe", "backoff_s", "suspicion", "copy_weights", "accelerator", "devices", "num_nodes", "strategy",
    "threads",
    "max_model_len", "block_size", "gpu_memory_utilization", "kv_cache_mb", "enforce_eager", "sleep_level",
)  # fmt: skip
# The same of the sampler's keys alone: which servers, where they are, how long they are waited for. A run whose server
# has died goes on with another one.
SERVERS = (
    "urls", "replicas", "sync_dir", "timeout_s", "start_timeout_s", "gpus", "port", "tensor_parallel", "data_parallel",
    "colocated", "log_dir",
)  # fmt: skip
THIS_RUN = "<this run>"  # stands for the run's own folder
_INPUTS = ("path", "test_path", "checkpoint", "init")
_SUFFIXES = (".safetensors", ".bin", ".json", ".jsonl", ".parquet", ".ckpt")


def identity(cfg: DictConfig, folder: str = THIS_RUN, whole: bool = False) -> str:
    """Sixteen hexadecimal digits for a composed config, the same for equal values however they were given.

    Interpolations are resolved; the run's own ``folder`` counts as one word wherever it is named. ``whole``: how fast
    it is and what it shows count too. Raises omegaconf's errors for an interpolation that leads nowhere.
    """
    plain = copy.deepcopy(cfg)
    with read_write(plain), open_dict(plain):
        if "output_dir" in (plain.get("paths") or {}):
            plain.paths.output_dir = THIS_RUN
    tree: Any = OmegaConf.to_container(plain, resolve=True)
    left_out = ("paths", "resume", "reproduces") if whole else PLACES
    kept = {key: value for key, value in tree.items() if key not in left_out}
    if not whole and "sampler" in kept:
        kept["sampler"] = {k: v for k, v in kept["sampler"].items() if k not in SERVERS}
    if whole and "logger" in kept:
        kept["logger"] = {k: v for k, v in kept["logger"].items() if k != "group"}  # a launcher may set it
    text = json.dumps(_plain(kept, folder, whole), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any, folder: str, whole: bool) -> Any:
    if isinstance(value, dict):
        items = {k: v for k, v in value.items() if whole or k not in SPEED}
        return {k: _plain(v, folder, whole) for k, v in items.items()} | {
            f"{k} on disk": stamp for k, v in items.items() if k in _INPUTS and (stamp := _stamp(v))
        }
    if isinstance(value, list):
        return [_plain(v, folder, whole) for v in value]
    return value.replace(folder, THIS_RUN) if isinstance(value, str) else value


def _stamp(path: Any) -> list[tuple[str, int, int]]:
    """Name, size and age of a local file, or of a folder's files of data and weights; [] for anything else."""
    if not isinstance(path, str) or not os.path.exists(path):
        return []
    top = Path(path)
    files = [top] if top.is_file() else [p for d in (top, top / "checkpoints") if d.is_dir() for p in d.iterdir()]
    # What a run says about itself is no input, and changes while it is used.
    chosen = [p for p in sorted(files) if p.is_file() and p.suffix in _SUFFIXES and p.name not in ("run.json",)]
    return [(p.name, (stat := p.stat()).st_size, stat.st_mtime_ns) for p in chosen]
