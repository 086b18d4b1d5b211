"""Reading rows: every file form, bad rows known by number, paths into rows, boxes, and the hub's loader on a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core_torl.data.records import last_box, lookup, read_file, read_hub

ROWS = [{"q": "What is $1+1$?", "a": "2"}, {"q": "007?", "a": "007"}]


def test_csv_keeps_texts_as_they_stand_and_names_uneven_rows(tmp_path):
    file = tmp_path / "x.csv"
    file.write_bytes('\ufeffq,a\n"What, then?",007\n"two\nlines",1/2\nonly one\na,b,c\n'.encode())
    found = list(read_file(str(file)))
    assert found[:2] == [{"q": "What, then?", "a": "007"}, {"q": "two\nlines", "a": "1/2"}]
    assert found[2:] == ["fewer values than columns", "more values than columns"]
    file.write_text('q,a\n"open,1\n')
    with pytest.raises(ValueError, match="not CSV"):
        list(read_file(str(file)))


def test_a_bad_line_hides_no_other(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"q": 1}\n{broken\n"a text"\n\n\xff\xfe\n{"q": "a\xe2\x80\xa8b"}\n')
    assert list(read_file(str(file))) == [
        {"q": 1}, "not valid JSON", "a text, not a JSON object", "blank line", "not UTF-8", {"q": "a\u2028b"},
    ]  # fmt: skip


def test_reading_is_lazy(tmp_path):
    """The first row of a file is there before the rest of it has been looked at."""
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + "never read\n")
    assert next(iter(read_file(str(file)))) == ROWS[0]


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a", 1), ("b.c", 2), ("b.d.0.e", 3), ("b.d.-1.e", 4), ("b.d.7", None), ("b.x", None), ("a.c", None),
        ("dotted.name", 5), ("text.0", None),
    ],
)  # fmt: skip
def test_a_dotted_path_finds_what_is_there(path, found):
    row = {"a": 1, "b": {"c": 2, "d": [{"e": 3}, {"e": 4}]}, "dotted.name": 5, "text": "abc"}
    assert lookup(row, path) == found


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{3}. And \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \\}", r"a \\"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\fbox{ 7 }", "7"),
        ("none", None),
        (r"\boxed{never", None),
    ],
)
def test_the_last_box_that_closes(text, box):
    assert last_box(text) == box


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A data set as the hub holds it: a file for each split."""
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hubs_loader_reads_the_split_that_is_asked_for(folder, streaming, own_cache):
    assert list(read_hub(folder, None, "train", None, streaming)) == ROWS
    assert list(read_hub(folder, None, "test", None, streaming)) == ROWS[:1]
    with pytest.raises(ValueError, match=r"(?i)unknown split|bad split") as error:
        list(read_hub(folder, None, "validation", None, streaming))
    assert "\n" not in str(error.value) and "check the name" in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"), [("train.jsonl", b'{"q": "a"}\n{broken\n'), ("train.parquet", b"PAR1 no")]
)
def test_a_data_set_with_a_broken_file_is_one_line(name, content, streaming, tmp_path, own_cache):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_hub(str(tmp_path), None, "train", None, streaming))
    text = str(error.value)
    assert "\n" not in text and f"correct the data of {tmp_path}, or give its files by name" in text
    assert "JSON parse error" in text or "Parquet" in text, "what is wrong, not only that something is"


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, own_cache):
    """For real: no answer comes from this address. The library's own pauses between its attempts are left out."""
    import huggingface_hub.constants
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="nobody/nothing") as error:
        list(read_hub("nobody/nothing", None, "train", None, True))
    assert "\n" not in str(error.value) and "go online, or give a local file" in str(error.value)
