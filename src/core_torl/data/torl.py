"""Mathematics problems in the files of ToRL and of everything else that verl reads: one question and one answer a row.

A row has the columns ``data_source``, ``prompt`` (messages; the question is the last one of the user) and
``reward_model`` (``ground_truth``), and perhaps a ``solution``. Nothing else is read, so that it does not matter where
files differ: ``extra_info``, ``style`` (``stype`` in ToRL's own file), a system message before the question (the
instruction belongs to the model's prompt). Parquet, JSON lines and JSON lists are read alike.

* Test sets bear the name of their rows' ``data_source``. A slash becomes an underscore, as metrics are named by paths.
* ToRL's shipped test file holds every AIME question four times, which weighs nothing under greedy decoding but makes
  an interval look narrower than it is. Rows of one set with the same question and answer are folded into one.
* A training question that a test set asks too is left out of training.

Source: ToRL, sections 2.1 and 3.1; the tests of this module hold the counts of the published files.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core_torl.data.base import ProblemSets
from core_torl.problem import Problem

COLUMNS = ("data_source", "prompt", "reward_model")
OPTIONAL = ("solution",)
_LISTED_ROWS = 10  # an error stays one readable line, also for a file that is wrong throughout


@dataclass(frozen=True, slots=True)
class TorlRow:
    """One row; ``index`` counts from 0."""

    index: int
    source: str
    question: str
    answer: str
    solution: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What makes two rows one problem; spacing aside."""
        return _plain(self.question), _plain(self.answer)


