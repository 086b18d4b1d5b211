"""Mathematics problems in the files of ToRL and of everything else that verl reads: one question and one answer a row.

A row has the columns ``data_source``, ``prompt`` (messages; the question is the last one of the user) and
``reward_model`` (``ground_truth``), and perhaps a ``solution``. Nothing else is read, so that it does not matter where
files differ: ``extra_info``, ``style`` (``stype`` in ToRL's own file), a system message before the question (the
instruction belongs to the model's prompt). Parquet, JSON lines and JSON lists are read alike.

* Test sets bear the name of their rows' ``data_source``. A slash becomes an underscore, as metrics are named by paths.
* ToRL's shipped test file holds every AIME question four times, which weighs nothing under greedy decoding but makes
  an interval look narrower than it is. Rows of one set with the same question and answer are folded into one.
* A training question that a test set asks too is left out of training (``on_leakage``).

Source: ToRL, sections 2.1 and 3.1; the tests of this module hold the counts of the published files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core_torl.data.question_sets import Bad, QuestionSets, Row
from core_torl.data.records import read_file

COLUMNS = ("data_source", "prompt", "reward_model")
OPTIONAL = ("solution",)
ENDINGS = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class TorlProblems(QuestionSets):
    """Reads training files and test files (.parquet, .jsonl, .json) of verl's form; see QuestionSets for the keys."""

    def read(self, key: str, path: str) -> tuple[list[Row], Bad]:
        return read_rows(path, key)


def read_rows(path: str, key: str = "path") -> tuple[list[Row], Bad]:
    """The rows of a file, and for each bad one its index from 0 and what is wrong. ``key``: the config key at fault.

    Raises ``FileNotFoundError`` without the file and ``ValueError`` for one that holds no such rows.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"data.{key}={path!r}: no such file; pass a .parquet, .jsonl or .json file of verl's form"
        )
    if file.suffix.lower() not in ENDINGS:
        raise ValueError(f"data.{key}={path}: the ending {file.suffix!r} is not known; use .parquet, .jsonl or .json")
    rows: list[Row] = []
    wrong: Bad = []
    try:
        for index, values in enumerate(read_file(path, COLUMNS, OPTIONAL)):
            row = values if isinstance(values, str) else _row(index, values)
            if isinstance(row, Row):
                rows.append(row)
            else:
                wrong.append((index, row))
    except (ValueError, OSError, NotImplementedError, RecursionError) as error:  # all but the last are pyarrow's, too
        raise ValueError(f"data.{key}={path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not rows and not wrong:
        raise ValueError(f"data.{key}={path}: the file is empty")
    return rows, wrong


def _row(index: int, values: object) -> Row | str:
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
    return Row(index, source.strip(), question.strip(), answer.strip(), worked or None)
