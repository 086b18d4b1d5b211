"""A plain copy of what is logged, one JSON object a line: ``metrics.jsonl`` of numbers, ``rollouts.jsonl`` of answers.

It needs no account, no reader and no clean end of the run. A run that resumes from RL step k forgets the lines after k,
so each step stands in the file once and curves drawn from it are right. The file is opened for each line and closed
again: a killed run loses at most the line it was writing, and that torn line is dropped the next time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core_torl.tracking.metrics import STEP


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of such a file; a torn last line is left out.

    Raises FileNotFoundError if there is no such file, ValueError if a line before the last is no JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    # A whole line ends in a line break, so what follows the last one is empty or torn.
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row must be a JSON object")
        rows.append(row)
    return rows


class JsonlMirror:
    """Appends rows to ``path``, whose folder is made if need be; an existing file is continued.

    With ``resume_from_step=k``, rows whose RL step, under ``step_key``, is greater than k are dropped first. Numbers
    that are not finite are written as NaN and Infinity, which Python and pandas read: a loss that diverged must stay
    visible.
    """

    def __init__(self, path: str | os.PathLike[str], resume_from_step: int | None = None, step_key: str = STEP):
        self.path, self.step_key = Path(path), step_key
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.rewind(resume_from_step)

    def rewind(self, step: int | None) -> int:
        """Drop a torn last line and, unless ``step`` is None, the rows after RL step ``step``; how many rows went."""
        if not self.path.exists():
            return 0
        rows = read_jsonl(self.path)
        kept = [row for row in rows if step is None or row.get(self.step_key, 0) <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        # Written aside and moved over, so that a kill in between leaves the old file whole.
        aside = self.path.with_name(self.path.name + ".rewrite")
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)
        return len(rows) - len(kept)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is on its way to the disk when the call returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")
