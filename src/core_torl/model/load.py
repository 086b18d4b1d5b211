"""Loading a policy from a folder, a hub id or the shipped tiny one; adapting it with LoRA; saving it for others.

``Policy`` keeps model, tokenizer and the reference policy together. The reference is the policy as it was loaded: with
LoRA it is the same weights with the adapters off, otherwise a frozen copy that is only made if somebody asks for it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from core_torl.model.quantize import check_quantization, dequantized, nf4
from core_torl.model.sharding import evaluating, is_sharded, shard_like, whole

SHIPPED = "shipped:"
_PEFT = "base_model.model."  # what peft puts before the names of the model that it wraps
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Policy:
    """A causal language model that can be trained, and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    adapted: bool  # trained through LoRA adapters
    offload: bool = False  # a frozen copy lies in the CPU's memory between uses

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)  # pyright: ignore[reportArgumentType]

    def frozen_copy(self) -> Any | None:
        """A copy without gradient to serve as reference; None with LoRA, whose base weights are the reference."""
        if self.adapted:
            return None
        # Copied to where it will rest, never twice on the device.
        rests = {
            id(p): nn.Parameter(placed(p.detach(), "cpu").clone()) for p in self.model.parameters() if self.offload
        }
        return copy.deepcopy(self.model, rests).eval().requires_grad_(False)

    @contextmanager
    def at_hand(self, frozen: Any | None) -> Iterator[None]:
        """Inside, the weights of a frozen copy stand where the policy computes; see ``offload``.

        They are not written to, so that leaving only forgets the copy that was made. A sharded one travels by itself.
        """
        if frozen is None or frozen is self.model or self.adapted or not self.offload or is_sharded(frozen):
            yield
            return
        resting = [(parameter, parameter.data) for parameter in frozen.parameters()]
        try:
            for parameter, data in resting:
                parameter.data = placed(data, self.model.device)
            yield
        finally:
            for parameter, data in resting:
                parameter.data = data

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def eos_id(self) -> int:
        """The token that ends an answer. Raises ValueError for a tokenizer without one."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError("model: the tokenizer has no end-of-sequence token, which given answers need")
        return int(self.tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]

    def shadow(self) -> Any:
        """A frozen copy with trained weights of its own; what is not trained is shared, not copied."""
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        return copy.deepcopy(self.model, shared).eval().requires_grad_(False)

    @torch.no_grad()
    def refresh(self, shadow: Any) -> None:
        """Give a shadow the weights of today."""
        if is_sharded(shadow):
            shadow.reshard()  # its head may still be gathered
        twins = dict(shadow.named_parameters())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                twins[name].data.copy_(parameter.data)

    @contextmanager
    def reference(self, frozen: Any | None) -> Iterator[Any]:
        """The reference model: ``frozen``, or this model with its adapters off. No dropout inside."""
        model = self.model if frozen is None else frozen
        with evaluating(model), self.at_hand(frozen), adapters_off(model) if frozen is None else nullcontext():
            yield model

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors under the base model's names, adapters merged, one at a time (see sampler.protocol.Weights).

        Only one merged matrix exists at a time: a copy of all weights would not fit beside a large model.
        """
        adapters = {n.removeprefix(_PEFT): m for n, m in self.model.named_modules() if hasattr(m, "get_delta_weight")}
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                continue
            plain = name.removeprefix(_PEFT).replace(".base_layer.", ".")
            tensor = dequantized(whole(parameter.detach()), parameter)
            adapter = adapters.get(plain.removesuffix(".weight"))
            if adapter is not None and plain.endswith(".weight"):
                total = tensor.float()
                for active in adapter.active_adapters:
                    total = total + whole(adapter.get_delta_weight(active)).float()
                tensor = total.to(tensor.dtype)
            yield plain, tensor

    def save_adapter(self, folder: Path) -> None:
        """Write the LoRA adapters as peft does. Raises ValueError for a policy without them."""
        if not self.adapted:
            raise ValueError("model.lora.rank=0: there are no adapters for the sampler; use sampler.weights=merged")
        state = {name: whole(tensor) for name, tensor in self.trainable_state().items()}
        self.model.save_pretrained(folder, state_dict=state)

    def trainable_state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep: all weights, or only the adapters."""
        state = self.model.state_dict()
        if not self.adapted:
            return state
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``trainable_state`` returned. Raises ValueError if names or shapes do not fit."""
        own = self.trainable_state()
        wrong = sorted(set(own) ^ set(state)) or sorted(n for n in own if own[n].shape != state[n].shape)
        if wrong:
            raise ValueError(
                f"the checkpoint's weights do not fit this model ({wrong[0]} and {len(wrong) - 1} more): check model.*"
            )
        shares = {name: shard_like(tensor, own[name]) for name, tensor in state.items()}
        self.model.load_state_dict(shares, strict=not self.adapted)

    def export(self, folder: Path, write: bool = True) -> None:
        """Save model and tokenizer so that plain transformers loads them; adapters are merged, and kept beside.

        Every rank has to ask where weights are sharded; only those with ``write`` write.
        """
        sharded = is_sharded(self.model)
        if not (write or sharded):
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.adapted or sharded):
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            return
        merged = {}
        for name, tensor in self.merged():  # to the end on every rank
            if write:
                merged[name] = tensor.cpu()
        adapter = {name: whole(tensor) for name, tensor in self.trainable_state().items()} if self.adapted else {}
        if not write:
            return
        if self.adapted:
            self.model.save_pretrained(folder / "adapter", state_dict=adapter)
        plain = self.model.get_base_model() if self.adapted else self.model
        config = copy.deepcopy(plain.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):  # names and config of the model, without weights
            skeleton = AutoModelForCausalLM.from_config(config, dtype=next(iter(merged.values())).dtype)
        skeleton.generation_config = plain.generation_config
        skeleton.save_pretrained(folder, state_dict=merged)
        self.tokenizer.save_pretrained(folder)


