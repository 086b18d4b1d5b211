"""Reads an offline W&B run back, without an account or a server.

A ``.wandb`` file opens with seven bytes (``:W&B``, a magic number, a version) and goes on as a log in blocks of 32 KiB.
A record is cut into pieces that do not cross a block; a piece is a checksum, a length, a kind (1 whole, 2 first,
3 middle, 4 last) and its bytes. Put together, the bytes are one protocol-buffer ``Record``. A killed run leaves a file
that ends in the middle of a record or without an exit record; what stands before is read, and ``truncated`` says so.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_torl.tracking.metrics import AXES

MARK = b":W&B"
HEADER = struct.Struct("<4sHB")
PIECE = struct.Struct("<IHB")
BLOCK_BYTES = 32 * 1024
WHOLE, FIRST, LAST = 1, 2, 4


@dataclass(frozen=True, slots=True)
class OfflineFile:
    """A file of an artifact: its name there, its size in bytes, and the copy that waits to be sent."""

    name: str
    size: int
    path: Path


@dataclass(frozen=True, slots=True)
class OfflineArtifact:
    """An artifact that was logged. W&B itself makes one of type ``run_table`` of each table."""

    name: str
    type: str
    aliases: tuple[str, ...]
    files: tuple[OfflineFile, ...]


@dataclass(slots=True)
class OfflineRun:
    """One run as its file tells it.

    ``config`` has the flat keys that were logged. ``history`` has one dict a logged row of numbers, in order, and
    ``summary`` the last value of each. ``step_metrics`` maps a metric or a glob to its horizontal axis. ``media`` maps
    a key to its kind (``table-file``, ``image-file``), ``files`` to the files logged under it, oldest first.
    ``artifacts`` are in the order of logging. ``saved`` are the files kept with the run, ``results.json`` say.
    ``system`` has one dict a record of the machine: ``time`` in seconds since 1970, then W&B's names (``cpu``, say).
    ``exit_code`` is None if the run never ended; ``truncated`` is True if the file stops within a record or is damaged
    there, and ``damage`` says how.
    """

    path: Path
    run_id: str = ""
    project: str = ""
    entity: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    media: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    artifacts: list[OfflineArtifact] = field(default_factory=list)
    saved: list[Path] = field(default_factory=list)
    system: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    truncated: bool = False
    damage: str = ""

    def tables(self, key: str) -> list[dict[str, Any]]:
        """The tables logged under ``key``, oldest first, each with ``columns`` and ``data``; KeyError if none was."""
        if self.media.get(key) != "table-file":
            raise KeyError(f"run {self.run_id} logged no table {key!r}")
        return [json.loads(path.read_text(encoding="utf-8")) for path in self.files[key]]


def find_file(path: str | os.PathLike[str]) -> Path:
    """The ``.wandb`` file at ``path``, or in the run folder ``path`` (W&B's own, or that of a training run).

    Raises FileNotFoundError if there is none, ValueError if the folder holds several runs.
    """
    given = Path(path)
    if given.is_file():
        return given
    # The second place is where a training run keeps W&B's folder.
    found = (sorted(given.glob("*.wandb")) or sorted(given.glob("wandb/*run-*/*.wandb"))) if given.is_dir() else []
    if not found:
        raise FileNotFoundError(f"no .wandb file at {given}")
    if len(found) > 1:
        raise ValueError(f"{given} holds {len(found)} .wandb files; name one")
    return found[0]


class _Damaged(ValueError):
    """The file stops making sense here."""


def _records(data: bytes, path: Path) -> Iterator[bytes]:
    """The bytes of each whole record, in order. Raises _Damaged where the file is torn."""
    if not data.startswith(MARK[: len(data)]):
        raise ValueError(f"{path} is no .wandb file")
    if len(data) < HEADER.size:  # killed within its first bytes
        raise _Damaged(f"torn header of {len(data)} bytes")
    at, pieces = HEADER.size, b""
    while at < len(data):
        room = BLOCK_BYTES - at % BLOCK_BYTES
        if room < PIECE.size:  # a header never crosses a block; the rest is padding
            at += room
            continue
        if at + PIECE.size > len(data):
            raise _Damaged(f"torn header at byte {at}")
        checksum, length, kind = PIECE.unpack_from(data, at)
        piece = data[at + PIECE.size : at + PIECE.size + length]
        if len(piece) < length:
            raise _Damaged(f"torn record at byte {at}")
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            raise _Damaged(f"wrong checksum at byte {at}")
        at += PIECE.size + length
        pieces = piece if kind in (WHOLE, FIRST) else pieces + piece
        if kind in (WHOLE, LAST):
            yield pieces
            pieces = b""
    if pieces:
        raise _Damaged("the last record has no end")


def _items(items: Iterable[Any]) -> dict[str, Any]:
    """Keys and values of one record; a nested key is joined with dots. W&B's own keys open with an underscore."""
    pairs = {".".join(getattr(item, "nested_key", ())) or item.key: item.value_json for item in items}
    return {key: _value(text) for key, text in pairs.items() if not key.startswith("_")}


def _value(text: str) -> Any:
    value = json.loads(text)
    # A number that is not finite may be written as a string.
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _split_media(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The numbers of a row, and for each table or picture in it what is said of the file."""
    keys = {key.removesuffix("._type") for key in row if key.endswith("._type")}
    media = {
        key: {name.removeprefix(f"{key}."): v for name, v in row.items() if name.startswith(f"{key}.")} for key in keys
    }
    numbers = {name: v for name, v in row.items() if not any(name.startswith(f"{key}.") for key in keys)}
    return numbers, media


def read_run(path: str | os.PathLike[str]) -> OfflineRun:
    """Read the run in the ``.wandb`` file ``path``, or in the run folder ``path``.

    A torn end is no error: see ``OfflineRun.truncated``. Raises FileNotFoundError if there is no such file, ValueError
    if it is not of this kind.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    file = find_file(path)
    run = OfflineRun(path=file)
    try:
        for data in _records(file.read_bytes(), file):
            record: Any = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(data)
            _take(run, record)
    except (_Damaged, DecodeError) as error:
        run.truncated, run.damage = True, str(error)
    return run


def _take(run: OfflineRun, record: Any) -> None:
    """Add what one record says to the run."""
    kind = record.WhichOneof("record_type")
    if kind == "run":
        said = record.run
        run.run_id, run.project, run.entity, run.name = said.run_id, said.project, said.entity, said.display_name
        run.group, run.job_type, run.tags = said.run_group, said.job_type, tuple(said.tags)
        run.config.update(_items(said.config.update))
    elif kind == "config":
        run.config.update(_items(record.config.update))
        for item in record.config.remove:
            run.config.pop(".".join(item.nested_key) or item.key, None)
    elif kind == "history":
        numbers, media = _split_media(_items(record.history.item))
        # A row that only carries a table or a picture has nothing to plot.
        if not media or numbers.keys() - set(AXES):
            run.history.append(numbers)
        for key, said in media.items():
            run.media[key] = said["_type"]
            run.files.setdefault(key, []).append(run.path.parent / "files" / said["path"])
    elif kind == "summary":
        run.summary.update(_split_media(_items(record.summary.update))[0])
        for item in record.summary.remove:
            run.summary.pop(".".join(item.nested_key) or item.key, None)
    elif kind == "metric":
        run.step_metrics[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    elif kind == "artifact":
        said = record.artifact
        held = (OfflineFile(e.path, e.size, Path(e.local_path)) for e in said.manifest.contents)
        run.artifacts.append(OfflineArtifact(said.name, said.type, tuple(said.aliases), tuple(held)))
    elif kind == "files":
        # Tables and pictures are listed here too; those are in `files`.
        saved = [run.path.parent / "files" / f.path for f in record.files.files if not f.path.startswith("media/")]
        run.saved += [path for path in saved if path not in run.saved]
    elif kind == "stats":
        when = record.stats.timestamp
        run.system.append({"time": when.seconds + when.nanos / 1e9, **_items(record.stats.item)})
    elif kind == "exit":
        run.exit_code = record.exit.exit_code
