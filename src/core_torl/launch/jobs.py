"""The jobs of a sweep before they run: which folder each has, and which of them are done already.

A job keeps the folder in which a run of the same identity stands, whatever its number was then. One that is new takes
the folder that ``hydra.sweep.subdir`` names; where another run stands there and the name is a number, the next free
one. Nothing is ever overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from core_torl.config.errors import UserError
from core_torl.launch.identity import THIS_RUN, identity
from core_torl.launch.provenance import code_version
from core_torl.launch.record import NAME, finished, is_alive, read_record, state_of

_INSIDE_A_RUN = (".hydra", "wandb", "checkpoints", "policy")


@dataclass
class Job:
    """One job: its place in the sweep, what it overrides, where it runs, and how it stands.

    ``state`` is pending, running, completed, skipped (it was done before), failed, killed, timeout or interrupted.
    ``config`` is composed and holds Hydra's own part. ``other_code``: it was done before, by another version of the
    code. ``twin`` is an earlier job of the same identity, whose result this one takes.
    """

    number: int
    overrides: list[str]
    config: DictConfig
    mark: str
    folder: Path
    state: str = "pending"
    value: float | None = None
    pid: int | None = None
    returncode: int | None = None
    started: str | None = None
    ended: str | None = None
    gpus: list[str] = field(default_factory=list)
    other_code: bool = False
    twin: Job | None = None

    @property
    def log(self) -> Path:
        return self.folder / "stdout.log"

    @property
    def done(self) -> bool:
        return self.state in ("completed", "skipped")

    @property
    def words(self) -> str:
        return " ".join(o for o in self.overrides if not o.startswith("hydra."))


class Runs:
    """The runs that stand in a sweep's folder, by identity."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.records: dict[Path, dict[str, Any]] = {}
        for name, inside, files in os.walk(sweep, followlinks=True):
            # What is inside a run is no run; the same names directly below the sweep may be anything.
            inside[:] = sorted(d for d in inside if d not in (_INSIDE_A_RUN if NAME in files else ()))
            if NAME in files and (record := read_record(Path(name))):
                self.records[Path(name)] = record
        # Of two runs of one identity the one that is done counts, then the one that can be gone on with.
        worth = sorted(
            self.records, key=lambda f: (self.records[f]["state"] == "completed", (f / "checkpoints").is_dir())
        )
        self.folders = {self.records[folder]["identity"]: folder for folder in worth}
        self._taken: set[Path] = set()
        self._next = 0  # numbers below it are known to be taken

    def folder_for(self, mark: str, name_at: Callable[[int], str], number: int) -> Path:
        """Where a job of identity ``mark`` runs. ``name_at(n)`` is its folder's name as job number n. UserError."""
        if mark in self.folders:
            return self.folders[mark]
        folder = self.sweep / name_at(number)
        if self._is_taken(folder):
            number = max(number + 1, self._next)
            if self.sweep / name_at(number) == folder:
                other = "another job of this sweep" if folder in self._taken else "another run"
                raise UserError(
                    f"hydra.sweep.subdir={name_at(number)}: {other} stands in {folder}; name in it what tells jobs "
                    "apart, or choose another hydra.sweep.dir"
                )
            while self._is_taken(folder := self.sweep / name_at(number)):
                number += 1
            self._next = number + 1
        self._taken.add(folder)
        self.folders[mark] = folder
        return folder

    def _is_taken(self, folder: Path) -> bool:
        return folder in self._taken or _occupied(folder)


def _occupied(folder: Path) -> bool:
    """Whether a run left something there; a job that was killed before its record left nothing but Hydra's files."""
    return any((folder / name).exists() for name in (NAME, "results.json", "metrics.jsonl", "checkpoints"))


def plan(
    compose: Callable[[Sequence[str]], DictConfig], sweep: Path, overrides: Sequence[Sequence[str]], first: int,
    check: Callable[[DictConfig], None], take_over: bool,
) -> list[Job]:  # fmt: skip
    """The jobs of one batch. ``compose`` makes the config of a job, Hydra's own part included.

    ``check`` raises UserError for a job that cannot be run. ``take_over``: a run that another machine left as running
    is one that was killed.

    Raises UserError where two jobs would share a folder, or a run that another process works at is among them.
    """
    from hydra.core.hydra_config import HydraConfig

    runs, jobs, known = Runs(sweep), [], {}
    outer = HydraConfig.instance().cfg
    try:
        found = []
        for number, own in enumerate(overrides, start=first):
            config = compose(own)
            _as_job(config, number)
            task = task_config(config)
            try:
                check(task)
            except UserError as error:
                raise UserError(f"job {number} ({' '.join(own)}): {error}") from error
            found.append((number, own, config, identity(task), identity(task, whole=True)))
        # Jobs that differ in nothing but their speed or what they show are asked for on purpose, as in a benchmark.
        wholes: dict[str, set[str]] = {}
        for _, _, _, mark, whole in found:
            wholes.setdefault(mark, set()).add(whole)
        for number, own, config, mark, whole in found:
            mark = whole if len(wholes[mark]) > 1 else mark
            dry = "dry_run/" if config.get("dry_run") else ""  # leaves nothing that a run could be taken for

            sweep_keys: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
            numbered = sweep_keys["subdir"] == "${hydra.job.num}"  # no need to look anything up

            def name_at(n: int, config: DictConfig = config, dry: str = dry, numbered: bool = numbered) -> str:
                return dry + (str(n) if numbered else _as_job(config, n))

            folder = runs.folder_for(mark, name_at, number)
            job = Job(number, list(own), config, mark, folder, twin=known.get(mark))
            known.setdefault(mark, job)
            _see_what_is_there(job, runs.records.get(folder), take_over)
            jobs.append(job)
    finally:
        HydraConfig.instance().cfg = outer
    return jobs


def _as_job(config: DictConfig, number: int) -> str:
    """Make ``config`` that of job ``number``, for whatever looks its own number up; the name of the job's folder."""
    from hydra.core.hydra_config import HydraConfig

    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.job.num, config.hydra.job.id = number, str(number)
        config.hydra.runtime.output_dir = THIS_RUN  # which folder that is follows from the identity
    HydraConfig.instance().set_config(config)  # ${hydra:...} is looked up there, in a copy
    return str(OmegaConf.select(config, "hydra.sweep.subdir"))


def task_config(config: DictConfig) -> DictConfig:
    """The config without Hydra's own part."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def _see_what_is_there(job: Job, record: dict[str, Any] | None, take_over: bool) -> None:
    if record is None:
        return
    if done := finished(job.folder, job.mark):
        job.state, job.value = "skipped", done["value"]
        job.other_code = any(done["provenance"].get(key) != value for key, value in code_version().items())
    elif state_of(record) == "running":
        last = record["attempts"][-1]
        if is_alive(last):
            raise UserError(f"{job.folder}: process {last['pid']} is at work in it; wait for it or stop it first")
        if not take_over:
            raise UserError(
                f"{job.folder}: process {last['pid']} on {last['host']} may be at work in it; if it is not, add "
                "hydra.launcher.take_over=true"
            )