def placed(tensor: Tensor, device: Any) -> Tensor:
    """The tensor on ``device``."""
    return tensor.to(device)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The base model that LoRA adapters stand on.

    peft's own switch also turns off ``requires_grad`` of the adapters, which sharded parameters would remember.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def shipped_folder(name: str) -> Path:
    """Folder of a policy that is part of this package. Raises ValueError naming the known ones."""
    root = Path(__file__).parent / "shipped"
    if not (root / name / "config.json").is_file():
        known = sorted(p.parent.name for p in root.glob("*/config.json"))
        raise ValueError(f"model.path={SHIPPED}{name}: no such shipped policy (known: {', '.join(known)})")
    return root / name


def load_policy(
    *,
    path: str,
    revision: str | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    gradient_checkpointing: bool = False,
    lora: Mapping[str, Any] | None = None,
    quantization: str | None = None,
    offload_reference: bool = False,
    device: torch.device | str = "cpu",
    **_not_for_loading: Any,
) -> Policy:
    """Load model and tokenizer. ``lora``: rank (0: none), alpha, dropout, target_modules.

    ``quantization``: "nf4" keeps the frozen weights under LoRA in 4 bits (QLoRA). ``offload_reference``: a frozen copy
    of the policy lies in the CPU's memory between uses.

    Prompt and length settings of the model group are read elsewhere and ignored here. Raises ValueError, on one line,
    for an unknown dtype, a missing folder, or a hub id that cannot be reached.
    """
    check_model(path=path, dtype=dtype, attention=attention)
    check_quantization(quantization, int(lora["rank"]) if lora else 0)
    source = str(shipped_folder(path.removeprefix(SHIPPED))) if path.startswith(SHIPPED) else path
    # A folder is read as a folder: transformers must not ask a hub for files that it lacks.
    options: dict[str, Any] = {"local_files_only": True} if os.path.isdir(source) else {"revision": revision}
    packed = nf4(device, DTYPES[dtype]) if quantization else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], attn_implementation=attention, **options, **packed
        )
    except (OSError, ValueError) as error:  # a tokenizer that cannot be built is a ValueError of several lines
        first = str(error).splitlines()[0]
        raise ValueError(
            f"model.path={path}: transformers cannot load it ({first}); give a folder, or go online for a hub id"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not quantization:  # packed weights are put where they belong as they are read
        model = model.to(device)  # pyright: ignore[reportArgumentType] (a decorator hides the signature)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted = bool(lora and lora["rank"] > 0)
    if adapted and lora:
        from peft import LoraConfig, get_peft_model

        targets = lora["target_modules"]
        settings = LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], task_type="CAUSAL_LM",
            target_modules=targets if isinstance(targets, str) else list(targets),
        )  # fmt: skip
        if gradient_checkpointing:
            model.enable_input_require_grads()
        model = get_peft_model(model, settings)
    return Policy(model=model, tokenizer=tokenizer, adapted=adapted, offload=offload_reference)


def check_model(*, path: str, dtype: str, attention: str) -> None:
    """What can be said about a model's settings without loading it; raises ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    if attention not in ("sdpa", "eager", "flash_attention_2"):
        raise ValueError(f"model.attention={attention!r}: use sdpa, eager or flash_attention_2")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if path.startswith(SHIPPED):
        shipped_folder(path.removeprefix(SHIPPED))
    elif looks_local and os.path.isfile(os.path.join(path, "adapter_config.json")):
        base = json.loads(Path(path, "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise ValueError(
            f"model.path={path}: LoRA adapters of {base}, not a model; give the folder in which they are merged (a run "
            "exports both: policy and policy/adapter)"
        )
    elif looks_local and not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"model.path={path}: no config.json there; give a folder made by save_pretrained, or a hub id")
