"""``+reproduce=RUN``: the command line that repeats a run.

The run's own overrides are given again, so that its options keep their names. What the shipped files have come to say
since is then set back, key by key, to what the run was computed with. Overrides that stand beside ``+reproduce`` come
last and win. At its end the repeated run is compared with the first one, number by number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.launch.identity import PLACES
from core_torl.launch.jobs import task_config
from core_torl.launch.plugin import quoted
from core_torl.launch.record import read_record

KEY = "+reproduce="


def replayed(arguments: Sequence[str], config_name: str) -> list[str]:
    """``arguments`` with ``+reproduce=RUN`` spelled out; unchanged without it. Raises UserError, one line."""
    given = [a for a in arguments if a.lstrip("+").startswith(KEY[1:])]
    if not given:
        return list(arguments)
    if len(given) > 1:
        raise UserError(f"{KEY[:-1]} stands there {len(given)} times; give one run")
    folder = Path(given[0].partition("=")[2].strip("'\""))
    said = _read(folder, config_name)
    source = said["provenance"]
    missing = [d for d in source["config_dirs"] if not Path(d).is_dir()]
    if missing:
        raise UserError(f"reproduce={folder}: its config folder {missing[0]} is not there any more")
    words = [w for d in source["config_dirs"] for w in ("--config-dir", d)]
    words += ["--config-name", source["config_name"]]
    overrides = [o for o in said["overrides"] if _key(o) not in ("resume", "reproduces", "logger.group")]
    rest = [a for a in arguments if a not in given]
    if {"-m", "--multirun"} & set(rest):
        raise UserError("+reproduce repeats one run; leave -m out")
    mended = _mended(said, words, overrides, folder)
    # `key=value` words of the user's: options such as --cfg are no overrides.
    own = {_key(a) for a in rest if not a.startswith("-") and "=" in a}
    overrides = [o for o in overrides if _key(o) not in own]
    mended = [o for o in mended if not any(_key(o) == k or _key(o).startswith(f"{k}.") for k in own)]
    return [*words, *overrides, *mended, f"reproduces={_text(str(folder.resolve()))}", "hydra.mode=RUN", *rest]


def _read(folder: Path, config_name: str) -> dict[str, Any]:
    said = read_record(folder)
    if config_name != "train":
        raise UserError("+reproduce: only core-torl-train repeats runs")
    if said is None or said["app"] != config_name:
        raise UserError(f"reproduce={folder}: no run.json of core-torl-train there; give the folder of such a run")
    return said


def _mended(said: dict[str, Any], words: Sequence[str], overrides: Sequence[str], folder: Path) -> list[str]:
    """Overrides for the keys that the shipped files give another value than the run had.

    Keys that are taken from other keys come last, and only where those do not set them right: one that is set here
    would not follow an override that the user adds.
    """
    then, mended = _leaves(said["config"]), []
    for derived in (False, True):
        now, plain = _composed(words, [*overrides, *mended], folder)
        if gone := [key for key in sorted(then) if key not in now]:
            commit = said["provenance"]["commit"]
            where = f"check out commit {commit[:12]}" if commit else f"install version {said['provenance']['version']}"
            raise UserError(f"reproduce={folder}: there is no key {gone[0]} any more; {where}")
        differing = [key for key in sorted(then) if then[key] != now[key]]
        mended += [f"{key}={_text(then[key])}" for key in differing if derived or "${" not in str(plain[key])]
    return mended


def _composed(words: Sequence[str], overrides: Sequence[str], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of the config that ``words`` and ``overrides`` give today, resolved and as they are written."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from core_torl.config.paths import conf_dir

    # Not the compose API, because it finds no primary config in a folder that --config-dir names.
    search = create_config_search_path(conf_dir())
    for folder_of_configs in words[1:-2:2]:
        search.prepend("command-line", f"file://{folder_of_configs}", SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    try:
        found = Hydra.create_main_hydra2("train", search).compose_config(
            words[-1], list(overrides), run_mode=RunMode.RUN, from_shell=False, with_log_configuration=False
        )
        found.hydra.runtime.output_dir = str(folder)
        HydraConfig.instance().set_config(found)
        task = task_config(found)
        resolved, written = (OmegaConf.to_container(task, resolve=resolve) for resolve in (True, False))
        now = _leaves(resolved)
        return now, {key: _at(written, key) for key in now}
    finally:
        GlobalHydra.instance().clear()


def _at(tree: Any, path: str) -> Any:
    """What is written at ``path``, or above it where a whole branch is taken from elsewhere."""
    for key in path.split("."):
        if not isinstance(tree, dict):
            return tree
        tree = tree[key]
    return tree


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value of all keys that decide what a run computes; lists are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if not path and key in PLACES:
            continue
        if isinstance(value, dict) and value:
            found |= _leaves(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value
    return found


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _text(value: Any) -> str:
    """A value as Hydra's grammar of overrides reads it back."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{','.join(_text(v) for v in value)}]"
    return "null" if value is None else json.dumps(value)
