"""Reading rows out of files and of the hub, so that each bad row is known by its number and none hides the others.

A reader yields one value for each row: what the row holds, or a text that says why it cannot be read. What is wrong
with the whole file is a ``ValueError``. Local files are read directly and row by row: the library ``datasets`` makes an
Arrow copy of a whole file first, refuses all of it for one bad line, and guesses types (a CSV answer 007 becomes 7).
Data sets of the hub, and local folders laid out like one, go through ``datasets``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ENDINGS = (".parquet", ".jsonl", ".json", ".csv")


def read_file(path: str, columns: Sequence[str] = (), optional: Sequence[str] | None = None) -> Iterator[object]:
    """The rows of a file in one of the ``ENDINGS``, as dictionaries; a text stands for a row that cannot be read.

    ``columns`` must be in a parquet file; where ``optional`` is given, only these and ``columns`` are read from it.
    Raises ``ValueError`` (and what pyarrow raises, which is one) for a file that cannot be read as a whole.
    """
    file = Path(path).expanduser()
    ending = file.suffix.lower()
    if ending == ".parquet":
        return _parquet(file, columns, optional)
    return {".jsonl": read_json_lines, ".json": _json_list, ".csv": _csv}[ending](file)


def _parquet(file: Path, columns: Sequence[str], optional: Sequence[str] | None) -> Iterator[object]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    names = table.schema_arrow.names
    missing = [name for name in columns if name not in names]
    if missing:
        raise ValueError(f"without the column {', '.join(missing)}")
    wanted = None if optional is None else [name for name in (*columns, *optional) if name in names]
    for batch in table.iter_batches(columns=wanted):
        yield from batch.to_pylist()


def read_json_lines(file: Path) -> Iterator[object]:
    """One value for each line; a text stands for a line that is not JSON."""
    # Bytes, so that a line ends at a line feed only and a wrong encoding is known by its line.
    with file.open("rb") as lines:
        for line in lines:
            try:
                yield _row(json.loads(line.decode("utf-8")))
            except UnicodeDecodeError:
                yield "not UTF-8"
            except (ValueError, RecursionError):
                yield "not valid JSON" if line.strip() else "blank line"


def _json_list(file: Path) -> Iterator[object]:
    values = json.loads(file.read_bytes().decode("utf-8"))
    if not isinstance(values, list):
        raise ValueError("not a JSON list of rows")
    yield from map(_row, values)


def _row(value: object) -> object:
    """The value, unless it is a text, which would be taken for what is wrong with the row."""
    return "a text, not a JSON object" if isinstance(value, str) else value


def _csv(file: Path) -> Iterator[object]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            for values in csv.DictReader(lines, strict=True):
                extra, short = values.pop(None, None), [name for name, value in values.items() if value is None]  # pyright: ignore[reportCallIssue, reportArgumentType]
                if extra or short:
                    yield f"{'more' if extra else 'fewer'} values than columns"
                else:
                    yield values
        except csv.Error as error:
            raise ValueError(f"not CSV: {error}") from error


def read_hub(name: str, config: str | None, split: str, revision: str | None, streaming: bool) -> Iterator[object]:
    """The rows of one split of a data set on the hub, or of a local folder laid out like one.

    ``streaming`` fetches rows as they are asked for instead of storing the whole split first. Raises ``ValueError``
    on one line with what went wrong: not reachable, no such data set, no such split, a row or a file that is broken.
    """
    import datasets
    from datasets.exceptions import DatasetBuildError, DatasetsError
    from pyarrow import ArrowException

    try:
        rows: Any = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        yield from rows
    except (DatasetsError, ArrowException, OSError, ValueError, RuntimeError, NotImplementedError) as error:
        causes = _causes(error)
        broken = any(isinstance(cause, (DatasetBuildError, ArrowException)) for cause in causes)
        # ``datasets`` only says that building failed; why, stands in the cause.
        said = causes[-1] if isinstance(error, DatasetBuildError) else error
        first = " ".join(str(said).split()) or type(said).__name__
        advice = (
            f"correct the data of {name}, or give its files by name, of which bad rows are left out and listed"
            if broken
            else "check the name, go online, or give a local file"
        )
        raise ValueError(f"{first[:300]}; {advice}") from error


def _causes(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on."""
    found = [error]
    while (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


def lookup(values: object, path: str) -> object:
    """What stands at a dotted path such as ``prompt.-1.content`` (numbers index lists); None where there is nothing."""
    if isinstance(values, Mapping) and path in values:
        return values[path]
    found: object = values
    for part in path.split("."):
        if isinstance(found, Mapping):
            found = found.get(part)
        elif isinstance(found, Sequence) and not isinstance(found, str) and part.lstrip("-").isdigit():
            place = int(part)
            found = found[place] if -len(found) <= place < len(found) else None
        else:
            return None
    return found


def last_box(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` (or ``\fbox``) whose braces close, None without one."""
    for mark in (r"\boxed{", r"\fbox{"):
        start = text.rfind(mark)
        while start >= 0:
            depth, begin = 1, start + len(mark)
            for place in range(begin, len(text)):
                escaped = text[place - 1] == "\\" and text[place - 2 : place] != "\\\\"
                depth += 0 if escaped else (text[place] == "{") - (text[place] == "}")
                if depth == 0:
                    return text[begin:place].strip()
            start = text.rfind(mark, 0, start)
    return None
