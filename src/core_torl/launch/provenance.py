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
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

PACKAGES = (
    "torch", "transformers", "peft", "pytorch-lightning", "hydra-core", "omegaconf", "wandb", "datasets", "math-verify",
    "numpy", "scipy", "vllm",
)  # fmt: skip


def provenance(cfg: DictConfig, hydra: Any, app: str) -> dict[str, Any]:
    """All that is known of a run from its config and Hydra's own, see ``run.json`` in docs/sweeps.md."""
    sources = hydra.runtime.config_sources
    return {
        "command": shlex.join([f"core-torl-{app.replace('_', '-')}", *sys.argv[1:]]),
        "app": app,
        "config_name": str(hydra.job.config_name),
        "config_dirs": [str(s["path"]) for s in sources if s["provider"] == "command-line"],
        "overrides": [str(o) for o in hydra.overrides.task],
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

    All None where core-torl was installed as a package, or git cannot be asked; its version says then what ran.
    """
    root = Path(__file__).resolve().parents[3]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if commit is None:
        return {"commit": None, "dirty": None, "diff_sha256": None}
    # Files that git ignores or does not know are no part of the code; new modules under src are.
    changes = (_git(root, "diff", "HEAD") or "") + (_git(root, "status", "--porcelain", "--", "src", "conf") or "")
    digest = hashlib.sha256(changes.encode()).hexdigest()[:16] if changes else None
    return {"commit": commit, "dirty": bool(changes), "diff_sha256": digest}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a file system that does not answer
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
