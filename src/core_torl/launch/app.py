"""A Hydra app whose mistakes read as one line.

Hydra's own decorator prints several lines for a wrong key and does not say which key was meant. ``run_app`` lets Hydra
do its work and catches what it raises: a user's mistake becomes one line on stderr and exit code 2; anything else keeps
its traceback. Set HYDRA_FULL_ERROR=1 to see the traceback of a user's mistake as well.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core_torl.config.errors import UserError, causes, one_line
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register

# What a place to write to can be refused for. Any other OSError is no mistake in a configuration.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_UNWRITABLE = {*_FULL, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


def run_app(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose ``config_name`` with the command line and hand it to ``task``; never returns normally after an error."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    asked = os.environ.get("HYDRA_FULL_ERROR")
    # Hydra 1.4 warns about what 1.5 will change; this project runs on 1.3 and 1.4 alike.
    warnings.filterwarnings("ignore", message=".*Hydra 1.5.*")
    started = False

    def job(cfg: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        nonlocal started
        started = True
        with _full_errors(asked):  # processes that the task starts inherit what the user asked for
            if HydraConfig.get().mode == RunMode.MULTIRUN or asked == "1":
                return task(cfg)  # Hydra reports which job failed, and the other jobs go on
            try:
                return task(cfg)
            except (OmegaConfBaseException, UserError) as error:
                fail(error, config_name)

    job.__module__ = f"core_torl.{config_name}"
    try:
        with _full_errors("1"):  # makes Hydra raise instead of printing and exiting
            hydra.main(version_base=None, config_path=conf_dir(), config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException, UserError) as error:
        if asked == "1":
            raise
        fail(error, config_name)
    except (OSError, ValueError) as error:
        # Before the task: Hydra's own complaint about an override or the run's folder. Later: a disk that is full.
        refused = isinstance(error, OSError) and error.errno in (_FULL if started else _UNWRITABLE)
        if asked == "1" or not (refused or (not started and type(error) is ValueError)):
            raise
        fail(error, config_name)


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
