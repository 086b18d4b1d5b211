"""``run.json``: what a run is, how it stands and where it came from, in its folder from its first second on.

It is written before anything is loaded and again when the run ends, each time whole or not at all. A run that is killed
cannot say so; its record then names a process that is no more, and readers see that.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError

NAME = "run.json"
TAKE_OVER = "CORE_TORL_TAKE_OVER"  # set to 1: a run that another machine left as running was killed
# What a run of each front door must have left behind to count as done.
_PRODUCT = {"train": "results.json", "evaluate": "results.json"}


def local_rank() -> int:
    """This process's place among the ranks of its machine, as Lightning, torchrun or srun say it; 0 without ranks."""
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    return int(os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID", 0) if tasks > 1 else 0))


def is_main_process() -> bool:
    """False in the further ranks that a launcher started: they train, and nothing else."""
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    node = int(os.environ.get("NODE_RANK") or (os.environ.get("SLURM_NODEID", 0) if tasks > 1 else 0))
    return local_rank() == 0 and node == 0


def now() -> str:
    """This moment in UTC, as ``2026-01-31T12:00:00.123+00:00``."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a power cut must not leave an empty file under the final name
    os.replace(aside, path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder``; None if there is none or it is no record. Raises UserError if it is no JSON."""
    path = folder / NAME
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no JSON ({error}); move the folder away, or delete that file") from error
    return found if isinstance(found, dict) and found.get("attempts") and "identity" in found else None


# ---- processes ---------------------------------------------------------------------------------------------------


def birth(pid: int) -> str | None:
    """What tells a process from a later one of the same number: boot and start time.

    None where /proc is missing, and for a process that has ended and was not reaped.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name of the program stands in brackets and may hold blanks. Behind it: the state, and as 20th the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else f"{boot}:{fields[19]}"
    except (OSError, IndexError):
        return None


def is_alive(attempt: dict[str, Any]) -> bool | None:
    """Whether the attempt's process runs; None if it is on another machine, where nothing is known of it."""
    if attempt.get("host") != socket.gethostname():
        return None
    pid = attempt["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there and belongs to someone else
    return attempt.get("birth") in (None, birth(pid))


def state_of(record: dict[str, Any]) -> str:
    """The record's state, or ``killed`` if it says running and its process on this machine is gone."""
    if record["state"] == "running" and is_alive(record["attempts"][-1]) is False:
        return "killed"
    return record["state"]


def finished(folder: Path, mark: str) -> dict[str, Any] | None:
    """The record in ``folder`` if its run, of identity ``mark``, is done; None otherwise.

    A run may be killed between its results and the last line of its record: the results count; the record is mended.
    """
    record = read_record(folder)
    if record is None or record["identity"] != mark:
        return None
    state = state_of(record)
    if state == "completed":
        return record if _has_product(folder, record) else None
    if state == "running":
        return None
    try:
        results = json.loads((folder / "results.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if "objective" not in results or (results.get("provenance") or {}).get("identity") != mark:
        return None
    record |= {"state": "completed", "error": None, "value": results["objective"]}
    record["attempts"][-1]["state"] = "completed"
    write_json(folder / NAME, record)
    return record


def _has_product(folder: Path, record: dict[str, Any]) -> bool:
    if record["app"] == "warm_start":
        return Path(record["config"]["output"]).exists()
    return record["app"] not in _PRODUCT or (folder / _PRODUCT[record["app"]]).exists()


# ---- the record of a run that goes on ----------------------------------------------------------------------------


class RunRecord:
    """The record that this process keeps. ``value`` is what the run returns, set before the record is closed."""

    def __init__(self, folder: Path, said: dict[str, Any]) -> None:
        self.folder, self.said = folder, said
        self.value: float | None = None

    def close(self, state: str, error: str | None = None) -> None:
        """Write how the run ended, and what it returned if it completed."""
        # Others may have added to the provenance while the run went on.
        self.said = read_record(self.folder) or self.said
        self.said |= {"state": state, "error": error, "value": self.value if state == "completed" else None}
        self.said["attempts"][-1] |= {"ended": now(), "state": state}
        write_json(self.folder / NAME, self.said)


@contextmanager
def recorded(
    folder: Path, app: str, mark: str, config: Any, choices: dict[str, str], provenance: dict[str, Any]
) -> Iterator[RunRecord | None]:
    """Keep ``run.json`` in ``folder`` while the block runs; yields None in further ranks, which keep none.

    ``mark`` is the run's identity and ``config`` its resolved config. Attempts at the same run are listed one after the
    other, those at another run that was here before are forgotten. Raises UserError if another process works in the
    folder.
    """
    if not is_main_process():
        yield None
        return
    before = read_record(folder)
    if before and before["state"] == "running":
        last = before["attempts"][-1]
        mine = last["host"] == socket.gethostname() and last["pid"] == os.getpid()
        alive = False if mine else is_alive(last)
        if alive or (alive is None and os.environ.get(TAKE_OVER) != "1"):
            there = "" if alive else f" on {last['host']}"
            fix = "" if alive else f" (if it is gone: {TAKE_OVER}=1)"
            raise UserError(
                f"{folder}: process {last['pid']}{there} is at work in it; wait for it, stop it{fix}, or choose "
                "another folder"
            )
        last["state"] = "killed"
    attempts = before["attempts"] if before and before["identity"] == mark else []
    tracked = before.get("wandb_id") if attempts and before else None
    attempt = {"started": now(), "ended": None, "host": socket.gethostname(), "pid": os.getpid(),
               "birth": birth(os.getpid()), "state": "running", "commit": provenance.get("commit"),
               "diff_sha256": provenance.get("diff_sha256")}  # fmt: skip
    codes = {(a.get("commit"), a.get("diff_sha256")) for a in (*attempts, attempt)}
    if len(codes) > 1:
        print(f"core-torl: {folder} was begun by other code than goes on with it now", flush=True)
    said = {
        "app": app, "state": "running", "value": None, "error": None, "identity": mark,
        "overrides": provenance["overrides"], "choices": choices, "attempts": [*attempts, attempt],
        "provenance": provenance | {"identity": mark, "mixed_code": len(codes) > 1}, "config": config,
        "wandb_id": tracked,
    }  # fmt: skip
    record = RunRecord(folder, said)
    write_json(folder / NAME, said)
    try:
        yield record
    except KeyboardInterrupt:
        record.close("interrupted")
        raise
    except SystemExit as end:
        state = "completed" if not end.code else "interrupted" if end.code == 130 else "failed"
        record.close(state, None if state != "failed" else f"exit code {end.code}")
        raise
    except BaseException as error:
        record.close("failed", f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}")
        raise
    record.close("completed")


def add(folder: Path, **found: Any) -> None:
    """Add to the record in ``folder`` what is known only once the run's parts are there; provenance is merged."""
    record = read_record(folder)
    if record is not None and is_main_process():
        record["provenance"] |= found.pop("provenance", {})
        write_json(folder / NAME, record | found)
