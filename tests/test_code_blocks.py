"""Fences as policies write them: each rule on the text that shows it, then properties of any text."""

from __future__ import annotations

import ast
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_torl.code_blocks import POLICIES, Block, output_spans, outside_blocks, python_blocks, select

NESTED = "text = '''\n```\n'''\nprint(text)"
TWICE = "a = '''\n```\n'''\nb = '''\n```text\n```\n'''"

# Text and programs. First what the released reader does too, then the cases in which it runs nothing or the wrong thing.
ROWS = {
    "a block": ("So:\n```python\nx = 1\nprint(x)\n```\nDone.", ["x = 1\nprint(x)"]),
    "python3": ("```python3\nx = 1\n```", ["x = 1"]),
    "spaces after the tag": ("```python  \t\nx = 1\n``` \n", ["x = 1"]),
    "text before the fence": ("Let us see: ```python\nx = 1\n```\n", ["x = 1"]),
    "carriage returns": ("```python\r\nx = 1\r\ny = 2\r\n```\r\n", ["x = 1\ny = 2"]),
    "two blocks": ("```python\na = 1\n```\nand\n```python\nprint(a)\n```\n", ["a = 1", "print(a)"]),
    "no tag": ("```\nx = 1\n```\n", []),
    "another language": ("```cpp\nint x;\n```\n```json\n{}\n```\n", []),
    "never closed": ("```python\nx = 1\n", []),
    "a second opening drops the first": ("```python\nx = (\n```python\ny = 2\n```\n", ["y = 2"]),
    "nothing inside": ("```python\n```", [""]),
    "a name that only starts like the tag": ("```pythonic\nx = 1\n```\n", []),
    "in a sentence": ("Write ```python code``` here.\n```\n", []),
    "py": ("```py\nx = 1\n```", ["x = 1"]),
    "capital letter": ("```Python\nx = 1\n```", ["x = 1"]),
    "a space before the tag": ("``` python\nx = 1\n```", ["x = 1"]),
    "in a list": ("1. Run\n   ```python\n   for i in range(2):\n       print(i)\n   ```\n2. Done", ["for i in range(2):\n    print(i)"]),
    "in a list, on its line": ("- ```python\n  x = 1\n  ```\n", ["x = 1"]),
    "opening indented only": ("  ```python\nif x:\n  y\n```\n", ["if x:\n  y"]),
    "backticks in a string": (f"```python\n{NESTED}\n```\nThe answer", [NESTED]),
    "backticks in two strings": (f"```python\n{TWICE}\n```\n", [TWICE]),
    "a python fence in a string": ("```python\ns = '''\n```python\nx\n```\n'''\n```\n", ["s = '''\n```python\nx\n```\n'''"]),
    "backticks in a string, then another block": (f"```python\n{NESTED}\n```\n\n```py\nx\n```", [NESTED, "x"]),
    "never parses: the first fence": ("```python\nx = (\n```\nso\n```\n", ["x = ("]),
    "never parses: not into the next block": ("```python\nx = '''\n```\n```python\ny = '''\n```\n", ["x = '''", "y = '''"]),
    "closed by the output": ("```python\nprint(1)\n```output", ["print(1)"]),
    "closed by the output, more text": ("```python\nprint(1)\n```output\n1\n```\nSo 1.", ["print(1)"]),
    "the output on the last line of code": ("```python\nprint(1)```output", ["print(1)"]),
    "closed, then the output": ("```python\nprint(1)\n```\n```output", ["print(1)"]),
    "broken code closed by the output": ("```python\nprint(\n```output\n", ["print("]),
    "a fence with another tag closes": ("```python\nx = 1\n```text\n```\n", ["x = 1"]),
    "other line ends stay": ("```python\ns = '\x0b\u2028'\n```", ["s = '\x0b\u2028'"]),
    "a null": ("```python\nx\0\n```\n", ["x\0"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "programs"), ROWS.values(), ids=ROWS.keys())
def test_which_programs_a_text_holds(text: str, programs: list[str]):
    blocks = python_blocks(text)
    assert [block.code for block in blocks] == programs
    for block in blocks:
        assert text[block.start :].startswith("```")
        assert text[: block.end].endswith("```") or text[block.end :].startswith("```output")


OUTPUTS = {
    "closed": ("a\n```output\n5\n```\nb", ["```output\n5\n```"], "a\n\n\nb"),
    "a request": ("a\n```output", ["```output"], "a\n\n"),
    "runs to the end": ("a\n```output\n5\n\\boxed{5}", ["```output\n5\n\\boxed{5}"], "a\n\n"),
    "on one line": ("a\n```output 5```\nb", ["```output 5```"], "a\n\n\nb"),
    "closed at the end of a line": ("```output\n5```\nb", ["```output\n5```"], "\n\nb"),
    "text after the closing fence": ("```output\n5\n``` so 5", ["```output\n5\n```"], "\n so 5"),
    "ends where a program starts": ("```output\n5\n```python\nx\n```\nb", ["```output\n5\n"], "\n\n\nb"),
    "two": ("```output\n1\n```\n```output\n2\n```", ["```output\n1\n```", "```output\n2\n```"], "\n\n\n"),
    "indented, capital": (" ```Output\n 5\n ```\nb", ["```Output\n 5\n ```"], " \n\nb"),
    "another word": ("```outputs\n5\n```\n", [], "```outputs\n5\n```\n"),
    "a program before it": ("a\n```python\nx\n```output\n5\n```\nb", ["```output\n5\n```"], "a\n\n\n\nb"),
    "not inside a program": ("```python\ns = '''\n```\n'''\n```\nb", [], "\n\nb"),
    "a program without an end": ("a\n```python\n\\boxed{1}", [], "a\n\n"),
    "two openings": ("a\n```python\nx\n```python\ny\n```\nb", [], "a\n\n\n\nb"),
}


@pytest.mark.parametrize(("text", "outputs", "outside"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_outputs_and_what_is_left(text: str, outputs: list[str], outside: str):
    assert [text[start:end] for start, end in output_spans(text)] == outputs
    assert outside_blocks(text) == outside


def test_select():
    blocks = [Block("a = 1", 0, 5), Block("b = 2", 6, 9), Block("a + b", 9, 12)]
    assert [select(blocks, policy) for policy in ("last", "all", "first")] == ["a + b", "a = 1\nb = 2\na + b", "a = 1"]
    assert [select([], policy) for policy in POLICIES] == [None] * 3
    assert [select(blocks[:1], policy) for policy in POLICIES] == ["a = 1"] * 3
    for some in ([], blocks):
        with pytest.raises(ValueError, match=r"block_policy='newest': use last, all or first"):
            select(some, "newest")


PIECES = st.sampled_from(
    ["```python\n", "```", "```output", "```output\n", "```py ", "```\n", "\n", "\r\n", " ", "'''", "x = 1", "\\boxed{2}", "`", "(", "#", "\0", "\ud800"]
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_and_its_spans_fit(text: str):
    blocks, outputs = python_blocks(text), output_spans(text)
    spans = sorted([(block.start, block.end) for block in blocks] + outputs)
    assert spans == sorted(set(spans)) and all(0 <= start < end <= len(text) for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), "no two overlap"
    assert [block.start for block in blocks] == sorted(block.start for block in blocks)
    for block in blocks:
        span = text[block.start : block.end].replace("\r\n", "\n")
        assert span.startswith("```")
        # Moved to the margin, no line is lost or changed otherwise.
        assert all(line.strip() in span for line in block.code.split("\n"))
    for start, end in outputs:
        assert text[start : start + 9].lower() == "```output"
        assert end == len(text) or text[:end].endswith("```") or text[end:].startswith("```")
    outside = outside_blocks(text)
    assert len(outside) <= len(text) + len(spans)
    assert "```" in text or outside == text


PROSE = st.sampled_from(
    ["So we compute.", "", "Then $x = 2$, hence", "Use `x` here:", "```\nfoo\n```", "The answer is \\boxed{4}."]
)
CODE = st.sampled_from(
    ["print(1)", "x = 1\n\nfor i in range(3):\n    x += i\nprint(x)", NESTED, "s = 'a'  # ```", "x = (", ""]
)
OPEN = st.sampled_from(["```python", "```py", "```Python", "```python3  ", "Here: ```python"])


@given(st.lists(st.tuples(PROSE, OPEN, CODE, st.booleans(), st.booleans(), st.sampled_from(["", "    "])), max_size=6))
@settings(max_examples=200, deadline=None)
def test_blocks_that_were_written_are_found(layout):
    """Prose, a block, and perhaps an output, over and over; indented or not, the closing fence left out or not."""
    parts, programs, shown = [], [], 0
    for prose, opening, code, output, left_out, indent in layout:
        parts.append(prose)
        closing = [] if output and left_out else ["```"]
        parts += [(indent + line).rstrip() for line in [opening, *code.split("\n"), *closing]]
        programs.append(code)
        if output:
            parts += ["```output", "17", "```"]
            shown += 1
    text = "\n".join(parts)
    found = [block.code for block in python_blocks(text)]
    assert found == programs
    assert len(output_spans(text)) == shown
    outside = outside_blocks(text)
    assert "17" not in outside and "print" not in outside
    assert outside.count("\\boxed{4}") == sum(prose.endswith("\\boxed{4}.") for prose, *_ in layout)


UNITS = ["```python\n", "```python\n```output\n", "```python\n(\n```\n", "```python\nx='''\n", "```python\n'''\n```\n", "```output\n", "`", "```\n", "x```\n", "((((", "a.", "{1:", "f(**{", "not "]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_hostile_text_takes_no_long_time(unit: str):
    """60,000 characters of one pattern, bare and as a program; quadratic time would be minutes."""
    text = (unit * 60_000)[:60_000]
    started = time.process_time()
    for hostile in (text, f"```python\n{text}\n```", f"```python\n{text[:40_000]}\n```\n" + "```\n" * 5_000):
        python_blocks(hostile)
        outside_blocks(hostile)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("error", [SyntaxError, ValueError, RecursionError, MemoryError])
def test_what_the_parser_raises_means_that_a_program_does_not_parse(error, monkeypatch: pytest.MonkeyPatch):
    def parse(code: str):
        raise error

    with monkeypatch.context() as patch:  # pytest itself parses when an assertion fails
        patch.setattr(ast, "parse", parse)
        blocks = python_blocks("```python\nx = 1\n```\nso\n```\n")
    assert [block.code for block in blocks] == ["x = 1"]


def test_no_more_is_parsed_than_a_multiple_of_the_text(monkeypatch: pytest.MonkeyPatch):
    """Each opening could have every later fence tried, were it not for the bounds."""
    parsed: list[str] = []

    def parse(code: str):
        parsed.append(code)
        raise SyntaxError

    opening, long = "```python\n(\n```\n", "x = (\n" * 1_000
    text = "".join(f"{opening}{long}```\n```\n```\n```\n" for _ in range(20))
    nested = "```python\n" * 30 + long + "```\n" * 4
    with monkeypatch.context() as patch:  # pytest itself parses when an assertion fails
        patch.setattr(ast, "parse", parse)
        count, first = len(python_blocks(text)), list(parsed)
        parsed.clear()
        python_blocks(nested)
    assert count == 20 and len(first) <= 80 and max(map(len, first)) <= 50_000
    assert first and sum(map(len, first)) <= 4 * len(text)
    assert parsed and sum(map(len, parsed)) <= 4 * len(nested)
