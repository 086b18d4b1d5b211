"""Where runs are found: folders on this disk, W&B files in them, and projects on a W&B server.

A folder is searched for training runs. The run's own ``results.json`` counts first; only where it has none are the W&B
files beside it asked, and only where they are of its last attempt. A run that is found in several places is known by
its W&B id and counts once. Jobs of a ``sweep.json`` that have no folder yet are runs too. A file that is torn or empty
makes its run an unfinished one; it never ends the search.
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
from core_torl.reports.states import UNFINISHED, ended_well, outdated, read_json, state_of, whole

_INSIDE_A_RUN = (".hydra", "wandb", "checkpoints", "policy")
_OF_WANDB = re.compile(r"(offline-)?run-\d{8}_\d{6}-")  # how W&B names the folder of a run
_ABOVE = 3  # folders above a run in which a sweep may keep its sweep.json

Jobs = dict[Path, Mapping[str, Any]]  # folder of a job -> what sweep.json says of it


def find_runs(sources: Sequence[str | Path], notes: list[str] | None = None) -> tuple[list[Run], list[Run]]:
    """Finished training runs in ``sources`` and unfinished ones, each once; no evaluations and no dry runs.

    ``notes`` grows by what a reader would not expect: broken files, runs that were found twice. UserError for a source
    that is not there, and for a server that does not answer.
    """
    notes = [] if notes is None else notes
    found: list[Run] = []
    seen: set[Path] = set()
    for source in sources:
        if str(source).startswith(wandb_source.SCHEME):
            found += [run for run in wandb_source.online_runs(str(source)) if run.folder not in seen]
            seen |= {run.folder for run in found}
        elif not Path(source).is_dir():
            raise UserError(f"runs={source}: no such folder")
        else:
            found += _below(Path(source), seen, notes)
    found = _once(found, notes)
    return [run for run in found if run.state == COMPLETED], [run for run in found if run.state != COMPLETED]


def _once(runs: Sequence[Run], notes: list[str]) -> list[Run]:
    """Each run from one place: its own folder before W&B's files on this disk, and these before the server."""
    first: dict[str, Run] = {}
    for run in sorted(runs, key=_rank):
        if mark := run.record.get("wandb_id"):
            first.setdefault(mark, run)
    # Two folders of their own with one id are copies that their user must choose between.
    twice = [
        (run, kept)
        for run in runs
        if (kept := first.get(run.record.get("wandb_id") or "")) is not None and kept is not run and _rank(run) > 0
    ]
    if twice:
        one, kept = twice[0]
        many = f"{len(twice)} runs were" if len(twice) > 1 else "1 run was"
        notes.append(
            f"{many} found in two places by the W&B id and {'count' if len(twice) > 1 else 'counts'} once: "
            f"{kept.name} is {one.name}{', for one' if len(twice) > 1 else ''}."
        )
    left_out = {id(run) for run, _ in twice}
    return [run for run in runs if id(run) not in left_out]


def _rank(run: Run) -> int:
    """0 for a run's own folder, 1 for W&B's files on this disk, 2 for a server."""
    return 0 if run.history is None else 2 if run.source else 1


def _below(top: Path, seen: set[Path], notes: list[str]) -> list[Run]:
    """The runs in ``top`` and below; ``seen`` holds the folders that are looked through already, and grows."""
    if any(top.glob("run-*.wandb")):
        known = top.resolve() in seen
        seen.add(top.resolve())
        return [] if known else _not_none([wandb_source.offline_run([top])])
    found: list[Run] = []
    jobs: Jobs = {}
    for above in [*top.resolve().parents][:_ABOVE]:
        _add_jobs(above, jobs, notes)
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
        _add_jobs(folder, jobs, notes)
        for place in lone:
            found += _not_none([wandb_source.offline_run(p) for p in wandb_source.offline_parts(place).values()])
        found += _not_none([_run_in(folder, files, hydra, jobs.get(folder.resolve(), {}), notes)])
    for place, job in jobs.items():
        if place not in seen and place.is_relative_to(top.resolve()):
            seen.add(place)
            # The folder as the user wrote it.
            found.append(_of_job(top / place.relative_to(top.resolve()), job))
    return found


def _not_none(runs: Sequence[Run | None]) -> list[Run]:
    return [run for run in runs if run is not None]


def _add_jobs(folder: Path, jobs: Jobs, notes: list[str]) -> None:
    wrong: list[str] = []
    for job in read_json(folder / "sweep.json", wrong).get("jobs") or []:
        jobs[(folder / job["folder"]).resolve()] = job
    notes += [f"{folder}: {what}: jobs that have not begun are not known." for what in wrong]


def _run_in(folder: Path, files: Sequence[str], hydra: bool, job: Mapping[str, Any], notes: list[str]) -> Run | None:
    """The run whose own folder this is; None for evaluations, dry runs and folders that are no run."""
    wrong: list[str] = []
    record = read_json(folder / "run.json", wrong)
    if record.get("app") not in (None, "train"):
        return None
    record = {"overrides": _overrides(folder), **record}
    results = read_json(folder / "results.json", wrong)
    parts = list(wandb_source.offline_parts(folder / "wandb").values())
    # A run that began anew in the same folder has a new id; the newest speaks for it.
    newest = max(parts, key=lambda p: p[-1].name) if parts else []
    if newest and not record.get("wandb_id"):
        record["wandb_id"] = wandb_source.id_of(newest[-1])
    if "results.json" in files:
        if results and "after" not in results:
            return None
        if whole(results):
            notes += [f"{folder}: {what}." for what in wrong]
            return _finished(folder, results, record, job)
        if results:
            wrong.append("its results.json has no section 'run' of a training")
    elif not (hydra or "run.json" in files):
        return None
    elif newest:
        told = wandb_source.offline_run(newest)
        if told is not None and told.state == COMPLETED:
            saved = told.folder / "files" / "results.json"
            if not outdated(told.results, saved, record):
                return told
    if not _is_training(folder / ".hydra" / "config.yaml"):
        return None
    state = (UNFINISHED, "; ".join(wrong)) if wrong else state_of(record, job, folder)
    return _unfinished(folder, state, record)


def _finished(folder: Path, results: dict[str, Any], record: Mapping[str, Any], job: Mapping[str, Any]) -> Run:
    """A run with results: finished, unless they are of an earlier attempt."""
    if ended_well(record):  # it cannot have ended so without writing them
        return Run(folder, results, record=record)
    if outdated(results, folder / "results.json", record):
        return _unfinished(folder, state_of(record, job, folder), record)
    # Killed or failed after it had written its results, which are all that a report is about.
    error = f": {record['error']}" if record.get("error") else ""
    why = f"its run.json says {record['state']}{error}; its results were written before" if record.get("state") else ""
    return Run(folder, results, why=why, record=record)


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
    return Run(folder, {"run": section}, *state_of({}, job, folder), record={"overrides": job.get("overrides") or []})


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
    except (OSError, yaml.YAMLError):
        return []
    return [str(o) for o in found] if isinstance(found, list) else []


def _choices(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):  # a run that was killed while Hydra wrote
        return {}
    try:
        return tree["hydra"]["runtime"].get("choices") or {}
    except (TypeError, KeyError):  # half of the file
        return {}


def _config(path: Path) -> dict[str, Any]:
    """The composed config, resolved where it can be: what only Hydra knows stays the text that stands there.

    The Hydra of this process, if one is at work, knows of its own run and would answer for another's.
    """
    try:
        tree = OmegaConf.create(path.read_text().replace("${hydra:", "\\${hydra:"))
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
