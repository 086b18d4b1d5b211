"""Runs as W&B keeps them: offline files on this disk, or a project on a server.

Every run saves its ``results.json`` and ``run.json`` as files of its W&B run; together with the logged rows they are
the run, wherever its own folder is. A run that was resumed is one id with several offline parts: the rows of an earlier
part end where a later one begins. ``wandb`` is imported only when it is needed.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.reports.finished import Run
from core_torl.reports.states import NO_RESULTS, UNFINISHED, read_json, state_of
from core_torl.tracking.metrics import STEP
from core_torl.tracking.offline import OfflineRun, find_file, read_run

SCHEME = "wandb://"
_STATES = {"running": "running", "crashed": "killed", "killed": "killed", "failed": "failed", "pending": "pending"}
_HOW = "write wandb://entity/project or wandb://entity/project/group"


# ---- offline -----------------------------------------------------------------------------------------------------


def offline_parts(folder: Path) -> dict[str, list[Path]]:
    """W&B id -> its ``offline-run-DATE-ID`` folders in ``folder``, oldest first."""
    found: dict[str, list[Path]] = {}
    for part in sorted(folder.glob("offline-run-*")):
        if any(part.glob("run-*.wandb")):
            found.setdefault(part.name.split("-", 3)[-1], []).append(part)
    return found


def offline_run(parts: Sequence[Path]) -> Run | None:
    """The training run in the offline parts of one id, oldest first; None for an evaluation or a dry run."""
    results, record = _newest(parts, "results.json"), _newest(parts, "run.json")
    folder, history = parts[-1], functools.partial(_offline_rows, tuple(parts))
    if results:
        trained = "after" in results and "run" in results
        return Run(folder, results, record=record, history=history) if trained else None
    told = read_run(find_file(folder))
    if "rl_steps" not in told.config or told.config.get("dry_run"):
        return None
    state, why = state_of(record, {})
    if not record and told.exit_code is not None:
        state, why = (UNFINISHED, NO_RESULTS) if told.exit_code == 0 else ("failed", f"exit code {told.exit_code}")
    section = {"config": told.config, "choices": record.get("choices") or {}, "seed": told.config.get("seed")}
    return Run(folder, {"run": section}, state, why, record=record, history=history)


def _newest(parts: Sequence[Path], name: str) -> dict[str, Any]:
    return next((found for part in reversed(parts) if (found := read_json(part / "files" / name))), {})


def _offline_rows(parts: Sequence[Path]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for part in parts:
        told: OfflineRun = read_run(find_file(part))
        begins = min((row[STEP] for row in told.history if STEP in row), default=None)
        rows = [row for row in rows if begins is None or row.get(STEP, 0) <= begins] + told.history
    return rows


# ---- online ------------------------------------------------------------------------------------------------------


def online_runs(source: str) -> list[Run]:
    """The training runs of ``wandb://entity/project`` or of one group of it; an empty entity is the user's own.

    UserError where wandb is missing or not logged in, where there is no such project, or where the server fails.
    """
    path, group = _address(source)
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"runs={source}: needs the package wandb (pip install wandb)") from error
    with _one_line(source):
        api = wandb.Api()
        found = [_online_run(source, one) for one in api.runs(path, filters={"group": group} if group else {})]
    return [run for run in found if run is not None]


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """What W&B raises as a UserError; other errors as they are."""
    from wandb.errors import AuthenticationError, Error, UsageError

    try:
        yield
    except (UsageError, AuthenticationError) as error:
        raise UserError(
            f"runs={source}: not logged in to W&B ({_first_line(error)}): run `wandb login`, or set WANDB_API_KEY"
        ) from error
    except (Error, ValueError) as error:
        if "Could not find project" in str(error):
            raise UserError(f"runs={source}: W&B has no such project, or none that you may read; {_HOW}") from error
        if not isinstance(error, Error):
            raise
        raise UserError(f"runs={source}: W&B does not answer ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["no reason given"])[0].rstrip(".")


def _address(source: str) -> tuple[str, str | None]:
    """``entity/project`` (``project`` without an entity) and the group."""
    entity, slash, rest = source.removeprefix(SCHEME).partition("/")
    project, _, group = rest.strip("/").partition("/")
    if not slash or not project:
        raise UserError(f"runs={source}: {_HOW}")
    return f"{entity}/{project}" if entity else project, group or None


def _online_run(source: str, one: Any) -> Run | None:
    results, record = _download(one, "results.json"), _download(one, "run.json")
    name = f"{SCHEME}{'/'.join(one.path)}" if isinstance(one.path, list | tuple) else f"{SCHEME}{one.path}"
    where: Mapping[str, Any] = {
        "folder": Path(name.replace("//", "/")), "source": name, "record": record,
        "history": functools.partial(_online_rows, one, name),
    }  # fmt: skip
    if results:
        return Run(results=results, **where) if "after" in results and "run" in results else None
    config = dict(one.config)
    if "rl_steps" not in config or config.get("dry_run"):
        return None
    state = _STATES.get(one.state, UNFINISHED)
    why = (record.get("error") if state == "failed" else None) or f"{one.state} in W&B, {NO_RESULTS}"
    section = {"config": config, "choices": record.get("choices") or {}, "seed": config.get("seed")}
    return Run(results={"run": section}, state=state, why=why, **where)


def _download(one: Any, name: str) -> dict[str, Any]:
    """A JSON file of the run; {} where it has none, which W&B tells by an empty list or by a file without bytes."""
    try:
        file = one.file(name)
    except IndexError:
        return {}
    if not file.size:
        return {}
    with tempfile.TemporaryDirectory() as folder, file.download(root=folder, replace=True) as text:
        found = json.load(text)
    return found if isinstance(found, dict) else {}


def _online_rows(one: Any, name: str) -> list[dict[str, Any]]:
    """The logged rows; W&B's own keys, tables and pictures left out."""
    with _one_line(name):
        rows = [{k: v for k, v in row.items() if _number(k, v)} for row in one.scan_history()]
    return [{k: float(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows if row.keys() - {STEP}]


def _number(key: str, value: Any) -> bool:
    # A number that is not finite may come as a text.
    return not key.startswith("_") and (isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity"))
