"""One vLLM engine in this process, with weights of its own that are handed over as tensors.

The engine starts from a folder that holds a config and a tokenizer and no weights; what it starts with is noise until
``load`` is called. Everything here speaks to vLLM's ``LLMEngine``, the class below its ``LLM``: a session adds requests
while others run, which ``LLM`` cannot do.

The engine never shares its model with another device. Ranks of a data-parallel run have one each, on their own device,
and the engines know nothing of each other. The process group that vLLM insists on is therefore of one process, and is
taken down at once (see vllm_install.undisturbed): the engine of a rank is built before Lightning starts the ranks'
group, and the first rank's even before there are other ranks.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_torl.config.errors import UserError, causes
from core_torl.sampler.vllm_install import import_vllm, part, same_draws, undisturbed

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's own steps
_CPU_CACHE_MB = 512  # vLLM's default is a share of the machine's memory, which fails where others need some of it


@dataclass(frozen=True)
class EngineSettings:
    """``kv_cache_mb`` None: what ``gpu_memory_utilization`` of the device leaves; on the CPU 512.

    ``block_size`` None: vLLM's own on a GPU; on the CPU 32, where vLLM's own of 128 shares no short prompt.
    ``lora_rank`` 0: no adapters. ``real_tokens`` is the number of tokens that the tokenizer knows: rows of the
    vocabulary beyond it are padding, and never drawn.
    """

    dtype: str
    device: str
    max_model_len: int | None
    block_size: int | None
    gpu_memory_utilization: float
    kv_cache_mb: int | None
    max_rows: int
    enforce_eager: bool
    sleep: bool
    lora_rank: int
    real_tokens: int
    seed: int

    def arguments(self, folder: Path) -> dict[str, Any]:
        """The same in vLLM's words (EngineArgs)."""
        on_cpu = self.device == "cpu"
        cache_mb = self.kv_cache_mb if self.kv_cache_mb is not None or not on_cpu else _CPU_CACHE_MB
        arguments: dict[str, Any] = {
            "model": str(folder), "dtype": self.dtype, "load_format": "dummy", "generation_config": "vllm",
            "max_model_len": self.max_model_len, "max_num_seqs": self.max_rows, "enforce_eager": self.enforce_eager,
            "gpu_memory_utilization": self.gpu_memory_utilization, "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True, "disable_log_stats": True, "seed": self.seed,
            "enable_sleep_mode": self.sleep and not on_cpu, "distributed_executor_backend": "uni",
        }  # fmt: skip
        if on_cpu:  # a prompt read in pieces makes a seeded row step back in its generator, which fails on the CPU
            arguments["enable_chunked_prefill"] = False
        if cache_mb is not None:
            arguments["kv_cache_memory_bytes"] = cache_mb << 20
        if self.block_size is not None or on_cpu:
            arguments["block_size"] = self.block_size or 32
        if self.lora_rank:
            rank = next((r for r in _LORA_RANKS if r >= self.lora_rank), self.lora_rank)
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 2}
        return arguments


