"""From rows of questions and answers to problems: held-out questions, named test sets, duplicates and leakage.

Two questions are the same if their normalised texts are (see ``normalised``). A training question that a test set asks
too is *leaked*: a policy that was trained on it is tested on what it has seen. It is counted for each test set and, as
``on_leakage`` says, left out, kept and reported, or refused. Every count stands in the report, which goes to the run's
log and its results.

A held-out question is chosen by a hash of its own text and the seed, so that it is held out wherever it stands: rows
that are added, taken away or sorted move no other question between training and test.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from core_torl.data.base import ProblemSets
from core_torl.problem import Problem

LISTED_ROWS = 10  # an error stays one readable line, also for a file that is wrong throughout

# Spacing and sizing that typesets a formula and says nothing, and the signs that a formula is set between.
_SPACING = re.compile(r"\\[,;:!> ]|\\(?:quad|qquad|left|right|displaystyle)(?![A-Za-z])|[\s~$]+")


def normalised(text: str) -> str:
    """A question's text for comparison: without spacing, dollar signs, capitals or the sign at its end."""
    plain = unicodedata.normalize("NFC", text).casefold()
    plain = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", plain)
    return _SPACING.sub("", plain).rstrip(".?!:")


@dataclass(frozen=True, slots=True)
class Row:
    """One row; ``index`` counts from 0."""

    index: int
    source: str
    question: str
    answer: str
    solution: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What makes two rows one problem."""
        return normalised(self.question), " ".join(self.answer.split())


Named = tuple[str, Row]  # a row with the name of its file
Bad = list[tuple[int, str]]  # index from 0, and what is wrong


@dataclass(frozen=True)
class QuestionSets:
    """Training files and test files, or training files of which a part is held out.

    ``path``, ``test_path``: a file or a list of files; ``test_path`` None holds out each distinct training question
    with probability ``test_fraction`` (0 up to but not 1), by a hash of ``seed`` and the question. Of n questions the
    share f comes out within about 2 * sqrt(f * (1 - f) / n): 10% of 1,000 is 8.1% to 11.9%; of a few it may be none.
    ``deduplicate_test``: fold rows of one test set that ask the same and have one answer; ``deduplicate_train``: the
    same in training. ``on_leakage``: ``drop`` training rows that a test set asks too, ``report`` and keep them, or
    ``error``. ``test_names``: data source -> name of its set. ``on_bad_row``: ``drop`` (and report) or ``error`` for
    rows without a question or an answer.
    """

    path: str | Sequence[str] | None
    test_path: str | Sequence[str] | None = None
    deduplicate_test: bool = True
    deduplicate_train: bool = False
    on_leakage: str = "drop"
    test_names: Mapping[str, str] = field(default_factory=dict)
    on_bad_row: str = "drop"
    test_fraction: float = 0.1
    seed: int = 0

    #: Whether ``path`` may be None: nothing to train on, only test sets.
    may_only_test = False

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("drop", "error"):
            raise ValueError(f"data.on_bad_row={self.on_bad_row!r}: use drop or error")
        if self.on_leakage not in ("drop", "report", "error"):
            raise ValueError(f"data.on_leakage={self.on_leakage!r}: use drop, report or error")
        for key in ("path", "test_path"):
            value = getattr(self, key)
            listed = [value] if isinstance(value, str) else value
            if value is None and (key == "test_path" or (self.may_only_test and self.test_path is not None)):
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

    def read(self, key: str, path: str) -> tuple[list[Row], Bad]:
        """The good rows and the bad ones of one file. ``key``: the config key that names it, for messages."""
        raise NotImplementedError

    def load(self) -> ProblemSets:
        """Problems of both sides and a report.

        Raises ``FileNotFoundError`` without a file and ``ValueError`` for a file that cannot be read, for rows without
        a question or an answer (with ``on_bad_row=error``), for leaked rows (with ``on_leakage=error``), for a name in
        ``test_names`` that no row bears, for two problems with one uid, and where nothing is left to train on.
        """
        dropped: list[dict[str, object]] = []
        counts: dict[str, int] = {}
        names: set[str] = set()
        train_rows = [] if self.path is None else self._read("path", self.path, dropped, counts, names)
        held_out: dict[str, int] | None = None
        if self.test_path is None:
            train_rows, test_rows = self._hold_out(train_rows)
            both = [len({normalised(row.question) for _, row in part}) for part in (test_rows, train_rows)]
            held_out = {"questions": both[0], "of": sum(both)}
        else:
            test_rows = self._read("test_path", self.test_path, dropped, counts, names)
        named = [*train_rows, *test_rows] if self.test_path is None else test_rows
        test, folded = self._test_sets(named, test_rows)
        kept, leakage, leaked = self._without_leaks(train_rows, test)
        repeated = len(kept) - len({row.key for _, row in kept})
        if self.deduplicate_train:
            unique: dict[tuple[str, str], Named] = {}
            for entry in kept:
                unique.setdefault(entry[1].key, entry)
            kept = list(unique.values())
        if not kept and self.path is not None:
            reason = f"; the first: {dropped[0]['row']}: {dropped[0]['reason']}" if dropped else ""
            raise ValueError(
                f"data.path={self.path}: no row is left to train on ({len(dropped)} dropped, "
                f"{len(leaked)} asked in a test set too{reason})"
            )
        train = [problem_of(name, row) for name, row in kept]
        _check_uids([*train, *(problem for part in test.values() for problem in part)])
        report: dict[str, object] = {
            "path": self.path if isinstance(self.path, str | None) else list(self.path),
            "rows": counts,
            "dropped": dropped,
            "folded": folded,
            "asked_in_test": len(leaked),
            "leakage": leakage,
            "leaked_rows": leaked[:LISTED_ROWS],
            "on_leakage": self.on_leakage,
            "train": len(train),
            "test": {name: len(problems) for name, problems in test.items()},
            "held_out": held_out,
            "repeated_in_train": repeated,
            "folded_in_train": repeated if self.deduplicate_train else 0,
        }
        return ProblemSets(train=train, test=test, report=report)

    def _without_leaks(
        self, rows: list[Named], test: Mapping[str, Sequence[Problem]]
    ) -> tuple[list[Named], dict[str, int], list[str]]:
        """The rows to train on, how many training rows each test set asks, and the names of all such rows."""
        asked = {name: {normalised(p.question) for p in problems} for name, problems in test.items()}
        everywhere = set().union(*asked.values())
        texts = [normalised(row.question) for _, row in rows]
        by_set = {name: n for name, known in asked.items() if (n := sum(text in known for text in texts))}
        leaked = [
            f"{name}-{row.index:05d}" for (name, row), text in zip(rows, texts, strict=True) if text in everywhere
        ]
        if leaked and self.on_leakage == "error":
            listed = ", ".join(f"{count} of {name!r}" for name, count in by_set.items())
            raise ValueError(
                f"data.path={self.path}: {len(leaked)} training rows are asked in a test set too ({listed}; the first: "
                f"{leaked[0]}); set data.on_leakage=drop to leave them out, or report to keep them"
            )
        if self.on_leakage != "drop":
            return rows, by_set, leaked
        return [e for e, text in zip(rows, texts, strict=True) if text not in everywhere], by_set, leaked

    def _read(
        self,
        key: str,
        paths: str | Sequence[str],
        dropped: list[dict[str, object]],
        counts: dict[str, int],
        names: set[str],
    ) -> list[Named]:
        """All good rows, each with the name of its file; what is bad goes to ``dropped`` or ends the run.

        ``counts`` and ``names``: places and names of the files so far, on both sides; those read here are added.
        """
        found: list[Named] = []
        for path in [paths] if isinstance(paths, str) else paths:
            place = self.place(key, path)
            if place in counts:
                raise ValueError(f"data.{key}={path}: the file is named twice in data.path and data.test_path")
            rows, wrong = self.read(key, path)
            if wrong and self.on_bad_row == "error":
                raise ValueError(
                    f"data.{key}={path}: {one_line(wrong)}; correct these rows or set data.on_bad_row=drop"
                )
            counts[place] = len(rows) + len(wrong)
            # A problem's uid comes from the name of its file, so two files of one name are told apart by number.
            stem = self.stem(key, path)
            numbered = (f"{stem}.{number}" for number in itertools.count(2))
            name = next(name for name in itertools.chain([stem], numbered) if name not in names)
            names.add(name)
            dropped.extend({"row": f"{name}-{index:05d}", "reason": reason} for index, reason in wrong)
            found += [(name, row) for row in rows]
        return found

    def place(self, key: str, path: str) -> str:
        """What tells one source of rows from another."""
        return path

    def stem(self, key: str, path: str) -> str:
        """What the uids of a source's problems begin with, where no other source is called the same."""
        return stem_of(path)

    def _hold_out(self, rows: Sequence[Named]) -> tuple[list[Named], list[Named]]:
        """Training and test rows. Rows with one question stay together, so no test question is trained on."""
        train: list[Named] = []
        test: list[Named] = []
        for entry in rows:
            (test if place_of(entry[1].question, self.seed) < self.test_fraction else train).append(entry)
        return train, test

    def _test_sets(
        self, named: Sequence[Named], rows: Sequence[Named]
    ) -> tuple[dict[str, list[Problem]], dict[str, int]]:
        """Test problems by the name of their set, for each source among ``named``, and how many rows were folded."""
        sources = {row.source for _, row in named}
        unknown = [source for source in self.test_names if source not in sources]
        if unknown:
            known = ", ".join(sorted(sources)[:LISTED_ROWS])
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
            sets[name].append(problem_of(file, row))
        return sets, dict(folded)


def place_of(question: str, seed: int) -> float:
    """A number from 0 up to, but not, 1, that depends on the normalised question and the seed alone."""
    digest = hashlib.sha256(f"{seed}/{normalised(question)}".encode(errors="surrogatepass")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # as many bits as a float holds exactly


def _check_uids(problems: Sequence[Problem]) -> None:
    uid, count = next(iter(Counter(problem.uid for problem in problems).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"data: {count} problems have the uid {uid}; a uid must be that of one problem, in all sets")


def problem_of(file: str, row: Row) -> Problem:
    """The uid is the row's place: the files' own ids repeat, within a file and between files."""
    return Problem(f"{file}-{row.index:05d}", row.question, row.answer, solution=row.solution, tags=(row.source,))


def stem_of(path: str) -> str:
    return Path(path.rstrip("/")).stem


def one_line(faults: Bad) -> str:
    shown = "; ".join(f"row {index}: {' '.join(what.split())}" for index, what in faults[:LISTED_ROWS])
    more = len(faults) - LISTED_ROWS
    return shown + (f"; and {more} more, to row {faults[-1][0]}" if more > 0 else "")