@dataclass(frozen=True)
class TorlProblems:
    """Reads training files and test files, or holds a part of the training files out.

    ``path``, ``test_path``: a file or a list of files (.parquet, .jsonl, .json); ``test_path`` None holds out
    ``test_fraction`` of the distinct training questions (0 up to but not 1, rounded up) in an order from ``seed``.
    ``deduplicate_test``: fold rows of one test set that ask the same. ``test_names``: data source -> name of its set.
    ``on_bad_row``: ``drop`` (and report) or ``error`` for rows without a question or an answer.
    """

    path: str | Sequence[str]
    test_path: str | Sequence[str] | None = None
    deduplicate_test: bool = True
    test_names: Mapping[str, str] = field(default_factory=dict)
    on_bad_row: str = "drop"
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("drop", "error"):
            raise ValueError(f"data.on_bad_row={self.on_bad_row!r}: use drop or error")
        for key in ("path", "test_path"):
            value = getattr(self, key)
            listed = [value] if isinstance(value, str) else value
            if key == "test_path" and value is None:
                continue
            if not isinstance(listed, Sequence) or not listed or not all(isinstance(x, str) and x for x in listed):
                raise ValueError(f"data.{key}={value!r}: use a file or a list of files")
        share = self.test_fraction
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share < 1:
            raise ValueError(f"data.test_fraction={share!r}: use a share from 0 up to, but not, 1")
        if not isinstance(self.test_names, Mapping):
            raise ValueError(
                f"data.test_names={self.test_names!r}: use names by data source, e.g. {{deepscaler: aime24}}"
            )
        for source, name in self.test_names.items():
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(f"data.test_names: {name!r} for {source!r}; use a name without a slash")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"data.seed={self.seed!r}: use a whole number")

    def load(self) -> ProblemSets:
        """Problems of both sides and a report.

        Raises ``FileNotFoundError`` without a file and ``ValueError`` for a file that cannot be read, for rows without
        a question or an answer (with ``on_bad_row=error``), for a name in ``test_names`` that no row bears, and where
        nothing is left to train on.
        """
        dropped: list[dict[str, object]] = []
        counts: dict[str, int] = {}
        train_rows = self._read("path", self.path, dropped, counts)
        if self.test_path is None:
            train_rows, test_rows = self._hold_out(train_rows)
        else:
            test_rows = self._read("test_path", self.test_path, dropped, counts)
        test, folded = self._test_sets([*train_rows, *test_rows] if self.test_path is None else test_rows, test_rows)
        asked = {_plain(row.question) for _, row in test_rows}
        kept = [(name, row) for name, row in train_rows if _plain(row.question) not in asked]
        if not kept:
            reason = f"; the first: {dropped[0]['row']}: {dropped[0]['reason']}" if dropped else ""
            raise ValueError(
                f"data.path={self.path}: no row is left to train on ({len(dropped)} dropped, "
                f"{len(train_rows) - len(kept)} asked in a test set too{reason})"
            )
        train = [_problem(name, row) for name, row in kept]
        report: dict[str, object] = {
            "path": self.path if isinstance(self.path, str) else list(self.path),
            "rows": counts,
            "dropped": dropped,
            "folded": folded,
            "asked_in_test": len(train_rows) - len(kept),
            "train": len(train),
            "test": {name: len(problems) for name, problems in test.items()},
            "repeated_in_train": len(kept) - len({row.key for _, row in kept}),
        }
        return ProblemSets(train=train, test=test, report=report)

    def _read(
        self,
        key: str,
        paths: str | Sequence[str],
        dropped: list[dict[str, object]],
        counts: dict[str, int],
    ) -> list[tuple[str, TorlRow]]:
        """All good rows, each with the name of its file; what is bad goes to ``dropped`` or ends the run."""
        found: list[tuple[str, TorlRow]] = []
        for path in [paths] if isinstance(paths, str) else paths:
            if path in counts:
                raise ValueError(f"data.{key}={path}: the file is named twice in data.path and data.test_path")
            rows, wrong = read_rows(path, key)
            if wrong and self.on_bad_row == "error":
                raise ValueError(
                    f"data.{key}={path}: {_one_line(wrong)}; correct these rows or set data.on_bad_row=drop"
                )
            counts[path] = len(rows) + len(wrong)
            # A problem's uid comes from the name of its file, so two files of one name are told apart by number.
            stem = Path(path).stem
            same = sum(Path(other).stem == stem for other in counts)
            name = stem if same == 1 else f"{stem}.{same}"
            dropped.extend({"row": f"{name}-{index:05d}", "reason": reason} for index, reason in wrong)
            found += [(name, row) for row in rows]
        return found

    def _hold_out(
        self, rows: Sequence[tuple[str, TorlRow]]
    ) -> tuple[list[tuple[str, TorlRow]], list[tuple[str, TorlRow]]]:
        """Training and test rows. Rows with one question stay together, so no test question is trained on."""
        questions = list(dict.fromkeys(_plain(row.question) for _, row in rows))
        random.Random(self.seed).shuffle(questions)
        count = math.ceil(self.test_fraction * len(questions) - 1e-9)  # a share like 0.1 is no exact binary number
        held = set(questions[:count])
        train = [entry for entry in rows if _plain(entry[1].question) not in held]
        return train, [entry for entry in rows if _plain(entry[1].question) in held]

    def _test_sets(
        self, named: Sequence[tuple[str, TorlRow]], rows: Sequence[tuple[str, TorlRow]]
    ) -> tuple[dict[str, list[Problem]], dict[str, int]]:
        """Test problems by the name of their set, for each source among ``named``, and how many rows were folded."""
        sources = {row.source for _, row in named}
        unknown = [source for source in self.test_names if source not in sources]
        if unknown:
            known = ", ".join(sorted(sources)[:_LISTED_ROWS])
            raise ValueError(f"data.test_names: no test row has the data_source {unknown[0]!r}; there are: {known}")
        names = {row.source: self.test_names.get(row.source, row.source.replace("/", "_")) for _, row in named}
        sets: dict[str, list[Problem]] = {name: [] for name in names.values()}
        folded = Counter[str]()
        seen: set[tuple[str, tuple[str, str]]] = set()
        for file, row in rows:
            name = names[row.source]
            if self.deduplicate_test and (name, row.key) in seen:
                folded[name] += 1
                continue
            seen.add((name, row.key))
            sets[name].append(_problem(file, row))
        return sets, dict(folded)


