"""The published quizzes: each rule on a small file that shows it, then the counts of the real file."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from core_torl.data.core_quizzes import CoreQuizzes, disjoint_groups, read_rows, speaks_of_others, split_runs
from core_torl.data.latex import faults
from core_torl.problem import Problem


def quiz(title="Rank: Definition", number=1, stem=None, concept=None, answer="B. two", options=None, **more):
    return {
        "concept_title": title,
        "question_id": number,
        "original_question": stem or f"{title} {number}?",
        "options": options or ["A. one", "B. two", "C. three", "D. four"],
        "answer": answer,
        "explanation": "Because.",
        "related_concept": concept or f"Text of {title}.",
        **more,
    }


def book(concepts=10, questions=3):
    return [quiz(f"Part {c % 3}: Theorem {c}", q) for c in range(concepts) for q in range(1, questions + 1)]


@pytest.fixture
def load(tmp_path):
    def write_and_load(rows, **options):
        path = tmp_path / "quizzes.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return CoreQuizzes(str(path), **{"test_fraction": 0.0, **options}).load()

    return write_and_load


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def concept_of(problem: Problem) -> str:
    assert problem.concept is not None
    return problem.concept.uid


def test_a_row_becomes_a_problem(load):
    row = quiz("Rank: Definition", 1, "What is $\\\\frac{1}{2}$?", "First.\\nSecond.", explanation="Use $\\\\times$.")
    (problem,) = load([row]).train
    assert problem.uid == "row-0000"
    assert problem.question == "What is $\\frac{1}{2}$?"
    assert problem.options == ("one", "two", "three", "four")
    assert (problem.answer, problem.solution, problem.tags) == ("B", "Use $\\times$.", ("Rank",))
    assert problem.concept is not None
    assert (problem.concept.uid, problem.concept.name, problem.concept.section) == ("run-0000", "Definition", "Rank")
    assert problem.concept.text == "First.\nSecond."
    assert not problem.concept.suspect


def test_raw_latex_keeps_the_bytes(load):
    row = quiz(stem="$\\\\frac{1}{2}$ ", concept="First.\\nSecond.", options=["A. $\\\\pi$ ", "B. two"])
    (problem,) = load([row], latex="raw").train
    assert problem.question == "$\\\\frac{1}{2}$ "
    assert problem.options == ("$\\\\pi$ ", "two")
    assert problem.concept is not None and problem.concept.text == "First.\\nSecond."


def test_concepts_are_runs_of_rows_not_titles(load):
    rows = [quiz("A: T", n, concept="c") for n in (1, 2, 4, 1, 1)] + [quiz("B: T", 2), quiz("A: T", 3, concept="c")]
    problems = load(rows).train
    runs = ["run-0000"] * 3 + ["run-0001", "run-0002", "run-0003", "run-0004"]
    assert [concept_of(p) for p in problems] == runs
    assert load(rows).report["runs"] == 5
    assert load(rows).report["titles"] == 2


def test_a_run_has_the_concept_text_of_its_own_rows(load):
    rows = [quiz("A: T", 1, concept="first"), quiz("B: T", 1, concept="other"), quiz("A: T", 1, "x?", concept="second")]
    texts = [p.concept.text for p in load(rows).train if p.concept is not None]
    assert texts == ["first", "other", "second"]


def test_earlier_runs_of_a_repeated_title_are_suspect(load):
    rows = [quiz("A: T", 1), quiz("A: T", 2), quiz("B: T", 1), quiz("A: T", 1, "other?"), quiz("A: T", 2, "more?")]
    kept = load(rows)
    assert [p.concept.suspect for p in kept.train if p.concept] == [True, True, False, False, False]
    assert kept.report["suspect_rows"] == 2
    dropped = load(rows, suspect="drop")
    assert [p.uid for p in dropped.train] == ["row-0002", "row-0003", "row-0004"]
    assert dropped.report["dropped"] == [{"row": i, "reason": "suspect concept"} for i in (0, 1)]


@pytest.mark.parametrize(("answer", "letter"), [("C", "C"), ("C.", "C"), ("C. three", "C"), ("C. three ", "C")])
def test_the_key_is_the_leading_letter(load, answer, letter):
    assert load([quiz(answer=answer)]).train[0].answer == letter


def test_a_key_that_is_escaped_once_still_matches_its_option(load):
    row = quiz(answer="A. $\\pi$", options=["A. $\\\\pi$", "B. two"])
    assert load([row]).train[0].answer == "A"


@pytest.mark.parametrize("answer", ["All of the above", "A, B, C, D", "E", "E. five", "B. one", "", "two", "b"])
def test_ungradable_rows_go_by_number_or_raise(load, answer):
    rows = [quiz(), quiz(number=2, answer=answer), quiz(number=3)]
    sets = load(rows)
    assert [p.uid for p in sets.train] == ["row-0000", "row-0002"]
    (entry,) = sets.report["dropped"]
    assert entry["row"] == 1 and "the answer" in entry["reason"]
    with pytest.raises(ValueError) as error:
        load(rows, on_bad_row="error")
    message = one_line(error)
    assert "quizzes.jsonl" in message and "line 2:" in message and "data.on_bad_row=drop" in message
    assert "line 1:" not in message


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"concept_title": ', "not valid JSON"),
        ("", "blank line"),
        ("[1]", "not a JSON object"),
        (json.dumps({k: v for k, v in quiz().items() if k not in ("answer", "options")}), "key answer, options"),
        (quiz(question_id="1"), "question_id is str"),
        (quiz(question_id=True), "question_id is bool"),
        (quiz(original_question=None), "original_question is NoneType"),
        (quiz(related_concept="  "), "related_concept is blank"),
        (quiz(options=["A. one"]), "1 option(s)"),
        (quiz(options=["A. one", 2]), "options is not a list of strings"),
        (quiz(options=["A. one", "C. two"]), "the option at place B"),
        (quiz(options=["A. one", "B. "]), "the option at place B"),
        (quiz("Rank: Definition", 2, concept="Another text."), "related_concept is not that of line 1"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["drop", "error"])
def test_a_row_that_is_no_quiz_always_raises(load, line, what, on_bad_row):
    with pytest.raises(ValueError) as error:
        load([quiz(), line], on_bad_row=on_bad_row)
    message = one_line(error)
    assert "quizzes.jsonl" in message and "line 2:" in message and what in message
    assert "correct or delete" in message


def test_all_broken_rows_are_told_at_once(load):
    with pytest.raises(ValueError) as error:
        load(["{", quiz(), "[]", quiz(number=2, explanation=3)])
    message = one_line(error)
    assert all(f"line {n}:" in message for n in (1, 3, 4)) and "line 2:" not in message
    with pytest.raises(ValueError) as error:
        load(["{"] * 500)
    assert "490 more, to line 500" in one_line(error) and len(str(error.value)) < 600


def test_bytes_that_are_no_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "quizzes.jsonl"
    path.write_bytes(json.dumps(quiz()).encode() + b'\n{"concept_title": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        CoreQuizzes(str(path)).load()


def test_no_file_and_an_empty_file(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path, ""):
        with pytest.raises(FileNotFoundError) as error:
            CoreQuizzes(str(path)).load()
        assert "data.path=" in one_line(error) and "pass data.path=/path/to/concept_quizzes.jsonl" in str(error.value)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        CoreQuizzes(str(tmp_path / "empty.jsonl")).load()


@pytest.mark.parametrize(
    "option",
    ["All of the above", "All of the above.", "None of the above", "none of these", "Both A and B", "A and C only",
     "A, B, and C", "Neither A nor B", "Both of the above", "None of the other options", "The same as option B"],
)  # fmt: skip
def test_options_about_other_options_fix_the_order(load, option):
    assert speaks_of_others(option)
    (problem,) = load([quiz(options=["A. one", "B. two", f"C. {option}"])]).train
    assert not problem.permutable
    assert load([quiz(options=["A. one", "B. two", f"C. {option}"])]).report["unpermutable"] == [0]


@pytest.mark.parametrize(
    "option",
    ["$A$ and $B$ are both bases", "$n$ and $m$ are both even.", "All of the eigenvalues are zero", "a and b",
     "Both addition and multiplication", "None", "The form must be linear in both arguments.", "A and B are similar"],
)  # fmt: skip
def test_options_about_mathematics_do_not(load, option):
    assert not speaks_of_others(option)
    assert load([quiz(options=["A. one", "B. two", f"C. {option}"])]).train[0].permutable


def test_equal_options_are_kept_and_reported(load):
    rows = [quiz(), quiz(number=2, options=["A. $\\\\pi$", "B. two", "C. $\\pi$ "])]
    sets = load(rows)
    assert len(sets.train) == 2
    assert sets.report["duplicate_options"] == [1]


def test_the_report_counts_letters_and_faulty_latex(load):
    rows = [quiz(), quiz(number=2, answer="A"), quiz(number=3, stem="Open $brace{?"), quiz(number=4, answer="none")]
    report = load(rows).report
    assert report["letters"] == {"A": 1, "B": 2}
    assert report["latex_faults"] == [2]
    assert (report["rows"], report["kept"], report["train"], report["test"]) == (4, 3, 3, 0)
    json.dumps(report)


def test_the_split_shares_no_concept_and_reaches_its_share(load):
    rows = book(concepts=20, questions=3)
    sets = load(rows, test_fraction=0.25)
    train, test = sets.train, sets.test["held_out"]
    assert {concept_of(p) for p in train}.isdisjoint({concept_of(p) for p in test})
    assert len(test) == 15 and len(train) == 45
    assert [p.uid for p in sorted(train + test, key=lambda p: p.uid)] == [f"row-{i:04d}" for i in range(60)]


def test_the_split_follows_the_seed_alone(load):
    rows = book(concepts=20)
    rows[5]["answer"] = "nothing"
    chosen = [{concept_of(p) for p in load(rows, test_fraction=0.3, seed=s).test["held_out"]} for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    other = load(rows, test_fraction=0.3, seed=0, suspect="drop", latex="raw").test["held_out"]
    assert {concept_of(p) for p in other} == chosen[0]


@pytest.mark.parametrize("seed", range(8))
def test_runs_with_one_text_or_one_stem_stay_together(load, seed):
    rows = book(concepts=12, questions=2)
    rows[0]["related_concept"] = rows[1]["related_concept"] = "shared"
    rows[10]["related_concept"] = rows[11]["related_concept"] = "shared"
    rows[11]["original_question"] = "shared $\\\\pi$?"
    rows[20]["original_question"] = "shared $\\pi$? "
    sets = load(rows, test_fraction=0.4, seed=seed)
    tested = {p.uid for p in sets.test["held_out"]}
    linked = {f"row-{i:04d}" for i in (0, 1, 10, 11, 20, 21)}
    assert linked <= tested or not linked & tested
    assert sets.report["split_groups"] == 10


def test_held_out_sections_are_tested_whole(load):
    sets = load(book(concepts=9, questions=2), hold_out_sections=["Part 1"])
    assert {p.tags for p in sets.test["held_out"]} == {("Part 1",)}
    assert {p.tags for p in sets.train} == {("Part 0",), ("Part 2",)}
    more = load(book(concepts=9, questions=2), hold_out_sections=["Part 1"], test_fraction=0.5)
    assert Counter(p.tags[0] for p in more.test["held_out"])["Part 1"] == 6
    assert len(more.test["held_out"]) == 10


def test_an_unknown_section_is_answered_with_the_nearest(load):
    with pytest.raises(ValueError) as error:
        load(book(), hold_out_sections=["part1"])
    assert (
        "data.hold_out_sections" in one_line(error) and "'part1'" in str(error.value) and "Part 1" in str(error.value)
    )


def test_a_split_without_training_rows_raises(load):
    with pytest.raises(ValueError, match="no row is left to train on"):
        load([quiz()], test_fraction=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("latex", "tidy"), ("suspect", True), ("on_bad_row", "skip"), ("test_fraction", 1.0), ("test_fraction", -0.1),
     ("test_fraction", float("nan")), ("test_fraction", "0.1"), ("hold_out_sections", "Rank"),
     ("hold_out_sections", [1]), ("hold_out_sections", None), ("seed", 0.5)],
)  # fmt: skip
def test_wrong_settings_name_their_key(key, value):
    with pytest.raises(ValueError) as error:
        CoreQuizzes("quizzes.jsonl", **{key: value})
    assert one_line(error).startswith(f"data.{key}=")


# The published file, where it is at hand.

SHARED = Path(os.environ.get("CORE_TORL_SHARED") or Path(__file__).resolve().parents[3] / "shared")
PUBLISHED = SHARED / "data" / "core" / "concept_quizzes.jsonl"
published_file = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason=f"{PUBLISHED} is missing: set CORE_TORL_SHARED to the folder that holds data/core"
)


@pytest.fixture(scope="module")
def published():
    return CoreQuizzes(str(PUBLISHED)).load()


@published_file
def test_published_counts(published):
    report = published.report
    assert (report["rows"], report["runs"], report["titles"], report["suspect_rows"]) == (1110, 232, 196, 159)
    assert [entry["row"] for entry in report["dropped"]] == [284, 832]
    assert report["letters"] == {"A": 389, "B": 440, "C": 203, "D": 75, "E": 1}
    assert len(report["unpermutable"]) == 33
    assert {334, 1005, 1035} < set(report["unpermutable"])
    assert report["duplicate_options"] == [44, 697]
    problems = published.train + published.test["held_out"]
    assert len({p.uid for p in problems}) == 1108
    assert Counter(len(p.options) for p in problems) == {4: 1102, 2: 5, 5: 1}
    assert sum(p.concept.suspect for p in problems) == 159
    assert len({p.tags for p in problems}) == 55


@published_file
def test_published_concepts_are_split(published):
    train, test = published.train, published.test["held_out"]
    for part in (concept_of, lambda p: p.concept.text, lambda p: p.question):
        assert {part(p) for p in train}.isdisjoint({part(p) for p in test})
    assert 0.1 <= len(test) / 1108 < 0.13
    runs = split_runs(read_rows(str(PUBLISHED)))
    groups = disjoint_groups(runs)
    group_of = {row.index: group for run, group in zip(runs, groups, strict=True) for row in run}
    for pair in ((297, 310), (940, 1101), (941, 1102)):  # the stems that occur twice
        assert len({group_of[i] for i in pair}) == 1


@published_file
def test_published_latex_comes_out_whole(published):
    problems = published.train + published.test["held_out"]
    texts = [t for p in problems for t in (p.question, *p.options, p.solution, p.concept.text, p.concept.name)]
    assert not [text for text in texts if faults(text)]
    # Row breaks of a matrix are pairs too, but never stand before a letter in this file.
    assert not [text for text in texts if any(p[:1].isalpha() for p in text.split("\\\\")[1:])]
    by_uid = {p.uid: p for p in problems}
    assert r"a_{12} \\ a_{21}" in by_uid["row-0011"].question  # escaped once in the file
    assert "$|A| \\ne 0$" in by_uid["row-0106"].question
    assert "\n1 & 2 & 3 \\\\\n4" in by_uid["row-0345"].question


@published_file
def test_published_errors_and_drops():
    with pytest.raises(ValueError, match=r"line 285: .*; line 833: "):
        CoreQuizzes(str(PUBLISHED), on_bad_row="error").load()
    kept = CoreQuizzes(str(PUBLISHED), suspect="drop").load()
    assert kept.report["kept"] == 1110 - 159 - 2


def test_a_parquet_file_of_the_same_columns_is_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = book()
    (tmp_path / "quizzes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "quizzes.parquet")
    one, other = (CoreQuizzes(str(tmp_path / f"quizzes.{ending}")).load() for ending in ("jsonl", "parquet"))
    assert (one.train, one.test) == (other.train, other.test) and one.report["asked_in_test"] == 0
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="cannot be read") as error:
        CoreQuizzes(str(tmp_path / "broken.parquet")).load()
    one_line(error)
