"""A Hydra app whose mistakes read as one line.

Hydra's own decorator prints several lines for a wrong key and does not say which key was meant. ``run_app`` lets Hydra
do its work and catches what it raises: a user's mistake becomes one line on stderr and exit code 2; anything else keeps
its traceback. Set HYDRA_FULL_ERROR=1 to see the traceback of a user's mistake as well.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core_torl.config.errors import UserError, causes, one_line
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register
from core_torl.launch.identity import identity
from core_torl.launch.lock import lock
from core_torl.launch.processes import IDENTITY, end_with_launcher, is_job
from core_torl.launch.provenance import provenance
from core_torl.launch.record import finished, read_record, recorded
from core_torl.launch.reproduce import replayed
from core_torl.launch.search import continue_search

# What a place to write to can be refused for. Any other OSError is no mistake in a configuration.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_UNWRITABLE = {*_FULL, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_sweeps: list[Path] = []  # folders of the sweeps that this process has started


class SweepHook:
    """Hydra's callback at the start of a sweep: it locks the sweep's folder and lets a stopped search go on."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            folder = Path(str(config.hydra.sweep.dir)).absolute()
            lock(folder)
            _sweeps.append(folder)
            continue_search(config)
        except Exception as error:  # Hydra would turn it into a warning and start the sweep
            raise SweepRefused from error

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None  # the other moments do not matter here


class SweepRefused(BaseException):
    """A sweep that must not start; ``__cause__`` says why. Passes by Hydra, which swallows errors of callbacks."""


def run_app(
    config_name: str,
    task: Callable[[DictConfig], Any],
    *,
    check: Callable[[DictConfig], None] = lambda cfg: None,
    record: bool = False,
    sweep_end: Callable[[Path], None] | None = None,
    config_dir: str | None = None,
    imports: Sequence[str] = (),
) -> None:
    """Compose ``config_name`` with the command line and hand it to ``task``; never returns normally after an error.

    ``check`` raises UserError for a config that cannot be run; a sweep checks all of its jobs before it starts one.
    ``record``: each run keeps a ``run.json``, by which a sweep knows what is done. ``sweep_end`` is called with the
    folder of a sweep after its last job, also if some of the jobs failed. ``config_dir`` is where the config stands, by
    default the shipped one. ``imports`` names modules that every job imports sooner or later: the jobs of a sweep can
    be forked from one process that has done so.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from core_torl.launch.plugin import SweepFailed, SweepInterrupted, close_boards

    end_with_launcher()
    register()
    asked = os.environ.get("HYDRA_FULL_ERROR")
    # Hydra 1.4 warns about what 1.5 will change; this project runs on 1.3 and 1.4 alike.
    warnings.filterwarnings("ignore", message=".*Hydra 1.5.*")
    started = False

    def run(cfg: DictConfig) -> Any:
        check(cfg)
        # A dry run leaves nothing by which a run could be taken for done.
        return run_once(cfg, config_name, task) if record and not cfg.get("dry_run") else task(cfg)

    def job(cfg: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        nonlocal started
        started = True
        with _full_errors(asked):  # processes that the task starts inherit what the user asked for
            if HydraConfig.get().mode == RunMode.MULTIRUN or asked == "1":
                return run(cfg)  # Hydra reports which job failed, and the other jobs go on
            try:
                return run(cfg)
            except (OmegaConfBaseException, UserError) as error:
                fail(error, config_name)

    job.__module__ = f"core_torl.{config_name}"  # what Hydra names runs after
    # For the launcher: what to check, how to start this program again, what was asked for before we changed it.
    job.check = check  # pyright: ignore[reportFunctionMemberAccess]
    job.program = program_of(task)  # pyright: ignore[reportFunctionMemberAccess]
    job.imports = imports  # pyright: ignore[reportFunctionMemberAccess]
    job.config_dir = config_dir or conf_dir()  # pyright: ignore[reportFunctionMemberAccess]
    job.environment = {} if asked is None else {"HYDRA_FULL_ERROR": asked}  # pyright: ignore[reportFunctionMemberAccess]
    _sweeps.clear()
    try:
        sys.argv[1:] = replayed(sys.argv[1:], config_name)
        with _full_errors("1"):  # makes Hydra raise instead of printing and exiting
            place: dict[str, Any] = {"config_path": config_dir or conf_dir(), "config_name": config_name}
            if "execution_whitelist" in inspect.signature(hydra.main).parameters:  # Hydra 1.4: for our own callback
                place["execution_whitelist"] = ["core_torl.*", "hydra.*", "hydra_plugins.*", "logging.*"]
            hydra.main(version_base=None, **place)(job)()
        close_boards("completed")
        _end_sweep(sweep_end)
    except SweepFailed as error:
        close_boards("failed")
        print(f"core-torl: {error}", file=sys.stderr)
        _end_sweep(sweep_end)
        sys.exit(1)
    except SweepRefused as error:
        if asked == "1" or not isinstance(error.__cause__, UserError):
            raise error.__cause__ or error from None
        fail(error.__cause__, config_name)
    except KeyboardInterrupt:
        if not _sweeps:
            raise
        close_boards("interrupted")
        print("core-torl: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except SweepInterrupted as error:
        print(f"core-torl: {error}", file=sys.stderr)
        sys.exit(130)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        if asked == "1":
            raise
        in_sweep = started and bool(_sweeps)  # a job that ran in this process
        try:
            fail(error, config_name)
        except SystemExit:
            if not in_sweep:
                raise
            _end_sweep(sweep_end)
            sys.exit(1)
    except (OSError, ValueError) as error:
        # Before the task: Hydra's own complaint about an override or the run's folder. Later: a disk that is full.
        refused = isinstance(error, OSError) and error.errno in (_FULL if started else _UNWRITABLE)
        if asked == "1" or not (refused or (not started and type(error) is ValueError)):
            raise
        fail(error, config_name)
    finally:
        close_boards("failed")


def program_of(task: Callable[..., Any]) -> list[str]:
    """What follows ``python`` to start the program of ``task`` again: a module, or this process's script."""
    module = task.__module__
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        if spec is None:
            return [str(Path(sys.argv[0]).absolute())]
        module = spec.name
    return ["-m", module]


