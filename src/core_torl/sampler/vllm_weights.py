"""The trainer's weights as files, in a folder that the servers can read too: each version in a folder of its own.

A folder is written under another name and renamed, so a server never sees half of one. Older versions are removed as
soon as every server has the newest.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from core_torl.config.errors import UserError
from core_torl.sampler.protocol import Weights

SHARD_BYTES = 4 << 30


class WeightFolders:
    """Folders below ``root``; None is a new folder for temporary files on this machine, removed at the end.

    ``dtype``: number format of whole weights in them, as "bfloat16"; None: as they come. Adapters stay as they come.

    Raises:
        UserError: ``root`` cannot be written.
    """

    def __init__(self, root: str | None, dtype: str | None = None) -> None:
        self.dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        try:
            if root is not None:
                Path(root).mkdir(parents=True, exist_ok=True)
            # A folder of this run's own: several may share ``root``.
            self.root = Path(tempfile.mkdtemp(prefix="core-torl-weights-", dir=root))
            self.root.chmod(0o755)  # servers may run as another user
        except OSError as error:
            raise UserError(f"sampler.sync_dir={root}: cannot be written ({error.strerror}); give another") from error
        self._written = 0
        self.current: Path | None = None

    def write_merged(self, weights: Weights, version: str) -> Path:
        """Write whole weights, adapters merged."""
        folder, part = self._next(version)
        tensors = iter(weights.merged())
        try:
            write_shards(tensors, part, self.dtype)
            os.replace(part, folder)
        except (OSError, SafetensorError) as error:
            for _ in tensors:  # where weights are sharded, the other ranks gather to the end
                pass
            raise self._full(error) from error
        return folder

    def write_adapter(self, weights: Weights, version: str) -> Path:
        """Write the adapters alone, as peft does."""
        folder, part = self._next(version)
        try:
            weights.save_adapter(part)
            os.replace(part, folder)
        except (OSError, SafetensorError) as error:
            raise self._full(error) from error
        return folder

    def write_model(self, name: str, tensors: Iterable[tuple[str, Tensor]], config: Any, tokenizer: Any) -> Path:
        """A whole model that a server can start from, kept to the end."""
        folder = self.root / name
        try:
            folder.mkdir(exist_ok=True)
            write_shards(tensors, folder, self.dtype)
        except (OSError, SafetensorError) as error:
            raise self._full(error) from error
        self.describe(folder, config, tokenizer)
        return folder

    @staticmethod
    def describe(folder: Path, config: Any, tokenizer: Any) -> None:
        """Add what a server needs beside the weights in order to start from ``folder``."""
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _next(self, version: str) -> tuple[Path, Path]:
        self._written += 1
        folder = self.root / f"{self._written:06d}-{re.sub(r'[^A-Za-z0-9._-]', '_', version)[:60]}"
        part = folder.with_name(f"{folder.name}.part")
        part.mkdir()
        return folder, part

    def _full(self, error: Exception) -> UserError:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        return UserError(
            f"sampler.sync_dir: cannot write weights to {self.root} ({said}); make room or give another folder"
        )

    def keep_only(self, folder: Path) -> None:
        """Remove the versions before ``folder``."""
        self.current = folder
        for other in self.root.glob("[0-9]*-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Safetensors files of at most about ``SHARD_BYTES`` each, with the index that Hugging Face checkpoints have.

    Numbers that are no integers become ``dtype`` where it is given.
    """
    from safetensors.torch import save_file

    names: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(tensors, dtype), start=1):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(shard, file))
        total += sum(t.nbytes for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)  # where it is, before it is copied
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.to("cpu").contiguous()
        size += tensor.nbytes
    if shard:
        yield shard


def base_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that the adapters of a peft model stand on, under their own names; gathered where sharded."""
    for name, parameter in model.get_base_model().named_parameters():
        if ".lora_" not in name:
            tensor: Any = parameter.detach()
            yield name.replace(".base_layer.", "."), tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
