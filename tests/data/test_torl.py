"""Files in verl's form: each rule on a small file that shows it, then the counts of the published files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from core_torl.data.torl import TorlProblems, read_rows

SHARED = Path("/work/shared/data")


def row(
    question: object = "What is $1+1$?", answer: object = "2", source: object = "math", **more: Any
) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
        **more,
    }


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [row(f"Question {i}?", str(i), **more) for i in range(count)]


def write(path: Path, values: list[Any]) -> str:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    else:
        path.write_text(json.dumps(values))
    return str(path)


@pytest.fixture
def file(tmp_path: Path):
    return lambda values, name="train.jsonl": write(tmp_path / name, values)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.json"])
def test_a_row_becomes_a_problem_in_every_format(file, name):
    written = [
        row(" What is $\\frac{1}{2}+\\frac{1}{2}$?\n", " 1 ", solution="It is $1$."),
        row("Two?", "2", solution=" "),
    ]
    first, second = TorlProblems(file(written, name), test_fraction=0).load().train
    assert (first.uid, second.uid) == ("train-00000", "train-00001")
    assert (first.question, first.answer) == ("What is $\\frac{1}{2}+\\frac{1}{2}$?", "1")
    assert (first.solution, second.solution, first.tags, first.options) == ("It is $1$.", None, ("math",), ())


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_rows_as_the_published_files_have_them(file, name):
    """ToRL: a system message, ``stype`` and an id; SimpleTIR: one message, ``style`` and an index; or nothing at all."""
    system = {"role": "system", "content": "Please reason step by step."}
    user = {"role": "user", "content": "How many?"}
    for more in (
        {"prompt": [system, user], "reward_model": {"ground_truth": "3", "stype": "rule"}, "extra_info": {"id": "a-b"}},
        {"prompt": [user], "reward_model": {"ground_truth": "3", "style": "rule"}, "extra_info": {"index": 7}},
        {
            "prompt": [{"role": "user", "content": "Ready?"}, {"role": "assistant", "content": "Yes."}, user],
            "reward_model": {"ground_truth": "3"},
        },
    ):
        (problem,) = TorlProblems(file([row(**more)], name), test_fraction=0).load().train
        assert (problem.question, problem.answer, problem.uid) == ("How many?", "3", "train-00000")
    only = {key: row("How many?", "3")[key] for key in ("data_source", "prompt", "reward_model")}
    assert TorlProblems(file([only], name), test_fraction=0).load().train[0].question == "How many?"


def test_numbers_are_answers_as_they_stand(file):
    train = TorlProblems(file([row("a", 25), row("b", 0.5)]), test_fraction=0).load().train
    assert [problem.answer for problem in train] == ["25", "0.5"]


def test_test_sets_bear_the_name_of_their_source(file):
    tests = [
        file(rows(3, source="aime24") + rows(2, source="a/b"), "t.jsonl"),
        file(rows(4, source="deepscaler"), "u.json"),
    ]
    loaded = TorlProblems(file([row()]), tests).load()
    assert loaded.report["test"] == {"aime24": 3, "a_b": 2, "deepscaler": 4}
    assert [problem.uid for problem in loaded.test["deepscaler"]] == [f"u-{i:05d}" for i in range(4)]
    named = TorlProblems(file([row()]), tests, test_names={"deepscaler": "aime", "a/b": "aime"}, deduplicate_test=False)
    assert {name: len(problems) for name, problems in named.load().test.items()} == {"aime24": 3, "aime": 6}
    with pytest.raises(ValueError) as error:
        TorlProblems(file([row()]), tests, test_names={"amc": "amc23"}).load()
    assert "data.test_names" in one_line(error) and "'amc'" in str(error.value) and "a/b" in str(error.value)


def test_rows_that_ask_the_same_are_folded_within_a_set(file):
    repeated = [row("Q  1?", "1", source="aime"), row("Q 1?", "1 ", source="aime"), row("Q 1?", "2", source="aime")]
    test = file([*repeated, row("Q 1?", "1", source="other")], "test.jsonl")
    loaded = TorlProblems(file([row()]), test).load()
    assert [problem.uid for problem in loaded.test["aime"]] == ["test-00000", "test-00002"]
    assert (loaded.report["test"], loaded.report["folded"]) == ({"aime": 2, "other": 1}, {"aime": 1})
    plain = TorlProblems(file([row()]), test, deduplicate_test=False).load()
    assert (plain.report["test"], plain.report["folded"]) == ({"aime": 3, "other": 1}, {})


def test_a_question_that_is_tested_is_not_trained_on(file):
    loaded = TorlProblems(
        file([row("A?"), row("B?"), row(" A? ", "7")]), file([row("A?", source="t")], "t.jsonl")
    ).load()
    assert [problem.question for problem in loaded.train] == ["B?"] and loaded.report["asked_in_test"] == 2
    with pytest.raises(ValueError, match="no row is left to train on") as error:
        TorlProblems(file([row("A?")]), file([row("A?", source="t")], "t.jsonl")).load()
    one_line(error)


def test_without_test_files_a_share_of_the_questions_is_held_out(file):
    path = file([*rows(28), row("Question 3?", "3"), row("Question 4?", "other"), *rows(2, source="b")])
    sizes = []
    for share in (0.0, 0.1, 0.5):
        loaded = TorlProblems(path, test_fraction=share).load()
        tested = {problem.question for part in loaded.test.values() for problem in part}
        assert not tested & {problem.question for problem in loaded.train}
        sizes.append(len(tested))
        assert sorted(loaded.test) == ["b", "math"], "a set that got nothing is still named"
    assert sizes == sorted(sizes) and sizes[0] == 0 and 5 < sizes[2] < 23, "of 28 questions"
    assert TorlProblems(path).load() == TorlProblems(path).load() != TorlProblems(path, seed=1).load()
    assert TorlProblems(path, test_fraction=0.0).load().report["repeated_in_train"] == 3


def test_several_training_files_and_uids_of_their_own(file, tmp_path):
    (tmp_path / "more").mkdir()
    paths = [file(rows(2)), write(tmp_path / "more" / "train.json", [row("x", "1")])]
    loaded = TorlProblems(paths, test_fraction=0).load()
    assert [problem.uid for problem in loaded.train] == ["train-00000", "train-00001", "train.2-00000"]
    assert loaded.report["rows"] == {paths[0]: 2, paths[1]: 1}
    with pytest.raises(ValueError, match=r"data\.test_path=.*named twice") as error:
        TorlProblems(paths, paths[0]).load()
    one_line(error)


BAD: dict[str, tuple[Any, str]] = {
    "no source": (row(source=None), "data_source is missing"),
    "blank source": (row(source=" "), "data_source is no text or blank"),
    "no prompt": (row(prompt=None), "prompt is missing"),
    "a text as prompt": (row(prompt="Why?"), "prompt is no list of messages"),
    "nobody asks": (row(prompt=[{"role": "system", "content": "Think."}]), "prompt holds no message of the user"),
    "blank question": (row("  "), "prompt: the user's last message is blank or no text"),
    "question is a number": (row(3), "prompt: the user's last message is blank or no text"),
    "no answer": (row(reward_model=None), "reward_model.ground_truth is missing or no text"),
    "answers": (row(answer=["1", "2"]), "reward_model.ground_truth is missing or no text"),
    "no number": (row(answer=float("nan")), "reward_model.ground_truth is missing or no text"),
    "true": (row(answer=True), "reward_model.ground_truth is missing or no text"),
    "blank answer": (row(answer=""), "reward_model.ground_truth is blank"),
    "a list": ([1], "not an object with the keys data_source, prompt, reward_model"),
    "no JSON": ("{", "not valid JSON"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "blank line": ("", "blank line"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_dropped_or_named(file, bad, reason):
    path = file([row("A?"), bad, row("B?")])
    loaded = TorlProblems(path, test_fraction=0).load()
    assert [problem.uid for problem in loaded.train] == ["train-00000", "train-00002"]
    assert loaded.report["dropped"] == [{"row": "train-00001", "reason": reason}]
    assert loaded.report["rows"] == {path: 3}
    with pytest.raises(ValueError) as error:
        TorlProblems(path, on_bad_row="error").load()
    assert one_line(error).startswith(f"data.path={path}: row 1: {reason}; ")
    with pytest.raises(ValueError) as error:
        TorlProblems(file([row("C?")], "good.jsonl"), path, on_bad_row="error").load()
    assert one_line(error).startswith(f"data.test_path={path}: row 1: ")


def test_many_bad_rows_stay_one_line(file):
    path = file([row("", "1")] * 50)
    with pytest.raises(ValueError) as error:
        TorlProblems(path, on_bad_row="error").load()
    assert "and 40 more, to row 49" in one_line(error) and len(str(error.value)) < 1200
    with pytest.raises(ValueError, match="no row is left") as error:
        TorlProblems(path).load()
    assert "50 dropped" in one_line(error) and "train-00000: prompt" in str(error.value)


def test_files_that_cannot_be_read(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.path='nowhere\.parquet'"):
        TorlProblems("nowhere.parquet").load()
    with pytest.raises(FileNotFoundError, match=r"data\.test_path='nowhere\.parquet'"):
        TorlProblems(file([row()]), "nowhere.parquet").load()
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no such thing")
    (tmp_path / "x.json").write_text('{"a": 1}')
    (tmp_path / "y.json").write_bytes(b"\xff[]")
    (tmp_path / "x.csv").write_text("a,b\n")
    (tmp_path / "e.jsonl").write_text("")
    write(tmp_path / "y.parquet", [{"question": "a", "prompt": "b"}])
    for name, text in {
        "x.parquet": "cannot be read", "x.json": "not a JSON list", "y.json": "cannot be read", "x.csv": "ending '.csv'",
        "e.jsonl": "the file is empty", "y.parquet": "without the column data_source, reward_model",
    }.items():  # fmt: skip
        with pytest.raises(ValueError) as error:
            read_rows(str(tmp_path / name))
        assert one_line(error).startswith(f"data.path={tmp_path / name}: ") and text in str(error.value)
    (tmp_path / "z.jsonl").write_bytes(b"\xff\n" + json.dumps(row()).encode() + b"\n")
    assert read_rows(str(tmp_path / "z.jsonl"))[1] == [(0, "not UTF-8")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path", ""), ("path", []), ("path", [1]), ("path", None), ("test_path", ""), ("test_path", []),
        ("on_bad_row", "skip"), ("test_fraction", 1), ("test_fraction", -0.1), ("test_fraction", True),
        ("test_fraction", float("nan")), ("test_names", ["a"]), ("test_names", {"a": "b/c"}), ("test_names", {"a": ""}),
        ("seed", 0.5), ("seed", True),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_in_one_line(key, value):
    with pytest.raises(ValueError) as error:
        TorlProblems(**{"path": "train.parquet", key: value})
    assert one_line(error).startswith(f"data.{key}")


def shared(name: str) -> str:
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not there: the published file was not read")
    return str(SHARED / name)


def test_torls_published_test_file():
    path = shared("torl/test.parquet")
    found, wrong = read_rows(path)
    assert wrong == [] and Counter(r.source for r in found) == {"aime24": 120, "math500": 134, "aime25": 120}
    loaded = TorlProblems([shared("math/math_level3to5_train.parquet")], path).load()
    assert loaded.report["test"] == {"aime24": 30, "math500": 134, "aime25": 30}
    assert loaded.report["folded"] == {"aime24": 90, "aime25": 90}
    assert all(p.answer.isdigit() for name in ("aime24", "aime25") for p in loaded.test[name])
    assert not any("step by step" in p.question for part in loaded.test.values() for p in part)


def test_simpletirs_published_files():
    files = {"aime24": "deepscaler", "aime25": "math-ai/aime25", "math500_test": "simplelr_math_35"}
    names = {source: name for name, source in files.items()}
    source = TorlProblems(
        shared("math/math_level3to5_train.parquet"),
        [shared(f"math/{name}.parquet") for name in files],
        test_names=names,
    )
    report = source.load().report
    assert report["test"] == {"aime24": 30, "aime25": 30, "math500_test": 500} and report["folded"] == {}
    assert (report["train"], report["asked_in_test"]) == (8521, 0)
    blank = "reward_model.ground_truth is blank"
    assert report["dropped"] == [{"row": f"math_level3to5_train-{i:05d}", "reason": blank} for i in (5054, 5158)]
