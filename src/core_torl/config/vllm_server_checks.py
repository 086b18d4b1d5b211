"""What can be said about ``sampler=vllm_server`` without a server, a model or vLLM."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from core_torl.config.errors import UserError, nearest
from core_torl.config.vllm_checks import WEIGHTS, check_dtype, check_room, check_vllm


def check_url(url: str) -> None:
    """Raises UserError for what is no ``http://HOST:PORT``."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        right = right and not parts.path.strip("/") and not parts.query
    except ValueError:  # a port that is no number
        right = False
    if not right:
        raise UserError(f"sampler.urls: {url!r} is no address of a server; write http://HOST:PORT, without a path")


def is_local(url: str) -> bool:
    """Whether a server at ``url`` runs on this machine, as far as the address tells."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def check_servers(
    *, urls: Sequence[str], replicas: int, gpus: Sequence[str], weights: str, dtype: str | None, sync_dir: str | None
) -> None:
    """Which servers, and how weights reach them. Raises UserError."""
    if dtype is not None:
        check_dtype(dtype)
    if weights not in WEIGHTS:
        raise UserError(f"sampler.weights={weights!r}: use {' or '.join(WEIGHTS)}.{nearest(weights, WEIGHTS)}")
    if replicas < 1:
        raise UserError(f"sampler.replicas={replicas}: must be at least 1")
    for url in urls:
        check_url(url)
    if len({u.rstrip("/") for u in urls}) < len(urls):
        raise UserError(f"sampler.urls={list(urls)}: a server is named twice")
    if urls and (replicas > 1 or gpus):
        raise UserError(
            "sampler.urls and sampler.replicas: servers at urls run already, replicas are started by the run; give one "
            "of the two (and sampler.gpus with replicas alone)"
        )
    if gpus and len(gpus) != replicas:
        raise UserError(
            f"sampler.gpus={list(gpus)}: one entry for each of sampler.replicas={replicas}, as '0' or '0,1' each"
        )
    far = [u for u in urls if not is_local(u)]
    if far and sync_dir is None:
        raise UserError(
            f"sampler.sync_dir has no value: {far[0]} is another machine; give a folder that it and this one both see"
        )
    if sync_dir is not None:
        check_folder(sync_dir)


def check_folder(sync_dir: str) -> None:
    """Raises UserError if nothing can be written to ``sync_dir``, which is made if it is not there."""
    try:
        Path(sync_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=sync_dir):
            pass
    except OSError as error:
        raise UserError(f"sampler.sync_dir={sync_dir}: cannot be written ({error.strerror}); give another") from error


def check_own_servers(cfg: DictConfig) -> None:
    """Where servers that the run starts find room. Raises UserError."""
    if cfg.trainer.num_nodes > 1:
        raise UserError(
            f"sampler.urls has no value with trainer.num_nodes={cfg.trainer.num_nodes}: servers that the run starts "
            "listen on one machine alone; start servers yourself and name them in sampler.urls"
        )
    if cfg.trainer.accelerator == "cuda" and not cfg.sampler.gpus and not cfg.sampler.colocated:
        raise UserError(
            "sampler.gpus has no value: the trainer is on a GPU and the servers need others, as sampler.gpus=['1'] "
            "with one entry for each server; to share the trainer's, set sampler.colocated=true and a smaller "
            "sampler.gpu_memory_utilization"
        )


def check_vllm_server(cfg: DictConfig) -> None:
    """Everything that can be said about ``sampler=vllm_server`` in a composed config; nothing for other samplers."""
    sampler = cfg.sampler
    if not sampler._target_.endswith(".VllmServerSampler"):
        return
    check_servers(
        urls=sampler.urls, replicas=sampler.replicas, gpus=sampler.gpus, weights=sampler.weights,
        dtype=sampler.dtype, sync_dir=sampler.sync_dir,
    )  # fmt: skip
    if not sampler.urls and not cfg.get("dry_run"):
        check_vllm()
    if not sampler.urls:
        check_own_servers(cfg)
    check_room(cfg)
    if sampler.colocated and OmegaConf.select(cfg, "variant.overlap"):
        raise UserError(
            "variant.overlap=true with sampler.colocated=true: servers and trainer share GPUs, so that neither "
            "would be faster; set sampler.colocated=false and sampler.gpus"
        )
    if sampler.weights == "lora" and not OmegaConf.select(cfg, "model.lora.rank"):
        raise UserError("sampler.weights=lora without adapters: set model.lora.rank, or sampler.weights=merged")
    counts = ("concurrency", "tensor_parallel", "data_parallel", "max_model_len", "block_size", "kv_cache_mb", "port")
    for key in counts:
        if sampler[key] is not None and sampler[key] < 1:
            raise UserError(f"sampler.{key}={sampler[key]}: must be at least 1")
    for key in ("retries", "backoff_s"):
        if sampler[key] < 0:
            raise UserError(f"sampler.{key}={sampler[key]}: must be 0 or more")
    for key in ("timeout_s", "start_timeout_s"):
        if not sampler[key] > 0:
            raise UserError(f"sampler.{key}={sampler[key]}: must be more than 0 seconds")
    if not 0 < sampler.gpu_memory_utilization <= 1:
        raise UserError(
            f"sampler.gpu_memory_utilization={sampler.gpu_memory_utilization}: a share of the device, in (0, 1]"
        )
    if sampler.colocated and sampler.urls:
        raise UserError(
            "sampler.colocated with sampler.urls: only servers that the run starts share its GPUs; set it to false"
        )
    if sampler.max_model_len is not None and sampler.max_model_len <= sampler.max_new_tokens:
        raise UserError(
            f"sampler.max_model_len={sampler.max_model_len} is for prompt and answer together: it must exceed "
            f"sampler.max_new_tokens={sampler.max_new_tokens}"
        )
