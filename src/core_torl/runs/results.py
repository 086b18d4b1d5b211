"""The tracker of a run and the file that its results end in."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from core_torl import __version__
from core_torl.config import UserError
from core_torl.tracking.wandb_run import Tracker

_PACKAGES = ("torch", "transformers", "peft", "pytorch-lightning", "hydra-core", "wandb", "math-verify")


def make_tracker(cfg: DictConfig, output: Path, run_id: str | None) -> Tracker:
    """The run's tracker. Group: the configured one, else the sweep's folder, else the options. Tags: overrides too."""
    logger = cfg.logger
    if "policy" in logger.artifacts and not cfg.get("export", True):
        raise UserError("logger.artifacts: policy needs export=true, which writes it; set that or leave policy out")
    group, job_type, overrides = logger.group, logger.job_type, []
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        job_type = job_type or hydra.job.name
        # What says where a run goes or how it is followed would tell nothing about it.
        places = ("paths.", "resume=", "reproduces=", "logger.")
        overrides = [o for o in hydra.overrides.task if not o.startswith(places)]
        choices = hydra.runtime.choices
        if group is None and hydra.mode == RunMode.MULTIRUN:
            group = Path(hydra.sweep.dir).name
        if group is None:
            group = "-".join(str(choices[k]) for k in ("variant", "data") if choices.get(k))
    try:
        return Tracker(
            dir=str(output), mode=logger.mode, project=logger.project, entity=logger.entity, group=group,
            # W&B refuses tags of more than 64 characters.
            tags=[t[:64] for t in [*logger.tags, *overrides]], job_type=job_type or "train", name=logger.name,
            run_id=run_id, sample_rows=logger.sample_rows, system_metrics=logger.system_metrics,
            system_every_s=logger.system_every_s, artifacts=list(logger.artifacts),
            jsonl_path=str(output / "metrics.jsonl"), rollouts_path=str(output / "rollouts.jsonl"),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error


def choices() -> dict[str, str]:
    """Which option each config group has in this run; {} outside of Hydra."""
    if not HydraConfig.initialized():
        return {}
    return {group: str(option) for group, option in HydraConfig.get().runtime.choices.items()}


def write_results(path: Path, **sections: Any) -> None:
    """Write estimates, tables and the environment as JSON, whole or not at all. Estimates become dicts."""
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "core-torl": __version__,
        **{p: version(p) for p in _PACKAGES},
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps({**sections, "environment": environment}, indent=1, default=asdict) + "\n")
    os.replace(part, path)
