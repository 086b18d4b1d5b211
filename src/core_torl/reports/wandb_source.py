"""Runs as W&B keeps them: offline files on this disk, or a project on a server.

Every run saves its ``results.json`` and ``run.json`` as files of its W&B run; together with the logged rows they are
the run, wherever its own folder is. A run that was resumed is one id with several offline parts, and results saved
before it went on are not its results: only those of the last part count, and on a server only those of a run that has
finished. Steps that were logged twice, before a restart and after it, count as they were logged last. ``wandb`` is
imported only when it is needed.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.reports.finished import COMPLETED, Run
from core_torl.reports.states import NO_RESULTS, UNFINISHED, parse_json, read_json, state_of, whole
from core_torl.tracking.metrics import STEP
from core_torl.tracking.offline import OfflineRun, find_file, read_run

SCHEME = "wandb://"
_STATES = {"running": "running", "crashed": "killed", "killed": "killed", "failed": "failed", "pending": "pending"}
_CHOICES = "choices."
_HOW = "write wandb://entity/project or wandb://entity/project/group"


# ---- offline -----------------------------------------------------------------------------------------------------


def offline_parts(folder: Path) -> dict[str, list[Path]]:
    """W&B id -> its ``offline-run-DATE-ID`` folders in ``folder``, oldest first."""
    found: dict[str, list[Path]] = {}
    for part in sorted(folder.glob("offline-run-*")):
        if any(part.glob("run-*.wandb")):
            found.setdefault(id_of(part), []).append(part)
    return found


def id_of(part: Path) -> str:
    """The W&B id in the name of an ``offline-run-DATE-ID`` folder."""
    return part.name.split("-", 3)[-1]


def offline_run(parts: Sequence[Path]) -> Run | None:
    """The training run in the offline parts of one id, oldest first; None for an evaluation or a dry run."""
    *before, folder = parts
    wrong: list[str] = []
    told = _read(folder, wrong)
    saved = folder / "files"
    results, record = (read_json(saved / name, wrong) for name in ("results.json", "run.json"))
    if not results and not wrong and before and not told.history:
        # It went on and came to nothing: what it was before still stands.
        found = offline_run(before)
        if found is not None and found.state == COMPLETED:
            return found
    record = {**record, "wandb_id": told.run_id or id_of(folder)}
    history = functools.partial(_offline_rows, tuple(parts))
    if results and not wrong:
        return Run(folder, results, record=record, history=history) if whole(results) else None
    section = _section(told.config, record)
    if wrong or (not told.config and told.job_type in ("", "train")):
        why = "; ".join(wrong) or "killed before its config was logged"
        return Run(folder, {"run": section}, UNFINISHED, why, record=record, history=history)
    if "rl_steps" not in told.config or told.config.get("dry_run"):
        return None
    state, why = state_of(record, {}, saved)
    if not record.get("state") and told.exit_code is not None:
        state, why = (UNFINISHED, NO_RESULTS) if told.exit_code == 0 else ("failed", f"exit code {told.exit_code}")
    return Run(folder, {"run": section}, state, why, record=record, history=history)


def _section(config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an unfinished run; its W&B config holds the option of each config group as well."""
    groups = {key.removeprefix(_CHOICES): value for key, value in config.items() if key.startswith(_CHOICES)}
    own = {key: value for key, value in config.items() if not key.startswith(_CHOICES)}
    return {"config": own, "choices": record.get("choices") or groups, "seed": config.get("seed")}


def _read(part: Path, wrong: list[str]) -> OfflineRun:
    """What the part's file tells; an empty run where it is of another kind, which ``wrong`` then says."""
    try:
        return read_run(find_file(part))
    except ValueError as error:
        wrong.append(str(error).removeprefix(f"{part}/"))
        return OfflineRun(part)


def _offline_rows(parts: Sequence[Path]) -> list[dict[str, Any]]:
    return each_step_once([row for part in parts for row in read_run(find_file(part)).history])


def each_step_once(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each RL step: where a run went back and on again, what it had logged after that place is dropped."""
    found: dict[float, dict[str, Any]] = {}
    last = 0
    for row in rows:
        step = row.get(STEP, 0)
        if 0 < step < last:  # at 0 accuracies from before training may be logged again by a run that goes on
            found = {known: own for known, own in found.items() if known <= step}
        last = step or last
        found.setdefault(step, {}).update(row)
    return list(found.values())


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
    wrong: list[str] = []
    results, record = (_download(one, name, wrong) for name in ("results.json", "run.json"))
    path = "/".join(one.path) if isinstance(one.path, list | tuple) else str(one.path)
    name = f"{SCHEME}{path}"
    where: Mapping[str, Any] = {
        "folder": Path(name.replace("//", "/")), "source": name,
        "record": {**record, "wandb_id": path.rpartition("/")[2]},
        "history": functools.partial(_online_rows, one, name),
    }  # fmt: skip
    if results and not whole(results):
        return None
    if results and one.state == "finished":
        return Run(results=results, **where)
    config = dict(one.config)
    section = results.get("run") or _section(config, record)
    if "rl_steps" not in config or config.get("dry_run"):
        return None
    state = _STATES.get(one.state, UNFINISHED)
    # A run that went on after it had ended still shows the results that it had then.
    why = f"{one.state} in W&B, " + ("its results.json is of an earlier attempt" if results else NO_RESULTS)
    why = "; ".join(wrong) or (record.get("error") if state == "failed" else None) or why
    return Run(results={"run": section}, state=state, why=why, **where)


def _download(one: Any, name: str, wrong: list[str]) -> dict[str, Any]:
    """A JSON file of the run; {} where it has none, which W&B tells by an empty list or by a file without bytes."""
    try:
        file = one.file(name)
    except IndexError:
        return {}
    if not file.size:
        return {}
    with tempfile.TemporaryDirectory() as folder, file.download(root=folder, replace=True) as text:
        return parse_json(text.read(), name, wrong)


def _online_rows(one: Any, name: str) -> list[dict[str, Any]]:
    """The logged rows; W&B's own keys, tables and pictures left out."""
    with _one_line(name):
        rows = [{k: v for k, v in row.items() if _number(k, v)} for row in one.scan_history()]
    numbers = [{k: float(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    return each_step_once(row for row in numbers if row.keys() - {STEP})


def _number(key: str, value: Any) -> bool:
    # A number that is not finite may come as a text.
    return not key.startswith("_") and (isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity"))
