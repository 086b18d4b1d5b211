"""``hydra/launcher=subprocess``: one fresh process for each job of a sweep.

A process of its own is what keeps jobs apart: one W&B run each, GPU memory that is given back, an engine that ends with
its job, ranks that start the job and not the whole sweep again, and a crash that stays where it happened. The same
command again runs only what is not done; a job that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from core_torl.config.errors import UserError
from core_torl.launch.board import Board
from core_torl.launch.jobs import Job, plan, task_config
from core_torl.launch.lock import lock, unlock_all
from core_torl.launch.prefork import Nursery, NurseryLost
from core_torl.launch.processes import IDENTITY, JobProcess, environment_of_jobs
from core_torl.launch.provenance import version_of
from core_torl.launch.record import TAKE_OVER, finished
from core_torl.launch.schedule import Schedule

log = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[3]  # of the checkout that this code runs from
# Overrides of Hydra's own that say how the sweep is launched and not how a job runs.
_OF_THE_SWEEP = ("hydra.mode=", "hydra.sweep.", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper",
                 "hydra.run.dir=")  # fmt: skip


class SweepFailed(RuntimeError):
    """Some jobs of the sweep failed; the others are done. One line for each of them, with its log."""


class SweepInterrupted(BaseException):
    """The sweep was stopped from outside; the same command goes on with it. Passes by whoever handles errors."""


class SubprocessLauncher(Launcher):
    """Hydra's launcher. Parameters are the keys of conf/hydra/launcher/subprocess.yaml. UserError for a wrong value."""

    def __init__(
        self,
        n_jobs: int,
        gpus_per_job: int,
        gpus: Sequence[str] | None,
        timeout_s: float,
        retries: int,
        grace_s: float,
        take_over: bool,
        view: bool,
        prefork: bool,
    ) -> None:
        if n_jobs < 1:
            raise UserError(f"hydra.launcher.n_jobs={n_jobs}: must be at least 1")
        for name, value in (("gpus_per_job", gpus_per_job), ("timeout_s", timeout_s), ("retries", retries),
                            ("grace_s", grace_s)):  # fmt: skip
            if value < 0:
                raise UserError(f"hydra.launcher.{name}={value}: must not be negative")
        self.slots = gpu_slots(n_jobs, gpus_per_job, gpus)
        self.timeout_s, self.retries, self.grace_s = timeout_s, retries, grace_s
        self.take_over, self.view, self.prefork = take_over, view, prefork
        self._imports: Sequence[str] = ()
        self._nursery: Nursery | None = None
        self._code: dict[str, Any] = {}
        self._config: Any = None
        self._context: Any = None
        self._check: Callable[[DictConfig], None] = lambda cfg: None
        self._program: list[str] = []
        self._config_dir: str | None = None
        self._environment: dict[str, str] = {}
        self._board: Board | None = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config
        self._remember(hydra_context.config_loader)
        self._check = getattr(task_function, "check", self._check)
        self._config_dir = getattr(task_function, "config_dir", None)
        self._program = getattr(task_function, "program", ["-m", task_function.__module__])
        self._environment = getattr(task_function, "environment", {})
        self._imports = getattr(task_function, "imports", ())

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; a JobReturn each, in their order. Raises UserError, SweepInterrupted."""
        setup_globals()
        hydra = self._config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)
        sweep = Path(str(hydra.sweep.dir)).absolute()
        if self._board is None:
            lock(sweep)
            self._board = Board(sweep, str(hydra.job.config_name), len(self.slots))
            _boards.append(self._board)
        jobs = plan(self._compose, sweep, job_overrides, initial_job_idx, self._check, self.take_over)
        self._board.add(jobs)
        skipped, other = sum(job.state == "skipped" for job in jobs), sum(job.other_code for job in jobs)
        log.info(
            f"{len(jobs)} jobs in {sweep}, {len(self.slots)} at a time"
            + (f"; {skipped} were done before and are not run again" if skipped else "")
            + (f", {other} of them by other code: for all by this one take another hydra.sweep.dir" if other else "")
        )
        schedule = Schedule(
            self._start, _finished, self._board.write, self.slots, self.timeout_s, self.retries, self.grace_s
        )
        with self._view(sweep), self._prefork(jobs):
            schedule.run(jobs)
        if schedule.interrupted:
            done = sum(job.done for job in self._board.jobs)
            self._board.close("interrupted")
            raise SweepInterrupted(
                f"stopped with {done} of {len(self._board.jobs)} jobs done; the same command goes on"
            )
        failed = [job for job in jobs if not job.done]
        error = SweepFailed(_summary(failed, len(jobs))) if failed else None
        return [_job_return(job, error) for job in jobs]

    def _remember(self, loader: Any) -> None:
        """Keep what is composed until it is asked for again: sweepers compose each job once before they launch it."""
        compose, kept = loader.load_sweep_config, {}

        def remembered(master_config: DictConfig, sweep_overrides: list[str], **others: Any) -> DictConfig:
            found = kept.pop(tuple(sweep_overrides), None)
            if found is None:
                found = compose(master_config, sweep_overrides, **others)
                kept[tuple(sweep_overrides)] = found
            return found

        loader.load_sweep_config = remembered

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        return self._context.config_loader.load_sweep_config(self._config, list(overrides))

    def _view(self, sweep: Path) -> Any:
        if not self.view:
            return nullcontext()
        from rich.console import Console

        from core_torl.launch.view import LiveView

        return LiveView(sweep, Console())

    @contextmanager
    def _prefork(self, jobs: Sequence[Job]) -> Iterator[None]:
        """A nursery for the jobs that are to run, where one helps: not for a single job, nor with CUDA, or elsewhere
        than on Linux, whose orphans can be adopted."""
        to_run = [job for job in jobs if not job.done and job.twin is None]
        cuda = any(OmegaConf.select(job.config, "trainer.accelerator") == "cuda" for job in to_run)
        if self.prefork and self._imports and len(to_run) > 1 and not cuda and sys.platform == "linux":
            self._nursery = Nursery(self._imports, environment_of_jobs(self._own_environment()))
            self._code = version_of(_ROOT)
        try:
            # Before the jobs' clocks run, and before Ctrl-C means that jobs are to save.
            if self._nursery is not None:
                try:
                    self._nursery.wait()
                except NurseryLost as error:
                    self._lose_nursery(str(error))
            yield
        finally:
            if self._nursery is not None:
                self._nursery.close()
                self._nursery = None

    def _own_environment(self) -> dict[str, str]:
        environment = dict(self._environment)
        # As for a console script, the current folder is not on the path unless it is for this process too.
        if self._program[0] == "-m" and not {"", os.getcwd()} & set(sys.path):
            environment["PYTHONSAFEPATH"] = "1"
        return environment

    def _start(self, job: Job) -> JobProcess:
        job.folder.mkdir(parents=True, exist_ok=True)
        environment = {**self._own_environment(), IDENTITY: job.mark}
        if self.take_over:
            environment[TAKE_OVER] = "1"
        if job.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
        command = command_of(job, self._program, self._config, self._config_dir)
        if self._nursery is not None and version_of(_ROOT) != self._code:
            self._lose_nursery("the code has changed since")
        try:
            return JobProcess(command, job.log, environment, self._nursery)
        except NurseryLost as error:
            self._lose_nursery(str(error))
            return JobProcess(command, job.log, environment)

    def _lose_nursery(self, why: str) -> None:
        log.warning(f"jobs are started one by one from now on: what they were forked from was lost ({why})")
        self._nursery, lost = None, self._nursery
        assert lost is not None
        lost.close()


def command_of(job: Job, program: Sequence[str], config: DictConfig, config_dir: str | None) -> list[str]:
    """The command line of one job: the sweep's own config, the job's overrides, and the job's folder.

    ``config_dir`` is where the program looks for its config by itself.
    """
    hydra = config.hydra
    command = [sys.executable, *program, "--config-name", str(hydra.job.config_name)]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            command += ["--config-dir", str(source.path)]
        elif source.provider == "main" and config_dir is not None and str(source.path) != config_dir:
            command += ["--config-path", str(source.path)]
    given: Any = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    own = [o for o in given if not o.lstrip("+~").startswith(_OF_THE_SWEEP)]
    command += [*job.overrides, *own, "hydra.mode=RUN", f"hydra.run.dir={quoted(job.folder)}"]
    # What a config may look up of its sweep.
    command += [f"hydra.sweep.dir={quoted(hydra.sweep.dir)}", f"hydra.job.num={job.number}"]
    command += [f"hydra.job.id='{job.number}'"]
    keys = {o.lstrip("+~").split("=", 1)[0] for o in job.overrides}
    if "resume" in job.config and job.config.resume is None:
        command.append("resume=auto")
    if OmegaConf.select(job.config, "logger.group", default="") is None and "logger.group" not in keys:
        command.append(f"logger.group={quoted(Path(str(hydra.sweep.dir)).absolute().name)}")
    return command


def quoted(value: object) -> str:
    """A value that Hydra's grammar of overrides takes as one string, whatever stands in it."""
    return QuotedString(str(value), Quote.single).with_quotes()


