"""Loading a policy from a folder, a hub id or the shipped tiny one; adapting it with LoRA; saving it for others.

``Policy`` keeps model, tokenizer and the reference policy together. The reference is the policy as it was loaded: with
LoRA it is the same weights with the adapters off, otherwise a frozen copy that is only made if somebody asks for it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

SHIPPED = "shipped:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Policy:
    """A causal language model that can be trained, and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    adapted: bool  # trained through LoRA adapters

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)  # pyright: ignore[reportArgumentType]

    def frozen_copy(self) -> Any | None:
        """A copy without gradient to serve as reference; None with LoRA, whose base weights are the reference."""
        if self.adapted:
            return None
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def eos_id(self) -> int:
        """The token that ends an answer. Raises ValueError for a tokenizer without one."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError("model: the tokenizer has no end-of-sequence token, which given answers need")
        return int(self.tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]

    def shadow(self, adapters: bool = True) -> Any:
        """A frozen copy with trained weights of its own; what is not trained is shared, not copied.

        ``adapters=False``: with LoRA, the base model that the adapters stand on.
        """
        shared = {id(p): p for p in self.model.parameters() if not p.requires_grad}
        twin = copy.deepcopy(self.model, shared).eval().requires_grad_(False)
        if self.adapted and not adapters:
            twin.disable_adapter_layers()
        return twin

    @torch.no_grad()
    def refresh(self, shadow: Any) -> None:
        """Give a shadow the weights of today."""
        twins = dict(shadow.named_parameters())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                twins[name].copy_(parameter)

    @contextmanager
    def reference(self, frozen: Any | None) -> Iterator[Any]:
        """The reference model: ``frozen``, or this model with its adapters off. No dropout inside."""
        model = self.model if frozen is None else frozen
        training = [(module, module.training) for module in model.modules()]  # parts may be frozen in eval mode
        model.eval()
        try:
            if frozen is None:
                with model.disable_adapter():
                    yield model
            else:
                yield model
        finally:
            for module, mode in training:
                module.training = mode

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
        self.model.load_state_dict(dict(state), strict=not self.adapted)

    def export(self, folder: Path) -> None:
        """Save model and tokenizer so that plain transformers loads them; adapters are merged, and kept beside."""
        folder.mkdir(parents=True, exist_ok=True)
        model = self.model
        if self.adapted:
            model.save_pretrained(folder / "adapter")
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


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
    device: torch.device | str = "cpu",
    **_not_for_loading: Any,
) -> Policy:
    """Load model and tokenizer. ``lora``: rank (0: none), alpha, dropout, target_modules.

    Prompt and length settings of the model group are read elsewhere and ignored here. Raises ValueError, on one line,
    for an unknown dtype, a missing folder, or a hub id that cannot be reached.
    """
    check_model(path=path, dtype=dtype, attention=attention)
    source = str(shipped_folder(path.removeprefix(SHIPPED))) if path.startswith(SHIPPED) else path
    # A folder is read as a folder: transformers must not ask a hub for files that it lacks.
    options: dict[str, Any] = {"local_files_only": True} if os.path.isdir(source) else {"revision": revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], attn_implementation=attention, **options
        )
    except (OSError, ValueError) as error:  # a tokenizer that cannot be built is a ValueError of several lines
        first = str(error).splitlines()[0]
        raise ValueError(
            f"model.path={path}: transformers cannot load it ({first}); give a folder, or go online for a hub id"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
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
    return Policy(model=model, tokenizer=tokenizer, adapted=adapted)


def check_model(*, path: str, dtype: str, attention: str) -> None:
    """What can be said about a model's settings without loading it; raises ValueError."""
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype={dtype!r}: use one of {', '.join(DTYPES)}")
    if attention not in ("sdpa", "eager", "flash_attention_2"):
        raise ValueError(f"model.attention={attention!r}: use sdpa, eager or flash_attention_2")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if path.startswith(SHIPPED):
        shipped_folder(path.removeprefix(SHIPPED))
    elif looks_local and not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"model.path={path}: no config.json there; give a folder made by save_pretrained, or a hub id")
