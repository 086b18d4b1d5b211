"""Sampling with a vLLM engine in the trainer's process: for models and answers too long for the embedded samplers.

The engine has weights of its own. It starts without any, takes the trainer's in ``sync`` and refuses to sample before
the first one. ``weights="merged"`` hands over whole matrices with LoRA adapters merged in; ``"lora"`` hands over the
adapters alone and leaves the base weights as they were at the start.

Where it differs from the embedded samplers: draws come from vLLM's own generators, so the same seed gives other
answers than there; log-probs agree with the trainer's forward to rounding only, since kernels differ; with several of
top_k, top_p and min_p at once vLLM applies min_p first, and we last; rows of the model's vocabulary that no token of
the tokenizer stands for are never drawn. On a GPU the engine can ``sleep`` while the trainer works: level 1 moves its
weights to host memory, level 2 drops them, and then there is nothing to sample from until the next ``sync``.

vLLM binds the process's memory to one NUMA node on the CPU; this alone cannot be undone (see vllm_install for what is).
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core_torl.config.errors import UserError
from core_torl.config.vllm_checks import check_choices
from core_torl.sampler.checks import check_requests
from core_torl.sampler.protocol import SampleRequest, SamplingConfig, Session, Weights
from core_torl.sampler.transformers import find_eos_ids
from core_torl.sampler.vllm_engine import Engine, EngineSettings
from core_torl.sampler.vllm_engine_session import EngineSession
from core_torl.trajectory import Sample

_PEFT = "base_model.model."  # what peft puts before the names of the model that it wraps


class VllmSampler:
    """See core_torl.sampler.protocol for what a sampler promises, and this module's first lines for what differs.

    ``max_rows`` bounds how many answers grow side by side; others wait in vLLM's queue. ``max_model_len`` bounds prompt
    and answer together, None: what the model allows. ``dtype`` None: that of the trainer's weights. ``sleep_level`` 0
    never sleeps. See EngineSettings for ``block_size`` and ``kv_cache_mb``. ``seed`` is the engine's own; answers have
    theirs.

    Raises:
        UserError: vLLM is missing, cannot start, or a value is out of range; one line that names the key and the fix.
    """

    own_weights = True  # they can be out of date

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_new_tokens: int = 64,
        max_rows: int = 256,
        stop: Sequence[str] = (),
        eos_ids: Sequence[int] | None = None,
        weights: str = "merged",
        dtype: str | None = None,
        max_model_len: int | None = None,
        block_size: int | None = None,
        gpu_memory_utilization: float = 0.4,
        kv_cache_mb: int | None = None,
        enforce_eager: bool = False,
        sleep_level: int = 1,
        seed: int = 0,
    ) -> None:
        check_choices(
            weights=weights, sleep_level=sleep_level, gpu_memory_utilization=gpu_memory_utilization, max_rows=max_rows
        )
        self.sampling = SamplingConfig(max_new_tokens, temperature, top_p, top_k, min_p, stop=tuple(stop))
        self.model, self.tokenizer, self.weights, self.sleep_level = model, tokenizer, weights, sleep_level
        self.eos_ids = sorted(set(eos_ids) if eos_ids is not None else find_eos_ids(model, tokenizer))
        self.version: str | None = None  # None: the engine's weights are noise
        self.asleep = False
        self._base_loaded, self._adapters = False, 0
        self._adapter_folder: Path | None = None
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        device = base.device
        self.engine = Engine(
            config, tokenizer,
            EngineSettings(
                dtype=dtype or str(base.dtype).removeprefix("torch."), device=str(device), max_model_len=max_model_len,
                block_size=block_size, gpu_memory_utilization=gpu_memory_utilization, kv_cache_mb=kv_cache_mb,
                max_rows=max_rows, enforce_eager=enforce_eager, sleep=sleep_level > 0, seed=seed,
                lora_rank=lora_rank(model) if weights == "lora" else 0, real_tokens=len(tokenizer),
            ),
        )  # fmt: skip

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and answer may take together."""
        return self.engine.max_model_len

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> list[list[Sample]]:
        with self.session(requests, sampling) as session:
            while session.running:
                session.advance()
            rows = iter(range(sum(r.n for r in requests)))
            return [[session.answer(next(rows)) for _ in range(r.n)] for r in requests]

    @contextmanager
    def session(self, requests: Sequence[SampleRequest], sampling: SamplingConfig | None = None) -> Iterator[Session]:
        """Answers that can be interrupted and resumed; no ``sync`` before the block is left.

        A resumed answer goes on in a stream of draws of its own, made from (seed, place, tokens so far).
        """
        sampling = sampling or self.sampling
        check_requests(requests, sampling, self.engine.max_model_len)
        self.wake()
        if self.version is None:
            raise RuntimeError("sampler=vllm has no weights yet: call sync first")
        session = EngineSession(self.engine, requests, sampling, self.eos_ids)
        try:
            yield session
        finally:
            session.close()

    def sync(self, weights: Weights, version: str) -> None:
        """Copy the trainer's weights into the engine and drop what was computed with older ones.

        While it runs, and after an error in it, the engine is one that has no weights yet.
        """
        self.version = None
        if self.asleep:
            self.engine.wake("weights")  # keys and values only once weights have been gathered: less memory at once
        if self.weights == "merged":
            self.engine.load(weights.merged())
        else:
            self._sync_adapter(weights)
        if self.asleep:
            self.engine.wake("kv_cache")
            self.asleep = False
        self.engine.renew(version)
        self.version = version

    def _sync_adapter(self, weights: Weights) -> None:
        if not self._base_loaded:
            self.engine.load(base_weights(self.model))
            self._base_loaded = True
        folder, before = Path(tempfile.mkdtemp(prefix="core-torl-adapter-")), self._adapter_folder
        try:
            weights.save_adapter(folder)
            self._adapters += 1
            self.engine.load_adapter(folder, self._adapters)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._adapter_folder = folder
        if before is not None:
            shutil.rmtree(before)

    def sleep(self) -> None:
        """On a GPU: give memory back. At level 2 the weights are gone, so that ``generate`` waits for a ``sync``."""
        if self.sleep_level == 0 or self.asleep or not self.engine.settings.device.startswith("cuda"):
            return
        self.engine.sleep(self.sleep_level)
        self.asleep = True
        if self.sleep_level == 2:
            self.version, self._base_loaded = None, False

    def wake(self) -> None:
        if self.asleep:
            self.engine.wake()
            self.asleep = False

    def close(self) -> None:
        """Free the engine's memory and its folders. May be called twice."""
        self.version = None
        self.engine.close()
        if self._adapter_folder is not None:
            shutil.rmtree(self._adapter_folder, ignore_errors=True)


def lora_rank(model: Any) -> int:
    """The largest rank among a model's LoRA adapters. Raises UserError for a model without them."""
    ranks = [config.r for config in getattr(model, "peft_config", {}).values()]
    if not ranks:
        raise UserError("sampler.weights=lora: the model has no adapters; set model.lora.rank, or use merged")
    return max(ranks)


@torch.no_grad()
def base_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What LoRA adapters stand on, under the base model's names, whole, one tensor at a time."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            tensor: Any = parameter.detach()
            plain = name.removeprefix(_PEFT).replace(".base_layer.", ".")
            yield plain, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