def read_rows(path: str, key: str = "path") -> tuple[list[TorlRow], list[tuple[int, str]]]:
    """The rows of a file, and for each bad one its index from 0 and what is wrong. ``key``: the config key at fault.

    Raises ``FileNotFoundError`` without the file and ``ValueError`` for one that holds no such rows.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"data.{key}={path!r}: no such file; pass a .parquet, .jsonl or .json file of verl's form"
        )
    readers = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json_list}
    if file.suffix.lower() not in readers:
        raise ValueError(f"data.{key}={path}: the ending {file.suffix!r} is not known; use .parquet, .jsonl or .json")
    rows: list[TorlRow] = []
    wrong: list[tuple[int, str]] = []
    try:
        for index, values in enumerate(readers[file.suffix.lower()](file)):
            row = values if isinstance(values, str) else _row(index, values)
            if isinstance(row, TorlRow):
                rows.append(row)
            else:
                wrong.append((index, row))
    except (ValueError, OSError, NotImplementedError, RecursionError) as error:  # all but the last are pyarrow's, too
        raise ValueError(f"data.{key}={path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not rows and not wrong:
        raise ValueError(f"data.{key}={path}: the file is empty")
    return rows, wrong


def _parquet(file: Path) -> Iterator[object]:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    names = table.schema_arrow.names
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(f"without the column {', '.join(missing)}")
    for batch in table.iter_batches(columns=[name for name in (*COLUMNS, *OPTIONAL) if name in names]):
        yield from batch.to_pylist()


def _json_lines(file: Path) -> Iterator[object]:
    # Bytes, so that a line ends at a line feed only.
    with file.open("rb") as lines:
        for line in lines:
            try:
                yield json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield "not UTF-8"
            except (ValueError, RecursionError):
                yield "not valid JSON" if line.strip() else "blank line"


def _json_list(file: Path) -> Iterator[object]:
    values = json.loads(file.read_bytes().decode("utf-8"))
    if not isinstance(values, list):
        raise ValueError("not a JSON list of rows")
    yield from values


def _row(index: int, values: object) -> TorlRow | str:
    """The row, or what is wrong with it, beginning with the key at fault."""
    if not isinstance(values, Mapping):
        return "not an object with the keys " + ", ".join(COLUMNS)
    source, messages, rule = (values.get(key) for key in COLUMNS)
    if not isinstance(source, str) or not source.strip():
        return "data_source is missing" if source is None else "data_source is no text or blank"
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return "prompt is missing" if messages is None else "prompt is no list of messages"
    questions = [m.get("content") for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
    if not questions:
        return "prompt holds no message of the user"
    question = questions[-1]
    if not isinstance(question, str) or not question.strip():
        return "prompt: the user's last message is blank or no text"
    answer = rule.get("ground_truth") if isinstance(rule, Mapping) else None
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)  # a JSON file may hold numbers
    if not isinstance(answer, str):
        return "reward_model.ground_truth is missing or no text"
    if not answer.strip():
        return "reward_model.ground_truth is blank"
    solution = values.get("solution")
    worked = solution.strip() if isinstance(solution, str) else ""
    return TorlRow(index, source.strip(), question.strip(), answer.strip(), worked or None)


def _problem(file: str, row: TorlRow) -> Problem:
    """The uid is the row's place: the files' own ids repeat, within a file and between files."""
    return Problem(f"{file}-{row.index:05d}", row.question, row.answer, solution=row.solution, tags=(row.source,))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _one_line(faults: Sequence[tuple[int, str]]) -> str:
    shown = "; ".join(f"row {index}: {' '.join(what.split())}" for index, what in faults[:_LISTED_ROWS])
    more = len(faults) - _LISTED_ROWS
    return shown + (f"; and {more} more, to row {faults[-1][0]}" if more > 0 else "")
