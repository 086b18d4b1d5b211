"""One line for each mistake of a user: what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig

from core_torl.config.paths import conf_dir


class UserError(ValueError):
    """A mistake in a configuration or an input file. Front doors print its text as one line and exit with code 2."""


def nearest(wrong: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known name, comparing whole names and last parts; else an empty string."""
    names = sorted(set(known))
    found = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if not found:
        last = wrong.rsplit(".", 1)[-1]
        by_last = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
        found = [by_last[x] for x in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    return f" Did you mean {found[0]!r}?" if found else ""


def causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from, outermost first."""
    current: BaseException | None = error
    seen: set[int] = set()  # an error that was raised from itself has no outermost cause
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def one_line(error: BaseException, keys: Iterable[str] = (), groups: Iterable[str] = ()) -> str:
    """What ``error`` says, on one line; unknown names get the nearest right one.

    ``keys`` are the dotted keys that exist and ``groups`` the config groups. The rules below read the texts of Hydra
    1.3 and 1.4 and their OmegaConf; a text that none of them knows is passed on without its line breaks.
    """
    from omegaconf.errors import OmegaConfBaseException

    chain = list(causes(error))
    own = next((e for e in chain if isinstance(e, UserError)), None)
    if own is not None:
        return _flat(own)
    # OmegaConf's own exceptions know the key; what they were raised from is about the value alone.
    detail = next((e for e in chain if isinstance(e, OmegaConfBaseException) and e.full_key), None)
    text = _flat(error)
    return (
        _unparsable(error, text)
        or _unknown_option(text, groups)
        or _unknown_config(text)
        or _unknown_key(text, detail, {*keys}, {*groups})
        or _bad_group_choice(text)
        or _bad_value(detail)
        or _flat(chain[-1] if "$" not in str(chain[-1]) else error).split(" full_key:")[0][:600]
    )


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def _unparsable(error: BaseException, text: str) -> str | None:
    """An override that is not of the form key=value, or a value that Hydra's grammar cannot read."""
    if type(error).__name__ != "OverrideParseException":
        return None
    given = str(getattr(error, "override", ""))
    key, equals, value = given.partition("=")
    if not equals or not key:
        return f"cannot read {given!r}: write key=value"
    quoted = value.replace('"', "'")
    return f"cannot read the value of {given!r}: close its brackets, or put it in quotes: '{key}=\"{quoted}\"'"


def _unknown_option(text: str, groups: Iterable[str]) -> str | None:
    found = re.search(r"Could not find '([^']+)'", text)
    if not found:
        return None
    group, _, option = found[1].rpartition("/")
    available = re.search(r"Available options in '([^']*)': (.*?)(?: Config search path|$)", text)
    options = [] if not available else [o for o in re.split(r"[\s,]+", available[2]) if o and not o.startswith("_")]
    if options and available and found[1].startswith(f"{available[1]}/"):
        group, option = available[1], found[1].removeprefix(f"{available[1]}/")
        options += _recipes(group)
    if not options:
        return f"there is no config group {group or found[1]!r}.{nearest(group or found[1], groups)}"
    if group.startswith("hydra/") and option in _EXTRAS:
        return f"{group}={option}: its package is not installed; pip install 'core-torl[sweeps]'"
    return f"{group}={option}: no such option.{nearest(option, options)} Available: {_listed(options)}"


def _listed(options: list[str]) -> str:
    """The options, or the shortest names of many: recipes of models have long ones, and a line should be read."""
    if len(options) <= _MANY:
        return ", ".join(options)
    shortest = sorted(options, key=lambda o: (len(o), o))[:_MANY]
    return f"{', '.join(shortest)} and {len(options) - _MANY} more, see --help and docs/recipes.md"


_MANY = 24  # options
# Launchers and sweepers of Hydra that come with an extra.
_EXTRAS = ("optuna", "joblib", "submitit_local", "submitit_slurm")


def _recipes(group: str) -> list[str]:
    """Options of ``group`` that lie in folders below it; other files there are options of their own groups."""
    root = Path(conf_dir()) / group
    files = [p for p in sorted(root.glob("*/**/*.yaml")) if p.read_text().startswith("# @package _global_")]
    # What several recipes share is none by itself.
    return [p.relative_to(root).with_suffix("").as_posix() for p in files if p.parent.name != "common"]


def _unknown_config(text: str) -> str | None:
    found = re.search(r"Cannot find primary config '([^']+)'", text)
    if found:
        # A folder that --config-dir names, sweeps say, is where the misspelt name most likely is.
        given = re.findall(r"provider=command-line, path=file://(\S+)", text)
        there = sorted(p.stem for folder in given or [conf_dir()] for p in Path(folder).glob("*.yaml"))
        return f"--config-name {found[1]}: no such config.{nearest(found[1], there)} Available: {', '.join(there)}"
    found = re.search(r"Additional config directory '([^']+)' not found", text)
    return f"--config-dir {found[1]}: no such folder" if found else None


def _unknown_key(text: str, detail: BaseException | None, keys: set[str], groups: set[str]) -> str | None:
    found = re.search(r"Could not override '([^']+)'", text)
    flat = _flat(detail) if detail is not None else ""
    if not found:
        found = re.search(r"Key '[^']+' (?:is )?not in '[^']*'.*?full_key: (\S+)", flat)
    if not found:
        return None
    path = found[1]
    # The siblings in the config at hand say more than the defaults, whose options may be others.
    parent = getattr(detail, "parent_node", None)
    where = path.rpartition(".")[0]
    beside = list(parent) if isinstance(parent, DictConfig) else []
    siblings = {f"{where}.{key}" if where else str(key) for key in beside}
    hint = nearest(path, siblings) or nearest(path, keys | groups)
    return f"unknown key {path!r}.{hint or ' See --cfg job for those there are.'}"


def _bad_group_choice(text: str) -> str | None:
    found = re.search(r"schema@(\S+) appears more than once", text)
    if found:
        return f"{found[1]} takes one option, not several: to try them in turn, use --multirun {found[1]}=A,B"
    if text.startswith("Config group override must be a string"):
        return "a config group takes the name of an option, not null: see --help for the options"
    return None


def _bad_value(detail: BaseException | None) -> str | None:
    if detail is None:
        return None
    key, text = getattr(detail, "full_key", ""), _flat(detail).split(" full_key:")[0].rstrip(", ")
    if text.startswith("Missing mandatory value"):
        return f"{key} has no value: set {key}=..."
    if "does not support deletion" in text:
        return f"~{key}: this key cannot be removed; give it another value"
    given = re.match(r"Invalid (?:value|type) assigned: (\w+) is not a (ListConfig|subclass of)", text)
    if given and given[2] == "ListConfig":
        return f"{key}: needs a list, not {given[1]}: {key}=[a,b]"
    if given:
        return f"{key}: holds keys of its own and takes no {given[1]}: set {key}.<key>=..."
    return text if key in text else f"{key}: {text}"
