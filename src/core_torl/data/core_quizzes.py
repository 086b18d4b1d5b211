"""The published concept quizzes of CORE: JSON lines or parquet, read with the file's known defects in view.

* A concept is a **run** of rows: a new one starts where the title changes or the question number does not grow.
  Titles are no key, for some name several theorems; and nothing here finds a concept by comparing texts.
* All runs of a repeated title carry the concept text of its **last** run, so the earlier runs are marked ``suspect``:
  their quizzes probably ask about another theorem than the one the coach would show.
* A row whose key names none of its options cannot be graded and is left out, by row number.
* The file was escaped twice; see ``latex.py``.
* The test set shares no concept with the training set: whole runs change sides, together with every run that has the
  same concept text or repeats one of their questions. (The released validation file was a part of the training file.)

The split does not depend on what else is dropped or cleaned, so runs with different options are tested on the same
concepts. Source: CORE, section 3.3.2; the test of this module holds the counts of the published file.
"""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from core_torl.data import latex as latex_text
from core_torl.data.base import ProblemSets
from core_torl.data.question_sets import normalised
from core_torl.data.records import read_file, read_json_lines
from core_torl.problem import LETTERS, Concept, Problem

_STRINGS = ("concept_title", "original_question", "answer", "explanation", "related_concept")
_MAY_BE_BLANK = ("answer", "explanation")  # without an answer a row is ungradable, not broken
_LISTED_LINES = 10  # an error stays one readable line, also for a file that is wrong throughout

_OPTION_PREFIX = re.compile(r"([A-J])[.)]\s*")
# "B", "B." or "B. the text of the option"; not "A, B, C, D" and not "All of the above".
_KEY = re.compile(r"([A-J])(?:[.)]?|[.)]\s*(.+))", re.DOTALL)
# Options that speak about their neighbours. A lone capital is the letter of an option only where no mathematics is
# meant: "Both A and B" is, "$A$ and $B$ are both bases" is not.
_ALL_OR_NONE = re.compile(
    r"\b(all|none|any|some|both|neither|either)\s+((of\s+)?the\s+above\b|of\s+(these|those|them)\W*$"
    r"|of\s+the\s+(other\s+)?(options|choices|answers|others)\b)",
    re.IGNORECASE,
)
_OTHER_LETTERS = re.compile(
    r"^([Bb]oth\s+|[Ee]ither\s+|[Nn]either\s+|[Oo]nly\s+)?[A-J](\s*,\s*[A-J])*,?\s+(and|or|nor)\s+[A-J](\s+only)?\W*$"
    r"|\b([Oo]ption|[Cc]hoice|[Aa]nswer)s?\s+\(?[A-J]\b"
)


@dataclass(frozen=True, slots=True)
class QuizRow:
    """One line of the file as it stands there; ``index`` counts from 0."""

    index: int
    title: str
    question_id: int
    stem: str
    options: tuple[str, ...]
    answer: str
    explanation: str
    concept_text: str

    @property
    def section(self) -> str:
        return self.title.partition(":")[0].strip()

    @property
    def name(self) -> str:
        section, _, name = self.title.partition(":")
        return name.strip() or section.strip()

    @property
    def option_texts(self) -> list[str]:
        return [_OPTION_PREFIX.sub("", option, count=1) for option in self.options]

    @property
    def has_duplicates(self) -> bool:
        """Two options of one text: two letters are right, or equally wrong."""
        return len({_plain(text) for text in self.option_texts}) < len(self.options)


