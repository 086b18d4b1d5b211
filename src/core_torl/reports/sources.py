"""Where runs are found: folders on this disk, W&B files in them, and projects on a W&B server.

A folder is searched for training runs. The run's own ``results.json`` counts first; only where it has none are the W&B
files beside it asked, so no run counts twice. Jobs of a ``sweep.json`` that have no folder yet are runs too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core_torl.config.errors import UserError
from core_torl.reports import wandb_source
from core_torl.reports.finished import COMPLETED, Run
from core_torl.reports.states import UNFINISHED, outdated, read_json, state_of

_INSIDE_A_RUN = (".hydra", "wandb", "checkpoints", "policy")
_OF_WANDB = re.compile(r"(offline-)?run-\d{8}_\d{6}-")  # how W&B names the folder of a run
_ABOVE = 3  # folders above a run in which a sweep may keep its sweep.json

Jobs = dict[Path, Mapping[str, Any]]  # folder of a job -> what sweep.json says of it


def find_runs(sources: Sequence[str | Path]) -> tuple[list[Run], list[Run]]:
    """Finished training runs in ``sources`` and unfinished ones, each once; no evaluations and no dry runs."""
    found: list[Run] = []
    seen: set[Path] = set()
    for source in sources:
        if str(source).startswith(wandb_source.SCHEME):
            found += [run for run in wandb_source.online_runs(str(source)) if run.folder not in seen]
            seen |= {run.folder for run in found}
        elif not Path(source).is_dir():
            raise UserError(f"runs={source}: no such folder")
        else:
            found += _below(Path(source), seen)
    return [run for run in found if run.state == COMPLETED], [run for run in found if run.state != COMPLETED]


def _below(top: Path, seen: set[Path]) -> list[Run]:
    """The runs in ``top`` and below; ``seen`` holds the folders that are looked through already, and grows."""
    if any(top.glob("run-*.wandb")):
        known = top.resolve() in seen
        seen.add(top.resolve())
        return [] if known else _not_none([wandb_source.offline_run([top])])
    found: list[Run] = []
    jobs: Jobs = {}
    for above in [*top.resolve().parents][:_ABOVE]:
        _add_jobs(above, jobs)
    for name, inside, files in os.walk(top):
        folder = Path(name)
        hydra = ".hydra" in inside
        # A folder that is no run's own may hold the W&B files of many.
        of_a_run = hydra or not {"run.json", "results.json"}.isdisjoint(files)
        lone = [folder] if of_a_run else [folder, folder / "wandb"]
        inside[:] = sorted(d for d in inside if d not in _INSIDE_A_RUN and not _OF_WANDB.match(d))
        if folder.resolve() in seen:
            continue
        seen |= {folder.resolve(), (folder / "wandb").resolve()}
        _add_jobs(folder, jobs)
        for place in lone:
            found += _not_none([wandb_source.offline_run(p) for p in wandb_source.offline_parts(place).values()])
        found += _not_none([_run_in(folder, files, hydra, jobs.get(folder.resolve(), {}))])
    for place, job in jobs.items():
        if place not in seen and place.is_relative_to(top.resolve()):
            seen.add(place)
            # The folder as the user wrote it.
            found.append(_of_job(top / place.relative_to(top.resolve()), job))
    return found


def _not_none(runs: Sequence[Run | None]) -> list[Run]:
    return [run for run in runs if run is not None]


def _add_jobs(folder: Path, jobs: Jobs) -> None:
    for job in read_json(folder / "sweep.json").get("jobs") or []:
        jobs[(folder / job["folder"]).resolve()] = job


def _run_in(folder: Path, files: Sequence[str], hydra: bool, job: Mapping[str, Any]) -> Run | None:
    """The run whose own folder this is; None for evaluations, dry runs and folders that are no run."""
    record = read_json(folder / "run.json")
    if record.get("app") not in (None, "train"):
        return None
    record = {"overrides": _overrides(folder), **record}
    if "results.json" in files:
        results = read_json(folder / "results.json")
        if "after" not in results:
            return None
        if "run" not in results:
            return _unfinished(folder, (UNFINISHED, "its results.json has no section 'run'"), record)
        old = outdated(folder / "results.json", record)
        return _unfinished(folder, state_of(record, job), record) if old else Run(folder, results, record=record)
    if not (hydra or "run.json" in files):
        return None
    parts = list(wandb_source.offline_parts(folder / "wandb").values())
    # A run that began anew in the same folder has a new id; the newest speaks for it.
    told = wandb_source.offline_run(max(parts, key=lambda p: p[-1].name)) if parts else None
    if told is not None and told.state == COMPLETED:
        return told
    if not _is_training(folder / ".hydra" / "config.yaml"):
        return None
    return _unfinished(folder, state_of(record, job), record)


def _unfinished(folder: Path, state: tuple[str, str], record: Mapping[str, Any]) -> Run:
    config = _config(folder / ".hydra" / "config.yaml")
    options = record.get("choices") or _choices(folder / ".hydra" / "hydra.yaml")
    section = {"config": config, "choices": options, "seed": config.get("seed")}
    return Run(folder, {"run": section}, *state, record=record)


def _of_job(folder: Path, job: Mapping[str, Any]) -> Run:
    """A job that has no folder yet: all that is known are its overrides."""
    given = dict(o.split("=", 1) for o in job.get("overrides") or [] if "=" in o)
    seed = given.get("seed")
    section = {"config": {}, "choices": {}, "seed": int(seed) if seed is not None and seed.isdigit() else None}
    return Run(folder, {"run": section}, *state_of({}, job), record={"overrides": job.get("overrides") or []})


# ---- what Hydra left ---------------------------------------------------------------------------------------------


def _is_training(config: Path) -> bool:
    """False for what other front doors and dry runs leave behind; a run whose config is lost counts as a training."""
    try:
        tree = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError):
        return True
    return not isinstance(tree, dict) or ("rl_steps" in tree and not tree.get("dry_run"))


def _overrides(folder: Path) -> list[str]:
    try:
        found = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text())
    except FileNotFoundError:
        return []
    return [str(o) for o in found or []]


def _choices(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):  # a run that was killed while Hydra wrote
        return {}
    return tree["hydra"]["runtime"].get("choices") or {} if isinstance(tree, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    """The composed config, resolved where it can be: what only Hydra knows stays the text that stands there."""
    try:
        tree = OmegaConf.load(path)
    except (OSError, yaml.YAMLError):
        return {}
    return _resolved(tree) if isinstance(tree, DictConfig) else {}


def _resolved(node: DictConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in node:
        try:
            value = node[key]
        except OmegaConfBaseException:
            found[str(key)] = str(node._get_node(key))
            continue
        if isinstance(value, DictConfig):
            found[str(key)] = _resolved(value)
        else:
            found[str(key)] = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
    return found