def gpu_slots(n_jobs: int, gpus_per_job: int, gpus: Sequence[str] | None) -> list[list[str]]:
    """GPUs of each job that may run at a time; as many empty lists as jobs where none are shared out. UserError."""
    if not gpus_per_job:
        return [[] for _ in range(n_jobs)]
    found = list(gpus) if gpus is not None else visible_gpus()
    if len(found) < gpus_per_job:
        raise UserError(
            f"hydra.launcher.gpus_per_job={gpus_per_job}: {len(found)} GPUs were found; lower it, or name them with "
            "hydra.launcher.gpus=[0,1]"
        )
    slots = [found[i : i + gpus_per_job] for i in range(0, len(found) - gpus_per_job + 1, gpus_per_job)]
    return slots[:n_jobs]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, without asking CUDA, which would keep hold of them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(folder.iterdir())))] if folder.is_dir() else []


# ---- results -----------------------------------------------------------------------------------------------------

_boards: list[Board] = []


def close_boards(state: str) -> None:
    """Say in each ``sweep.json`` of this process that its sweep has ended; for the front door's last lines."""
    while _boards:
        _boards.pop().close(state)
    unlock_all()


def _finished(job: Job, code: int) -> tuple[bool, float | None]:
    """Whether the job's own record says that it is done, and what it returned. A dry run keeps no record."""
    if job.config.get("dry_run"):
        return code == 0, None
    record = finished(job.folder, job.mark)
    return record is not None, record["value"] if record else None


def _summary(failed: Sequence[Job], count: int) -> str:
    lines = [f"{len(failed)} of {count} jobs did not finish; the same command runs these again, and only these:"]
    lines += [f"  #{job.number} {job.state} ({job.words}): {job.log}" for job in failed]
    return "\n".join(lines)


def _job_return(job: Job, error: SweepFailed | None) -> JobReturn:
    with read_write(job.config.hydra), open_dict(job.config.hydra):
        job.config.hydra.runtime.output_dir = str(job.folder)
    result = JobReturn(
        overrides=job.overrides, cfg=task_config(job.config), hydra_cfg=OmegaConf.masked_copy(job.config, ["hydra"]),
        working_dir=os.getcwd(), task_name=str(job.config.hydra.job.name),
        status=JobStatus.COMPLETED if job.done else JobStatus.FAILED,
    )  # fmt: skip
    result.return_value = job.value if job.done else error
    return result