@dataclass(frozen=True)
class CoreQuizzes:
    """Reads the quizzes and splits them by concept.

    ``path``: the JSON lines file, or a .parquet file of its columns.
    ``latex``: ``clean`` removes the second escaping, ``raw`` keeps the bytes of the file.
    ``suspect``: ``keep`` (marked in ``Concept.suspect``) or ``drop`` the quizzes of suspect concepts.
    ``test_fraction``: share of all rows in the test set, 0 up to but not 1; reached or just passed, as concepts are not
    cut. ``hold_out_sections``: sections of the book that go to the test set whole; they count towards the share.
    ``on_bad_row``: ``drop`` (and report) or ``error`` for rows that cannot be graded. ``seed``: of the split.
    """

    path: str
    latex: str = "clean"
    suspect: str = "keep"
    test_fraction: float = 0.1
    hold_out_sections: Sequence[str] = ()
    on_bad_row: str = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {"latex": ("clean", "raw"), "suspect": ("keep", "drop"), "on_bad_row": ("drop", "error")}
        for key, allowed in choices.items():
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"data.{key}={value!r}: use {' or '.join(allowed)}")
        share, sections = self.test_fraction, self.hold_out_sections
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share < 1:
            raise ValueError(f"data.test_fraction={share!r}: use a share from 0 up to, but not, 1")
        listed = isinstance(sections, Sequence) and not isinstance(sections, str)
        if not listed or not all(isinstance(name, str) for name in sections):
            raise ValueError(f"data.hold_out_sections={sections!r}: use a list of section names, [] for none")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"data.seed={self.seed!r}: use a whole number")

    def load(self) -> ProblemSets:
        """Problems of both sides and a report.

        Raises ``FileNotFoundError`` without the file, ``ValueError`` for rows that are no quizzes (all of them in one
        line, nothing is loaded by halves), an unknown section, or a split that leaves nothing to train on.
        """
        rows = read_rows(self.path)
        runs = split_runs(rows)
        concepts = self._concepts(runs)
        groups = disjoint_groups(runs)
        run_of = {row.index: r for r, run in enumerate(runs) for row in run}
        test_runs = self._test_runs(runs, groups)

        ungradable = {row.index: gold for row in rows if len(gold := gold_letter(row)) > 1}
        if ungradable and self.on_bad_row == "error":
            listed = _one_line([(index + 1, reason) for index, reason in ungradable.items()])
            raise ValueError(f"data.path={self.path}: {listed}; correct these answers or set data.on_bad_row=drop")

        train: list[Problem] = []
        test: list[Problem] = []
        dropped: list[dict[str, object]] = []
        for row in rows:
            concept = concepts[run_of[row.index]]
            if row.index in ungradable:
                dropped.append({"row": row.index, "reason": ungradable[row.index]})
            elif concept.suspect and self.suspect == "drop":
                dropped.append({"row": row.index, "reason": "suspect concept"})
            else:
                side = test if run_of[row.index] in test_runs else train
                side.append(self._problem(row, concept))
        if not train:
            raise ValueError(
                f"data.path={self.path}: no row is left to train on; lower data.test_fraction={self.test_fraction} "
                f"or shorten data.hold_out_sections={list(self.hold_out_sections)}"
            )

        asked = {normalised(problem.question) for problem in test}
        kept = sorted(train + test, key=lambda problem: problem.uid)
        report: dict[str, object] = {
            "path": str(self.path),
            "rows": len(rows),
            "runs": len(runs),
            "titles": len({row.title for row in rows}),
            "suspect_rows": sum(concepts[r].suspect for r in run_of.values()),
            "split_groups": len(set(groups)),
            "dropped": dropped,
            "kept": len(kept),
            "train": len(train),
            "test": len(test),
            "letters": dict(sorted(Counter(problem.answer for problem in kept).items())),
            "unpermutable": _row_numbers(kept, lambda problem: not problem.permutable),
            "duplicate_options": [row.index for row in rows if row.has_duplicates],
            # None by construction, which is about texts as they stand; here capitals and spacing do not count.
            "asked_in_test": len(asked & {normalised(problem.question) for problem in train}),
            "latex_faults": _row_numbers(kept, _has_latex_faults) if self.latex == "clean" else [],
        }
        return ProblemSets(train=train, test={"held_out": test}, report=report)

    def _text(self, text: str) -> str:
        return latex_text.clean(text).strip() if self.latex == "clean" else text

    def _concepts(self, runs: Sequence[Sequence[QuizRow]]) -> list[Concept]:
        last_run = {run[0].title: r for r, run in enumerate(runs)}
        return [
            Concept(
                uid=f"run-{r:04d}",
                name=self._text(run[0].name),
                section=run[0].section,
                text=self._text(run[0].concept_text),
                suspect=last_run[run[0].title] != r,
            )
            for r, run in enumerate(runs)
        ]

    def _problem(self, row: QuizRow, concept: Concept) -> Problem:
        options = tuple(self._text(option) for option in row.option_texts)
        return Problem(
            uid=f"row-{row.index:04d}",
            question=self._text(row.stem),
            answer=gold_letter(row),
            options=options,
            concept=concept,
            solution=self._text(row.explanation) or None,
            tags=(row.section,),
            permutable=not any(speaks_of_others(option) for option in options),
        )

    def _test_runs(self, runs: Sequence[Sequence[QuizRow]], groups: Sequence[int]) -> set[int]:
        """Numbers of the runs that are tested: the held-out sections first, then groups in seeded order."""
        sections = sorted({run[0].section for run in runs})
        for name in self.hold_out_sections:
            if name not in sections:
                nearest = max(sections, key=lambda s: difflib.SequenceMatcher(None, name.lower(), s.lower()).ratio())
                raise ValueError(f"data.hold_out_sections: no section {name!r} in {self.path}; nearest: {nearest!r}")
        chosen = {group for run, group in zip(runs, groups, strict=True) if run[0].section in self.hold_out_sections}
        sizes = Counter[int]()
        for run, group in zip(runs, groups, strict=True):
            sizes[group] += len(run)
        others = sorted(set(groups) - chosen)
        random.Random(self.seed).shuffle(others)
        wanted = self.test_fraction * sum(sizes.values()) - 1e-9  # a share like 0.1 is no exact binary number
        tested = sum(sizes[group] for group in chosen)
        for group in others:
            if tested >= wanted:
                break
            chosen.add(group)
            tested += sizes[group]
        return {r for r, group in enumerate(groups) if group in chosen}


