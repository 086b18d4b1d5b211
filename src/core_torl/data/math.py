r"""Questions with verifiable answers from anywhere: files of any columns, data sets of the hub, folders like one.

Where question and answer stand in a row is said by dotted paths (``problem``, ``prompt.-1.content``). The answer may be
a value as it stands, the last ``\boxed{...}`` of a worked solution, or what follows the last ``####`` of one (GSM8K).
Files (.parquet, .jsonl, .json, .csv) are read row by row and ``limit`` ends the reading, so a huge file costs no more
than the rows that are taken. Anything else is a name on the hub or a folder, which ``datasets`` loads.
Test sets bear the name of their file, or what ``source`` finds in their rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core_torl.data.question_sets import Bad, QuestionSets, Row, stem_of
from core_torl.data.records import ENDINGS, last_box, lookup, read_file, read_hub

_NOT_PLAIN = re.compile(r"[^\w.+-]+")  # a split may be "train[:10%]"

ANSWERS = ("value", "boxed", "hashes")


@dataclass(frozen=True)
class MathProblems(QuestionSets):
    """Reads rows of any columns; see QuestionSets for the keys that say what becomes of them.

    ``question``: dotted path of the question, or a list of them whose texts are joined by a space. ``answer``: that of
    the answer. ``answer_from``: what the answer is in there, ``value``, ``boxed`` or ``hashes``. ``solution``: dotted
    path of a worked solution; None takes the text that the answer was found in, where that is more than the answer.
    ``source``: dotted path of the name of a row's test set. ``config``, ``split``, ``test_split``, ``revision``,
    ``streaming``: for the hub. ``limit``: rows read of each file or split, from its start; None reads all.
    """

    question: str | Sequence[str] = "question"
    answer: str = "answer"
    answer_from: str = "value"
    solution: str | None = None
    source: str | None = None
    config: str | None = None
    split: str = "train"
    test_split: str = "test"
    revision: str | None = None
    streaming: bool = False
    limit: int | None = None

    may_only_test = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_from not in ANSWERS:
            raise ValueError(f"data.answer_from={self.answer_from!r}: use {', '.join(ANSWERS)}")
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise ValueError(f"data.limit={self.limit!r}: use a number of rows, or null for all")
        if not self.question or not self.answer:
            raise ValueError("data.question and data.answer: name the columns that hold them")

    def place(self, key: str, path: str) -> str:
        return path if is_file_name(path) else f"{path}:{self._split(key)}"

    def stem(self, key: str, path: str) -> str:
        """A data set's splits have rows of the same numbers, so the split stands in their names."""
        return stem_of(path) if is_file_name(path) else f"{stem_of(path)}.{_NOT_PLAIN.sub('_', self._split(key))}"

    def _split(self, key: str) -> str:
        return self.test_split if key == "test_path" else self.split

    def read(self, key: str, path: str) -> tuple[list[Row], Bad]:
        if is_file_name(path):
            if not Path(path).expanduser().is_file():
                raise FileNotFoundError(f"data.{key}={path!r}: no such file")
            values = read_file(path)
        elif Path(path).expanduser().is_file():
            raise ValueError(f"data.{key}={path}: a local file must end in {', '.join(ENDINGS)}")
        else:
            values = read_hub(path, self.config, self._split(key), self.revision, self.streaming)
        rows: list[Row] = []
        wrong: Bad = []
        try:
            for index, value in enumerate(values):
                if self.limit is not None and index >= self.limit:
                    break
                row = value if isinstance(value, str) else self._row(index, value, stem_of(path))
                if isinstance(row, Row):
                    rows.append(row)
                else:
                    wrong.append((index, row))
        except (ValueError, OSError, NotImplementedError, RecursionError) as error:
            raise ValueError(f"data.{key}={path}: cannot be read: {' '.join(str(error).split())[:700]}") from error
        if not rows and not wrong:
            raise ValueError(f"data.{key}={path}: there are no rows in it")
        if not rows:
            raise ValueError(
                f"data.{key}={path}: none of {len(wrong)} rows can be used; row {wrong[0][0]}: {wrong[0][1]}"
            )
        return rows, wrong

    def _row(self, index: int, values: object, name: str) -> Row | str:
        """The row, or what is wrong with it, beginning with the key at fault."""
        paths = [self.question] if isinstance(self.question, str) else self.question
        parts = [lookup(values, path) for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if not isinstance(part, str) or not part.strip():
                return f"{path} is {'missing' if part is None else 'no text or blank'}"
        found = _text(lookup(values, self.answer))
        if found is None:
            return f"{self.answer} is missing, blank or no text"
        answer = found
        if self.answer_from == "boxed":
            answer = last_box(found) or ""
            if not answer:
                return rf"{self.answer} holds no \boxed{{...}} that closes"
        if self.answer_from == "hashes":
            _, mark, answer = found.rpartition("####")
            answer = answer.strip().replace(",", "")
            if not mark or not answer:
                return f"{self.answer} holds no #### with an answer behind it"
        worked = lookup(values, self.solution) if self.solution else found if answer != found else None
        source = lookup(values, self.source) if self.source else name
        if not isinstance(source, str) or not source.strip():
            return f"{self.source} is missing, blank or no text"
        question = " ".join(str(part).strip() for part in parts)
        solution = worked.strip() if isinstance(worked, str) else ""
        return Row(index, source.strip(), question, answer, solution or None)


def is_file_name(path: str) -> bool:
    """Whether ``path`` names a single local file rather than a data set of the hub or a folder."""
    return Path(path).suffix.lower() in ENDINGS and not Path(path).expanduser().is_dir()


def _text(value: object) -> str | None:
    """An answer as text; numbers as they stand, a list of one as its element."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    return value.strip() if isinstance(value, str) and value.strip() else None
