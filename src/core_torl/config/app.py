"""A Hydra app whose mistakes read as one line.

Hydra's own decorator prints several lines for a wrong key and does not say which key was meant. ``run_app`` lets Hydra
do its work and catches what it raises: a user's mistake becomes one line on stderr and exit code 2; anything else keeps
its traceback. Set HYDRA_FULL_ERROR=1 to see the traceback of a user's mistake as well.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core_torl.config.errors import UserError, one_line
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register


def run_app(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose ``config_name`` with the command line and hand it to ``task``; never returns normally after an error."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing and exiting
    # Hydra 1.4 warns about what 1.5 will change; this project runs on 1.3 and 1.4 alike.
    warnings.filterwarnings("ignore", message=".*Hydra 1.5.*")

    def job(cfg: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        if HydraConfig.get().mode == RunMode.MULTIRUN or wants_traceback:
            return task(cfg)  # Hydra reports which job failed, and the other jobs go on
        try:
            return task(cfg)
        except (OmegaConfBaseException, UserError) as error:
            fail(error, config_name)

    job.__module__ = f"core_torl.{config_name}"
    try:
        hydra.main(version_base=None, config_path=conf_dir(), config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException, UserError, OSError) as error:
        if wants_traceback:
            raise
        fail(error, config_name)


def fail(error: BaseException, config_name: str) -> None:
    """Print ``error`` as one line and exit with code 2 (a mistake of the user's)."""
    cause = error
    while cause.__cause__ is not None and type(cause.__cause__).__module__.startswith(("omegaconf", "core_torl")):
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.filename:
        text = f"{cause.filename}: {cause.strerror}. Choose another place with hydra.run.dir=... or paths.root=..., or make room"
    else:
        text = one_line(cause, [*config_keys(config_name)])
    print(f"core-torl: {text}", file=sys.stderr)
    sys.exit(2)


def config_keys(config_name: str) -> Iterator[str]:
    """Dotted keys of the default config and names of the groups: what a misspelt key may have meant."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base=None):
        tree = OmegaConf.to_container(compose(config_name), resolve=False)

    def walk(node: Any, path: str) -> Iterator[str]:
        for key, value in node.items():
            yield f"{path}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{path}{key}.")

    yield from walk(tree, "")
    yield from ("experiment", "ablation", "debug", "local")