class Engine:
    """See the module's first lines. ``close`` gives its memory back."""

    def __init__(self, config: Any, tokenizer: Any, settings: EngineSettings) -> None:
        """``config``: the model's transformers config, its ``architectures`` set.

        Raises:
            UserError: vLLM is missing or cannot start; one line that names the keys to change.
        """
        self.settings = settings
        self.finished: dict[str, Any] = {}  # request -> vLLM's CompletionOutput, until somebody takes it
        self._names = 0
        self._adapter: Any = None
        self._folder = Path(tempfile.mkdtemp(prefix="core-torl-vllm-"))
        try:
            config.save_pretrained(self._folder)
            tokenizer.save_pretrained(self._folder)
            with undisturbed(), _one_line_errors():
                import_vllm()
                self._engine: Any = self._start()
                self._prove()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _start(self) -> Any:
        executor = part("v1.executor.uniproc_executor").UniProcExecutor
        config = part("engine.arg_utils").EngineArgs(**self.settings.arguments(self._folder)).create_engine_config()
        if config.model_config.get_vocab_size() > self.settings.real_tokens:
            config.model_config.logits_processors = [_padding_processor(self.settings.real_tokens)]
        if ":" in self.settings.device:  # each rank on the device that its trainer uses
            config.device_config.device = torch.device(self.settings.device)
        if self.settings.device == "cpu":
            _without_compilation()
        _keep_groups()
        engine = part("v1.engine.llm_engine").LLMEngine(config, executor, log_stats=False, multiprocess_mode=False)
        self.max_model_len = int(config.model_config.max_model_len)
        return engine

    def _prove(self) -> None:
        """Draw one token of noise: a kernel that cannot work with this model says so only then."""
        name = self.add([0], {"max_tokens": 1, "ignore_eos": True, "detokenize": False, "logprobs": 0}, seed=0)
        while self.busy:
            self.step()
        self.abort([name])
        self.forget()

    def add(self, prompt_ids: Sequence[int], parameters: Mapping[str, Any], seed: int) -> str:
        """Queue one answer, with parameters as vllm_params.sampling_parameters gives them; returns its name."""
        self._names += 1
        name = str(self._names)
        asked = part("sampling_params")
        sampling = asked.SamplingParams(
            **parameters, seed=seed, n=1, flat_logprobs=True, output_kind=asked.RequestOutputKind.FINAL_ONLY
        )
        self._engine.add_request(name, {"prompt_token_ids": list(prompt_ids)}, sampling, lora_request=self._adapter)
        return name

    @property
    def busy(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> None:
        """One token for each answer that runs; those that have ended come to stand in ``finished``."""
        with same_draws(), torch.autocast(self._kind, enabled=False):
            for output in self._engine.step():
                self.finished[output.request_id] = output.outputs[0]

    @property
    def _kind(self) -> str:
        return self.settings.device.partition(":")[0]

    def abort(self, names: Iterable[str]) -> None:
        """Give up answers, whether they run or have ended. Their names may not be used again."""
        names = list(names)
        self._engine.abort_request([n for n in names if n not in self.finished])
        for name in names:
            self.finished.pop(name, None)

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Take over all weights, under their Hugging Face names. To be followed by ``renew``."""
        with undisturbed(), torch.autocast(self._kind, enabled=False):
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
            if self._kind == "cpu":
                self._engine.apply_model(_pack_tied_head)

    def load_adapter(self, folder: Path, number: int) -> None:
        """Use the LoRA adapters in ``folder`` from now on. vLLM knows adapters by number: take a new one each time.

        Files that change under a number that vLLM knows already would not be read.
        """
        request = part("lora.request").LoRARequest(f"adapter-{number}", number, str(folder))
        before, self._adapter = self._adapter, request
        with undisturbed():
            self._engine.add_lora(self._adapter)
            if before is not None:
                self._engine.remove_lora(before.lora_int_id)

    def renew(self, version: str) -> None:
        """Forget keys and values of earlier weights, and mark what is drawn from now on with ``version``.

        Raises RuntimeError if answers are in progress: they would be made of two policies.
        """
        if not self.forget():
            raise RuntimeError("sampler: new weights while answers are in progress; leave their session first")
        self._engine.set_weight_version(version)

    def forget(self) -> bool:
        """Empty the prefix cache; False if answers in progress hold on to it."""
        return bool(self._engine.reset_prefix_cache())

    def sleep(self, level: int) -> None:
        self._engine.sleep(level)

    def wake(self, *parts: str) -> None:
        """``parts``: "weights", "kv_cache", or nothing for both."""
        self._engine.wake_up(list(parts) or None)

    def close(self) -> None:
        """Stop the engine and free its memory and its folder. May be called twice."""
        engine, self._engine = getattr(self, "_engine", None), None
        self.finished.clear()
        if engine is not None:
            with undisturbed():
                engine.engine_core.shutdown()
            del engine
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What vLLM says on many lines when it cannot start, on one, with the keys that help."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError, NotImplementedError, AssertionError, OSError, ImportError) as error:
        said = " ".join(str(list(causes(error))[-1]).split())[:300]
        low = said.lower()
        if "memory" in low or "kv cache" in low or isinstance(error, torch.OutOfMemoryError):
            fix = (
                "change sampler.gpu_memory_utilization or sampler.kv_cache_mb, or lower sampler.max_model_len or "
                "sampler.max_rows"
            )
            raise UserError(f"sampler: vLLM finds no room: {fix} ({said})") from error
        if "max_model_len" in low or "max_num" in low or "block" in low or "lora" in low:
            fix = "check sampler.max_model_len, sampler.max_rows, sampler.block_size and model.lora"
            raise UserError(f"sampler: vLLM refuses its settings: {fix} ({said})") from error
        raise UserError(f"sampler: vLLM cannot run this model; use sampler=transformers ({said})") from error


def _padding_processor(real_tokens: int) -> type:
    """A logits processor that forbids rows of the vocabulary which no token stands for."""

    class Padding(part("v1.sample.logits_processor").LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            del vllm_config, device, is_pin_memory

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            del batch_update

        def apply(self, logits: Tensor) -> Tensor:
            logits[:, real_tokens:] = -torch.inf
            return logits

    return Padding


def _pack_tied_head(model: Any) -> None:
    """On the CPU an output layer multiplies by a packed copy of its weights, which a reload renews where it loads.

    One that is tied to the embedding loads nothing and would keep its first copy.
    """
    head: Any = getattr(model, "lm_head", None)
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(head, "quant_method"):
        head.quant_method.process_weights_after_loading(head)


def _keep_groups() -> None:
    """A later engine of this process takes the one-process groups of the first, which torch no longer knows."""
    world = part("distributed.parallel_state")._WORLD
    if world is not None:
        world.backend = part("platforms").current_platform.dist_backend  # else it asks torch for it


def _without_compilation() -> None:
    """On the CPU vLLM compiles, for seconds, a sum that ranks log-probs; nobody asks for ranks here."""
    sampler = part("v1.sample.sampler")
    plain = getattr(sampler.batched_count_greater_than, "_torchdynamo_orig_callable", None)
    if plain is not None:
        sampler.batched_count_greater_than = plain
