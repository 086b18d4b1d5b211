"""Where a result comes from: the command, the code down to its uncommitted lines, versions, seeds.

What is known before anything is loaded is gathered here; hashes of the data and the names of GPUs are added by the run.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

PACKAGES = (
    "torch", "transformers", "peft", "pytorch-lightning", "hydra-core", "omegaconf", "wandb", "datasets", "math-verify",
    "numpy", "scipy", "vllm",
)  # fmt: skip
# What of a checkout decides what is computed.
_CODE = ("src", "conf", "sweeps")


def provenance(cfg: DictConfig, hydra: Any, app: str) -> dict[str, Any]:
    """All that is known of a run from its config and Hydra's own, see ``run.json`` in docs/sweeps.md."""
    name = str(hydra.job.config_name)
    folders = [str(s["path"]) for s in hydra.runtime.config_sources if s["provider"] == "command-line"]
    given: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    # Put together again: a launcher may have started this process with other words.
    words = [w for folder in folders for w in ("-cd", folder)] + (["-cn", name] if name != app else [])
    return {
        "command": shlex.join([f"core-torl-{app.replace('_', '-')}", *words, *given]),
        "cwd": str(hydra.runtime.cwd),
        "app": app,
        "config_name": name,
        "config_dirs": folders,
        "overrides": given,
        **code_version(),
        "version": _version("core-torl"),
        "packages": {p: found for p in PACKAGES if (found := _version(p)) is not None},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "seeds": seeds(OmegaConf.to_container(cfg, resolve=False)),
    }


def seeds(tree: Any, path: str = "") -> dict[str, int]:
    """Dotted key -> value of every whole number in the config whose key is ``seed``."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= seeds(value, f"{path}{key}.")
        elif key == "seed" and isinstance(value, int):
            found[f"{path}{key}"] = value
    return found


@functools.cache
def code_version() -> dict[str, Any]:
    """Commit of the checkout that this code runs from, whether it was changed since, and a hash of the changes.

    Changes are those under src, conf and sweeps, files that git does not know yet with their contents. All None where
    core-torl was installed as a package, or git cannot be asked; its version says then what ran.
    """
    return version_of(Path(__file__).resolve().parents[3])


def version_of(root: Path) -> dict[str, Any]:
    """The same for the checkout in ``root``."""
    unknown = {"commit": None, "dirty": None, "diff_sha256": None}
    if not (root / ".git").exists():
        return unknown
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "diff", "HEAD", "--no-ext-diff", "--no-color", "--binary", "--", *_CODE)
    new = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *_CODE)
    if commit is None or changes is None or new is None:
        return unknown | {"commit": None if commit is None else commit.decode().strip()}
    digest = hashlib.sha256(changes)
    for name in filter(None, new.split(b"\0")):
        digest.update(name + b"\0" + (root / os.fsdecode(name)).read_bytes())
    dirty = bool(changes or new)
    return {
        "commit": commit.decode().strip(), "dirty": dirty, "diff_sha256": digest.hexdigest()[:16] if dirty else None,
    }  # fmt: skip


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git prints; None where it is not there, refuses, or does not answer."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
