"""What can be known of a model without its weights, and without a network: its architecture and its tokenizer.

They are read from a folder, or from what the hub's cache holds. For the models of the presets that are not cached the
architecture is in a table (``memory.KNOWN``); what nothing tells is named, so that nobody takes it for checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_torl.model.load import SHIPPED, shipped_folder
from core_torl.model.memory import KNOWN, Architecture


@dataclass
class ModelFiles:
    """``source`` says where the architecture is from; ``missing`` names what could not be read, and why."""

    architecture: Architecture | None
    tokenizer: Any | None
    source: str
    missing: list[str] = field(default_factory=list)


def read_model_files(path: str, revision: str | None = None) -> ModelFiles:
    """Raises ValueError, on one line, for a local folder whose files cannot be read."""
    from transformers import AutoConfig, AutoTokenizer

    folder = str(shipped_folder(path.removeprefix(SHIPPED))) if path.startswith(SHIPPED) else os.path.expanduser(path)
    local = os.path.isdir(folder)
    place = folder if local else path
    config, fault = _read(AutoConfig.from_pretrained, place, revision)
    tokenizer, tokenizer_fault = _read(AutoTokenizer.from_pretrained, place, revision)
    if local and (fault or tokenizer_fault):
        raise ValueError(f"model.path={path}: {fault or tokenizer_fault}")
    missing = [] if local and _licences(folder) else [f"licence ({'no such file there' if local else 'see the hub'})"]
    if tokenizer is None:
        missing = ["tokenizer, chat template and prompt lengths", *missing]
    if config is not None:
        architecture, source = Architecture.of(config), "its folder" if local else "the hub's cache"
        if architecture is None:
            missing = [f"memory (the weights of a {config.model_type!r} model are not counted here)", *missing]
        return ModelFiles(architecture, tokenizer, source, missing)
    architecture = KNOWN.get(path)
    if architecture is None:
        missing = ["architecture and memory", *missing]
    return ModelFiles(architecture, tokenizer, "the built-in table" if architecture else "nowhere", missing)


def _read(load: Callable[..., Any], place: str, revision: str | None) -> tuple[Any | None, str]:
    """What ``load`` finds on this machine, or None and the first line of its complaint."""
    options = {} if os.path.isdir(place) else {"revision": revision}
    try:
        return load(place, local_files_only=True, **options), ""
    except (OSError, ValueError, KeyError) as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0]


def _licences(folder: str) -> list[Path]:
    return [p for p in Path(folder).iterdir() if p.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))]