def run_once(cfg: DictConfig, config_name: str, task: Callable[[DictConfig], Any]) -> Any:
    """One run, with its record. In a sweep within this process a run that is done is not repeated."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        check_ranks(cfg, str(hydra.runtime.choices.get("hydra/launcher")))
    folder = Path(hydra.runtime.output_dir)
    mark, whole = identity(cfg, str(folder)), identity(cfg, str(folder), whole=True)
    if is_job():
        expected = os.environ.get(IDENTITY, mark)
        if expected not in (mark, whole):
            raise UserError(
                f"{folder}: this job has another config than its launcher made out, perhaps because a file of it has "
                "changed since; run the command again"
            )
        mark = expected
    if hydra.mode == RunMode.MULTIRUN and (known := read_record(folder)):
        # Another launcher than ours: it starts every job, so the job itself must know that it is done.
        if known["identity"] == whole:
            mark = whole
        if known["identity"] != mark:
            raise UserError(f"{folder} holds another run than this job; choose another hydra.sweep.dir")
        if done := finished(folder, mark):
            print(f"core-torl: {folder} is done and is not run again", flush=True)
            return done["value"]
        if "resume" in cfg and cfg.resume is None:
            cfg.resume = "auto"
    choices = {group: str(option) for group, option in hydra.runtime.choices.items()}
    tree = OmegaConf.to_container(cfg, resolve=True)
    with recorded(folder, config_name, mark, tree, choices, provenance(cfg, hydra, config_name)) as record:
        value = task(cfg)
        if record is not None and isinstance(value, int | float):
            record.value = float(value)
        return value


def check_ranks(cfg: DictConfig, launcher: str) -> None:
    """UserError where further ranks of a job would start the whole sweep again: Lightning repeats the command line."""
    ranks = int(OmegaConf.select(cfg, "trainer.devices", default=1)) * int(
        OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    )
    if ranks > 1 and launcher in ("basic", "joblib", "submitit_local"):
        raise UserError(
            f"hydra/launcher={launcher}: with {ranks} ranks each rank would start the sweep again; use "
            "hydra/launcher=subprocess, or submitit_slurm with as many tasks as ranks"
        )


def _end_sweep(sweep_end: Callable[[Path], None] | None) -> None:
    """What follows the last job; nothing that goes wrong in it takes a result away, or hides which jobs failed."""
    if sweep_end is None:
        return
    for folder in dict.fromkeys(_sweeps):
        if not any(folder.glob("**/run.json")):
            continue  # a dry run, or nothing that got as far as its record
        try:
            sweep_end(folder)
        except UserError as error:
            print(f"core-torl: no report of {folder}: {one_line(error)}", file=sys.stderr)
        except Exception as error:  # noqa: BLE001 - told in full; every job is done and on disk
            traceback.print_exc()
            print(f"core-torl: no report of {folder} ({type(error).__name__}); all results are there", file=sys.stderr)


@contextmanager
def _full_errors(value: str | None) -> Iterator[None]:
    before = os.environ.get("HYDRA_FULL_ERROR")
    _set_full_errors(value)
    try:
        yield
    finally:
        _set_full_errors(before)


def _set_full_errors(value: str | None) -> None:
    if value is None:
        os.environ.pop("HYDRA_FULL_ERROR", None)
    else:
        os.environ["HYDRA_FULL_ERROR"] = value


def fail(error: BaseException, config_name: str) -> None:
    """Print ``error`` as one line and exit with code 2 (a mistake of the user's)."""
    refused = next((e for e in causes(error) if isinstance(e, OSError) and e.errno in _UNWRITABLE), None)
    if refused is not None and not isinstance(error, UserError):
        where = f"{refused.filename}: " if refused.filename else ""
        text = f"{where}{refused.strerror}. Choose another place with paths.root=... or hydra.run.dir=..."
    else:
        keys = () if any(isinstance(e, UserError) for e in causes(error)) else config_keys(config_name)
        text = one_line(error, keys, config_groups())
    print(f"core-torl: {text}", file=sys.stderr)
    sys.exit(2)


@functools.cache
def config_keys(config_name: str) -> tuple[str, ...]:
    """Dotted keys of the default config, Hydra's own included: what a misspelt key may have meant."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(conf_dir(), version_base=None):
            tree = OmegaConf.to_container(compose(config_name, return_hydra_config=True), resolve=False)
    except (HydraException, OmegaConfBaseException):  # the user's own `local` file may be what is wrong
        return ()

    def walk(node: Any, path: str) -> Iterator[str]:
        for key, value in node.items():
            yield f"{path}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{path}{key}.")

    return tuple(walk(tree, ""))


def config_groups() -> list[str]:
    """Names of the shipped config groups."""
    root = Path(conf_dir())
    return sorted({str(p.parent.relative_to(root)) for p in root.rglob("*.yaml") if p.parent != root})