def read_rows(path: str) -> list[QuizRow]:
    """All rows of the file, or one error that lists every line that is no quiz."""
    file = Path(path).expanduser()
    if not path or not file.is_file():
        raise FileNotFoundError(
            f"data.path={path!r}: no such file; pass data.path=/path/to/concept_quizzes.jsonl, the quiz file of CORE"
        )
    rows: list[QuizRow] = []
    wrong: list[tuple[int, str]] = []
    # Whatever its ending: the file is JSON lines unless it says that it is parquet.
    values = read_file(path) if file.suffix.lower() == ".parquet" else read_json_lines(file)
    try:
        for index, found in enumerate(values):
            row = found if isinstance(found, str) else _quiz(index, found)
            if isinstance(row, QuizRow):
                rows.append(row)
            else:
                wrong.append((index + 1, row))
    except (ValueError, OSError) as error:  # pyarrow's
        raise ValueError(f"data.path={path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not wrong:  # runs mean nothing with lines missing
        for run in split_runs(rows):
            first = run[0]
            text = f"its related_concept is not that of line {first.index + 1}, where its concept starts"
            wrong.extend((row.index + 1, text) for row in run if row.concept_text != first.concept_text)
    if wrong:
        raise ValueError(f"data.path={path}: {_one_line(wrong)}; correct or delete these lines, nothing was loaded")
    if not rows:
        raise ValueError(f"data.path={path}: the file is empty; pass the quiz file of CORE, one JSON object a line")
    return rows


def _quiz(index: int, values: object) -> QuizRow | str:
    """The row, or what is wrong with it."""
    if not isinstance(values, dict):
        return "not a JSON object"
    missing = [key for key in (*_STRINGS, "question_id", "options") if key not in values]
    if missing:
        return f"without the key {', '.join(missing)}"
    for key in _STRINGS:
        if not isinstance(values[key], str):
            return f"{key} is {type(values[key]).__name__}, not a string"
        if not values[key].strip() and key not in _MAY_BE_BLANK:
            return f"{key} is blank"
    number, options = values["question_id"], values["options"]
    if not isinstance(number, int) or isinstance(number, bool):
        return f"question_id is {type(number).__name__}, not a whole number"
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        return "options is not a list of strings"
    if not 2 <= len(options) <= len(LETTERS):
        return f"{len(options)} option(s), a quiz needs 2 to {len(LETTERS)}"
    for letter, option in zip(LETTERS, options, strict=False):
        prefix = _OPTION_PREFIX.match(option)
        if prefix is None or prefix.group(1) != letter or prefix.end() == len(option):
            return f"the option at place {letter} is not '{letter}. ' and a text"
    title, stem, answer, explanation, concept_text = (values[key] for key in _STRINGS)
    return QuizRow(index, title, number, stem, tuple(options), answer, explanation, concept_text)


def _one_line(faults: Sequence[tuple[int, str]]) -> str:
    shown = "; ".join(f"line {line}: {' '.join(what.split())}" for line, what in faults[:_LISTED_LINES])
    more = len(faults) - _LISTED_LINES
    return shown + (f"; and {more} more, to line {faults[-1][0]}" if more > 0 else "")


def split_runs(rows: Sequence[QuizRow]) -> list[list[QuizRow]]:
    """Rows cut into runs, one for each concept of the book."""
    runs: list[list[QuizRow]] = []
    for row in rows:
        previous = runs[-1][-1] if runs else None
        if previous is None or row.title != previous.title or row.question_id <= previous.question_id:
            runs.append([])
        runs[-1].append(row)
    return runs


def disjoint_groups(runs: Sequence[Sequence[QuizRow]]) -> list[int]:
    """For each run the number of its group: runs with an equal concept text or a question in common share one.

    Union-find; the number is that of the group's first run.
    """
    parent = list(range(len(runs)))

    def root(r: int) -> int:
        while parent[r] != r:
            parent[r] = parent[parent[r]]
            r = parent[r]
        return r

    first_with: dict[Hashable, int] = {}
    for r, run in enumerate(runs):
        texts = {("concept", row.concept_text) for row in run}
        stems = {("stem", latex_text.clean(row.stem).strip()) for row in run}
        for key in texts | stems:
            a, b = root(first_with.setdefault(key, r)), root(r)
            parent[max(a, b)] = min(a, b)
    return [root(r) for r in range(len(runs))]


def gold_letter(row: QuizRow) -> str:
    """The letter of the right option by the row's own ``answer``, or a sentence that says why there is none."""
    match = _KEY.fullmatch(row.answer.strip())
    if match is None:
        return f"the answer {row.answer!r} does not start with the letter of one option"
    letter, text = match.groups()
    place = LETTERS.index(letter)
    if place >= len(row.options):
        return f"the answer names option {letter}, the row has {len(row.options)} options"
    # Some rows are escaped once in the one place and twice in the other, hence the cleaned texts.
    if text is not None and _plain(text) != _plain(row.option_texts[place]):
        return f"the answer names option {letter} but quotes another text than that option's"
    return letter


def speaks_of_others(option: str) -> bool:
    """Whether an option (without its letter) depends on the order of all: "None of the above", "Both A and B"."""
    return bool(_ALL_OR_NONE.search(option) or _OTHER_LETTERS.search(option.strip()))


def _plain(text: str) -> str:
    """A text of the file for comparison with another one of the same row."""
    return " ".join(latex_text.clean(text).split())


def _has_latex_faults(problem: Problem) -> bool:
    texts = [
        problem.question,
        *problem.options,
        problem.solution or "",
        problem.concept.text if problem.concept else "",
    ]
    return any(latex_text.faults(text) for text in texts)


def _row_numbers(problems: Sequence[Problem], wanted: Callable[[Problem], bool]) -> list[int]:
    return [int(problem.uid.removeprefix("row-")) for problem in problems if wanted(problem)]
