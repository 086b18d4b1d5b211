"""Rows of any columns: where question and answer stand, what is left out, and real files of several kinds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from core_torl.data.math import MathProblems
from core_torl.data.question_sets import Bad, QuestionSets, Row, normalised, place_of

LEAKED, REPEATED = 0, 3
SHARED = Path(os.environ.get("CORE_TORL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


@pytest.fixture
def file(tmp_path: Path):
    def write(values: list[Any], name: str = "train.jsonl") -> str:
        path = tmp_path / name
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
        elif path.suffix == ".csv":
            import csv

            with path.open("w", newline="") as lines:
                writer = csv.DictWriter(lines, list(values[0]))
                writer.writeheader()
                writer.writerows(values)
        elif path.suffix == ".json":
            path.write_text(json.dumps(values))
        else:
            path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
        return str(path)

    return write


def qa(question: str, answer: object = "1", **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


def load(path: Any, **settings: Any):
    return MathProblems(path, **{"test_fraction": 0.0, **settings}).load()


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl", "d.json", "d.csv"])
def test_every_form_of_file_gives_the_same_problems(file, name):
    train = load(file([qa(" What is $1+1$?", "2"), qa('A, then "B"?', "x, y")], name)).train
    assert [(p.uid, p.question, p.answer) for p in train] == [
        ("d-00000", "What is $1+1$?", "2"), ("d-00001", 'A, then "B"?', "x, y"),
    ]  # fmt: skip


def test_question_and_answer_are_found_where_they_are_said_to_stand(file):
    row = {"prompt": [{"content": "sys"}, {"content": "Q?"}], "meta": {"gold": ["7"], "why": "Because."}, "set": "s/t"}
    path = file([row])
    (problem,) = load(
        path, question="prompt.-1.content", answer="meta.gold", solution="meta.why", source="set"
    ).train  # fmt: skip
    assert (problem.question, problem.answer, problem.solution, problem.tags) == ("Q?", "7", "Because.", ("s/t",))
    (joined,) = load(file([{"Body": "Two eggs.", "Question": "How many?", "Answer": 2.0}]),
                     question=["Body", "Question"], answer="Answer").train  # fmt: skip
    assert (joined.question, joined.answer) == ("Two eggs. How many?", "2.0")


def test_the_answer_may_stand_in_a_solution(file):
    boxed = load(file([qa("Q?", r"First \boxed{1}, so \boxed{\frac{1}{2}}.")]), answer_from="boxed").train[0]
    assert boxed.answer == r"\frac{1}{2}" and boxed.solution.startswith("First")
    hashes = load(file([qa("Q?", "2 + 1,000\n#### 1,002")]), answer_from="hashes").train[0]
    assert (hashes.answer, hashes.solution) == ("1002", "2 + 1,000\n#### 1,002")
    assert load(file([qa("Q?", "5")])).train[0].solution is None


def test_bad_rows_are_named_by_number_on_one_line(file):
    rows = [qa("ok?"), "{broken", qa("  "), {"question": "no answer?"}, qa("q", True), qa("no box?", "3")]
    report = load(file(rows)).report
    assert [d["row"] for d in report["dropped"]] == [f"train-0000{i}" for i in (1, 2, 3, 4)]
    assert report["dropped"][1]["reason"] == "question is no text or blank"
    with pytest.raises(ValueError) as error:
        load(file(rows), on_bad_row="error")
    text = str(error.value)
    assert "\n" not in text and "row 1: not valid JSON; row 2: question" in text and "data.on_bad_row=drop" in text
    with pytest.raises(ValueError, match=r"none of 1 rows can be used; row 0: answer holds no .boxed"):
        load(file([qa("q", "3")]), answer_from="boxed")


def test_limit_ends_the_reading(file):
    path = file([qa("1?"), qa("2?"), "{broken, and never read"])
    loaded = load(path, limit=2, on_bad_row="error")
    assert len(loaded.train) == 2 and loaded.report["rows"] == {path: 2}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"answer_from": "latex"}, "data.answer_from='latex': use value, boxed, hashes"),
        ({"limit": 0}, "data.limit=0"),
        ({"on_leakage": "keep"}, "data.on_leakage='keep': use drop, report or error"),
        ({"question": ""}, "data.question and data.answer"),
        ({"path": None}, "data.path=None: use a file or a list of files"),
        ({"path": "no/such.jsonl"}, "data.path='no/such.jsonl': no such file"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_key(file, settings, text):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(**{"path": file([qa("q")]), **settings})
    assert text in str(error.value) and "\n" not in str(error.value)


def test_an_evaluation_needs_no_training_file(file):
    loaded = load(None, test_path=file([qa("q?"), qa("r?")], "gsm8k.jsonl"))
    assert loaded.train == [] and list(loaded.test) == ["gsm8k"] and len(loaded.test["gsm8k"]) == 2


# ---- duplicates and leakage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (r"Find $x+1$.", r"find  $x \, +\, 1$", True),
        (r"$\dfrac{1}{2}\left(x\right)$", r"$\frac{1}{2}(x)$", True),
        ("What is it?", "What is it", True),
        (r"$\leftarrow$", r"$arrow$", False),
        ("x^2", "x^3", False),
        ("Is 1 < 2?", "Is 1 > 2?", False),
    ],
)
def test_questions_are_compared_by_what_they_say(one, other, same):
    assert (normalised(one) == normalised(other)) is same


def test_training_questions_of_a_test_set_are_counted_and_left_out_as_asked(file):
    train = file([qa("One?"), qa("two ?"), qa("Three?")])
    test = [file([qa("ONE?"), qa("Two?")], "a.jsonl"), file([qa("one")], "b.jsonl")]
    dropped = load(train, test_path=test)
    assert [p.question for p in dropped.train] == ["Three?"]
    assert dropped.report["asked_in_test"] == 2 and dropped.report["leakage"] == {"a": 2, "b": 1}
    assert dropped.report["leaked_rows"] == ["train-00000", "train-00001"]
    kept = load(train, test_path=test, on_leakage="report")
    assert len(kept.train) == 3 and kept.report["asked_in_test"] == 2 and kept.report["on_leakage"] == "report"
    with pytest.raises(ValueError) as error:
        load(train, test_path=test, on_leakage="error")
    text = str(error.value)
    assert "2 training rows" in text and "2 of 'a', 1 of 'b'" in text and "train-00000" in text and "\n" not in text
    assert load(file([qa("Four?")]), test_path=test, on_leakage="error").report["asked_in_test"] == 0


def test_doubled_training_rows_are_counted_and_folded_as_asked(file):
    path = file([qa("One?", "1"), qa("Two?"), qa("one ?", "1"), qa("One?", "2")])
    plain, folded = load(path), load(path, deduplicate_train=True)
    assert len(plain.train) == 4 and plain.report["repeated_in_train"] == 1 and plain.report["folded_in_train"] == 0
    assert [p.uid for p in folded.train] == ["train-00000", "train-00001", "train-00003"]
    assert folded.report["repeated_in_train"] == folded.report["folded_in_train"] == 1


def test_held_out_questions_are_nowhere_in_training(file):
    loaded = load(file([qa(f"Q {i // 2} ?" if i % 2 else f"q{i // 2}") for i in range(40)]), test_fraction=0.25)
    tested = {normalised(p.question) for p in loaded.test["train"]}
    assert tested and not tested & {normalised(p.question) for p in loaded.train}
    assert len(loaded.test["train"]) == len(tested), "the other spelling of a held-out question is folded"
    assert loaded.report["asked_in_test"] == 0
    assert loaded.report["held_out"] == {"questions": len(tested), "of": 20}


def test_no_other_row_decides_whether_a_question_is_held_out(file):
    """Rows appended, taken away, sorted: every question that is still there is on the side where it was."""
    questions = [f"What is {i}?" for i in range(200)]

    def tested(asked: list[str], **settings: Any) -> set[str]:
        loaded = load(file([qa(q) for q in asked]), **{"test_fraction": 0.2, **settings})
        return {p.question for p in loaded.test["train"]}

    before = tested(questions)
    assert tested([*questions, "One more?"]) - {"One more?"} == before
    assert tested(questions[7:]) == before - set(questions[:7]) and tested(questions[::-1]) == before
    assert before < tested(questions, test_fraction=0.4) and tested(questions, seed=1) != before


def test_the_share_that_is_held_out_is_about_what_was_asked_for():
    """Within four standard deviations of a fair draw, for several seeds: places are even from 0 to 1."""
    for seed in range(3):
        places = [place_of(f"Question {i}", seed) for i in range(2000)]
        assert all(0 <= place < 1 for place in places)
        for share in (0.05, 0.1, 0.5, 0.9):
            found = sum(place < share for place in places) / 2000
            assert abs(found - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    assert place_of("  QUESTION 7 ?", 0) == place_of("question 7", 0)


# ---- data sets -------------------------------------------------------------------------------------------------------


def test_a_folder_laid_out_like_a_data_set_of_the_hub_is_read_by_split(file, tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "some_set"
    folder.mkdir()
    for split, count in (("train", 5), ("test", 2)):
        rows = [json.dumps(qa(f"{split} {i}?")) + "\n" for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    loaded = load(str(folder), test_path=str(folder), streaming=True, limit=3)
    assert len(loaded.train) == 3 and {name: len(part) for name, part in loaded.test.items()} == {"some_set": 2}
    assert loaded.report["rows"] == {f"{folder}:train": 3, f"{folder}:test": 2}
    assert [p.uid for p in loaded.train] == [f"some_set.train-0000{i}" for i in range(3)]
    assert [p.uid for p in loaded.test["some_set"]] == ["some_set.test-00000", "some_set.test-00001"]


def test_folders_and_files_of_one_name_have_uids_of_their_own(file, tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folders = []
    for parent in ("a", "b"):
        folder = tmp_path / parent / "one_set"
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text(json.dumps(qa(f"{parent}?")) + "\n")
        folders.append(str(folder))
    clash = file([qa("c?")], "one_set.train.2.jsonl")
    loaded = load([clash, *folders], split="train[:100%]")
    assert [p.uid for p in loaded.train] == [
        "one_set.train.2-00000", "one_set.train_100_-00000", "one_set.train_100_.2-00000",
    ]  # fmt: skip
    loaded = load([clash, *folders], test_path=[file([qa("d?")], "one_set.train.jsonl")])
    assert [p.uid for p in loaded.train] == [f"one_set.train{end}-00000" for end in (".2", "", ".3")]
    assert [p.uid for p in loaded.test["one_set.train"]] == ["one_set.train.4-00000"]


def test_two_problems_with_one_uid_are_refused():
    class Twice(QuestionSets):
        def read(self, key: str, path: str) -> tuple[list[Row], Bad]:
            return [Row(0, "s", f"{key} {i}?", "1") for i in range(1 if key == "path" else 2)], []

    with pytest.raises(ValueError, match=r"2 problems have the uid b-00000"):
        Twice("a", "b").load()


def published(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here; set CORE_TORL_SHARED to the folder that holds data/")
    return str(path)


@pytest.mark.parametrize(
    ("name", "settings", "count", "bad"),
    [
        ("gsm8k", {"answer_from": "hashes"}, 1319, []),
        ("svamp", {"question": ["Body", "Question"], "answer": "Answer"}, 1000, []),
        ("mawps", {"question": "input", "answer": "target"}, 2065, []),
        ("gaokao2023en", {}, 383, ["gaokao2023en-00167", "gaokao2023en-00192"]),
    ],
)
def test_published_benchmarks_are_read_whole(name, settings, count, bad):
    """Two rows of gaokao2023en have no answer."""
    loaded = load(None, test_path=published(f"benchmarks/{name}.jsonl"), deduplicate_test=False, **settings)
    assert len(loaded.test[name]) == count and all(p.answer for p in loaded.test[name])
    assert [row["row"] for row in loaded.report["dropped"]] == bad


def test_the_math_training_file_beside_math500_and_aime():
    """Read by columns, and in verl's form by data=torl: the same questions, the same leakage."""
    from core_torl.data.torl import TorlProblems

    train = published("math/math_level3to5_train.parquet")
    tests = [published(f"math/{name}.parquet") for name in ("math500_test", "aime24")]
    found = load(train, question="prompt.-1.content", answer="reward_model.ground_truth", test_path=tests)
    verl = TorlProblems(train, tests).load()
    assert [(p.question, p.answer) for p in found.train] == [(p.question, p.answer) for p in verl.train]
    assert found.report["asked_in_test"] == verl.report["asked_in_test"] == LEAKED
    assert found.report["repeated_in_train"] == REPEATED


def test_a_local_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path):
    file = tmp_path / "problems.md"
    file.write_text("# no data")
    with pytest.raises(ValueError, match=r"problems\.md: a local file must end in .*\.jsonl"):
        load(str(file))
