"""What the view reads of a sweep's files: the end of ``metrics.jsonl``, a few lines of configs, ``sweep.json``.

It is read while others write, and again at each look. So a torn line is left out, and of what only grows no more is
read than is needed: a look at hundreds of long runs takes a fraction of a second.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core_torl.config.errors import UserError
from core_torl.launch.record import read_record

STEP, TOKENS, STEP_S = "train/rl_step", "train/sampled_tokens", "time/step_s"
_TAIL_BYTES = 48 * 1024  # some twenty rows
_TAIL_LIMIT = 1024 * 1024
_STEP_SECONDS = re.compile(rb'"time/step_s": ([0-9.eE+-]+)')


# ---- metrics -----------------------------------------------------------------------------------------------------


def read_tail(path: Path) -> list[dict[str, Any]]:
    """The last rows of a ``metrics.jsonl``, oldest first; a torn last line is left out, a missing file has none.

    More is read only where the end holds no finished step, as after a long evaluation.
    """
    size = _TAIL_BYTES
    while True:
        try:
            with path.open("rb") as file:
                length = file.seek(0, os.SEEK_END)
                file.seek(max(0, length - size))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        # The first piece is whole only at the beginning of the file; what follows the last line break is torn.
        rows = [row for line in lines[0 if size >= length else 1 : -1] if (row := _row(line)) is not None]
        if size >= min(length, _TAIL_LIMIT) or any(STEP_S in row for row in rows):
            return rows
        size *= 4


def _row(line: bytes) -> dict[str, Any] | None:
    """A line as a row; None for what is no JSON object (a disk that filled up, a file written at this moment)."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The newest value of ``name`` that is a number; None if there is none."""
    return next((row[name] for row in reversed(rows) if is_number(row.get(name))), None)


@dataclass(frozen=True)
class Worked:
    """What a run has behind it: seconds in RL steps, number of evaluations, and when its last row was written."""

    steps_s: float
    evaluations: int
    changed: float


def worked(path: Path) -> Worked | None:
    """All of a ``metrics.jsonl`` added up, former attempts included; None if there is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return _worked(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=512)
def _worked(path: Path, changed_ns: int, size: int) -> Worked:
    """Size and time only tell one state of the file from another. Rows are not parsed: there may be many."""
    text = path.read_bytes()
    seconds = math.fsum(float(found) for found in _STEP_SECONDS.findall(text))
    return Worked(seconds, sum(b'"eval/' in line for line in text.splitlines()), changed_ns / 1e9)


def changed(folder: Path, *more: Path) -> float | None:
    """When one of the files that tell of a run changed last, in seconds since 1970; None if there are none."""
    paths = (folder / "metrics.jsonl", folder / "run.json", folder / ".hydra" / "config.yaml", *more)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=None)


# ---- configs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """What a job's config says of how long it goes on; None (or 0) where it has no such key."""

    rl_steps: int | None = None
    token_budget: int | None = None
    evaluate_every: int = 0


def lengths(folder: Path) -> Lengths:
    """The lengths in the config of the run in ``folder``."""
    try:
        text = (folder / ".hydra" / "config.yaml").read_text()
    except FileNotFoundError:
        return Lengths()
    # Three lines of a long file: parsing all of it for each job at each look would take longer than everything else.
    lines = re.findall(r"^(rl_steps|token_budget|evaluate_every): (.*)$", text, re.M)
    return Lengths(**{key: value for key, text in lines if isinstance(value := yaml.safe_load(text), int)})


def overrides(folder: Path) -> list[str]:
    """What the command line of the run in ``folder`` set; [] if nobody knows."""
    record = read_record(folder)
    if record is not None:
        return list(record["overrides"])
    try:
        return [str(text) for text in yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text()) or []]
    except FileNotFoundError:
        return []


def jobs_told(path: Path) -> int | None:
    """How many jobs a ``multirun.yaml`` asks for; None if there is none, or where it cannot be told beforehand."""
    try:
        return _jobs_told(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return None


@functools.lru_cache(maxsize=16)
def _jobs_told(path: Path, changed_ns: int) -> int | None:
    """The time only tells one state of the file from another."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        hydra = yaml.safe_load(path.read_text())["hydra"]
        if not hydra["sweeper"]["_target_"].endswith(".BasicSweeper"):
            return None  # a search makes up its jobs as it goes on
        asked = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
        found = OverridesParser.create().parse_overrides([*asked, *hydra["overrides"]["task"]])
        # Of two values for one key the later counts.
        counts = {o.get_key_element(): len([*o.sweep_string_iterator()]) if o.is_sweep_override() else 1 for o in found}
    except (yaml.YAMLError, TypeError, KeyError, HydraException):
        return None  # half written, another program's, or a glob over files that only Hydra sees
    return math.prod(counts.values())


# ---- sweep.json --------------------------------------------------------------------------------------------------


def read_told(path: Path) -> dict[str, Any] | None:
    """``sweep.json``, which is always moved into its place whole; None if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error}); the same command again writes a new one") from error
