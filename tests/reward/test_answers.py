r"""Reading the final answer: the last box, nothing else, and no letter that was not chosen."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_torl.reward.answers import bare, last_box, option_letter

OPTIONS = ("12", "$17$", r"\frac{1}{2}", "none of these")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{\sqrt{a^{2}}}{b_{1}}}", r"\frac{\sqrt{a^{2}}}{b_{1}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\begin{aligned}x\\\boxed{3}\end{aligned}", "3"),
        (r"\boxed {3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed{\boxed{ 3 }}", "3"),
        (r"\boxed{x = \boxed{3}}", r"x = \boxed{3}"),
        (r"\boxed{\boxed{1},\boxed{2}}", r"\boxed{1},\boxed{2}"),
        (r"a stray } and { and \boxed{3}", "3"),
        ("\\boxed{\n3\n}", "3"),
        (r"\boxed{}", ""),
        (r"an open \boxed{\frac{1}{2} and then \boxed{4}", "4"),
        (r"\boxed{3} and, cut off, \boxed{4", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\\boxed{3}", None),
        (r"\boxedin{3}", None),
        (r"\boxed 3", None),
        ("the answer is 3", None),
        ("", None),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    assert last_box(text) == content


def test_hostile_text_costs_linear_time() -> None:
    hostile = [r"\boxed{" * 20_000 + "}" * 20_000, r"\boxed{" * 20_000 + r"\boxed{1}", "{" * 100_000 + "}" * 100_000]
    start = time.perf_counter()
    assert [last_box(text) for text in hostile] == ["", "1", None]
    assert time.perf_counter() - start < 5.0


@given(st.text(alphabet="ab{}\\ $x.", max_size=30))
def test_a_box_with_balanced_content_gives_it_back(content: str) -> None:
    balanced = "".join(c for c in content if c not in "{}\\")
    assert last_box(rf"text \boxed{{{balanced}}} text") == balanced.strip()
    last_box(content)  # and nothing makes it raise
    bare(content)
    option_letter(rf"\boxed{{{content}}}", OPTIONS, "ABCD")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" $x$. ", "x"),
        ("$$x$$", "x"),
        (r"\(x\)", "x"),
        (r"\[ x \]", "x"),
        (r"$\boxed{x}$", "x"),
        ("$1$ and $2$", "$1$ and $2$"),
        (r"\left. x \right.", r"\left. x \right."),
        ("...", "..."),
        ("$", "$"),
        ("", ""),
    ],
)
def test_bare(answer: str, expected: str) -> None:
    assert bare(answer) == expected


@pytest.mark.parametrize("content", ["B", "(B)", "B.", "B)", "b", r"\text{B}", r"\textbf{(B)}", "$B$", "B. 17", "17"])
def test_ways_to_choose_b(content: str) -> None:
    assert option_letter(rf"\boxed{{{content}}}", OPTIONS, "ABCD") == "B"


@pytest.mark.parametrize("content", ["", "E", "A, B", "AB", "A or B", "A. B", "A. 17", "a cat", "18", "B 17", "$", "."])
def test_a_box_that_chooses_nothing(content: str) -> None:
    assert option_letter(rf"\boxed{{{content}}}", OPTIONS, "ABCD") is None


@pytest.mark.parametrize("text", ["", "the answer is a mess", "The answer is A.", "A", "(A)", r"\boxed{A"])
def test_no_box_no_letter(text: str) -> None:
    assert option_letter(text, OPTIONS, "ABCD") is None


def test_equal_option_texts_choose_nothing_by_text() -> None:
    assert option_letter(r"\boxed{same}", ("same", "same"), "AB") is None
    assert option_letter(r"\boxed{B}", ("same", "same"), "AB") == "B"
