"""The LaTeX table: nothing unescaped, intervals behind their values, as many cells in each row as columns."""

from __future__ import annotations

import re

import pytest

from core_torl.tracking.comparison_latex import cell, escape, latex, tabular


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("core/cr_filler", r"core/cr\_filler"),
        (r"a\b {50%} #1 & $x^2~", r"a\textbackslash{}b \{50\%\} \#1 \& \$x\textasciicircum{}2\textasciitilde{}"),
        ("–", "--"),
        ("<0.001", r"\textless{}0.001"),
    ],
)
def test_every_letter_with_a_meaning_is_escaped(text: str, expected: str):
    assert escape(text) == cell(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22.5 [5.7, 40.9]", r"22.5 {\scriptsize [5.7, 40.9]}"),
        ("-8.3 [-23.0, +6.7]", r"$-$8.3 {\scriptsize [$-$23.0, $+$6.7]}"),
        ("1e-05", r"1$\cdot 10^{-5}$"),
        (
            "-2.5e+09 [-3.1e+09, 1.0e-04]",
            r"$-$2.5$\cdot 10^{9}$ {\scriptsize [$-$3.1$\cdot 10^{9}$, 1.0$\cdot 10^{-4}$]}",
        ),
        ("+45.8", "$+$45.8"),
        ("1,004", "1,004"),
        ("x-y 3 [a]", "x-y 3 [a]"),
        ("", ""),
    ],
)
def test_numbers_and_intervals(text: str, expected: str):
    assert cell(text) == expected


def test_a_tabular_has_a_column_for_each_head():
    lines = tabular(["cell_name", "p", "q (%)"], [["a&b", "0.01", "1.0 [0.0, 2.0]"], ["c", "", "–"]]).splitlines()
    assert lines[0] == r"\begin{tabular}{lrr}" and lines[1] == r"\toprule" and lines[-1] == r"\end{tabular}"
    rows = [line for line in lines if line.endswith(r"\\")]
    assert len(rows) == 3 and all(len(re.findall(r"(?<!\\)&", row)) == 2 for row in rows)
    assert lines[4].startswith(r"a\&b & 0.01")


def test_titles_cannot_leave_their_comment():
    comparison = {
        "title": "two\nlines", "headline": "gap/greedy/accuracy", "sets": ["gap"], "decoding": "greedy",
        "baseline": None, "confidence": 0.95, "cells": [], "empty": [{"label": "c_d", "seeds": "0 of 1 (1 killed)"}],
        "notes": ["a note\nof two lines"],
        "unfinished": [{"folder": "f", "state": "killed", "why": "gone", "cell": "c_d", "seed": 3}],
    }  # fmt: skip
    text = latex(comparison | {"cells": [{
        "label": "a_b", "seeds": [0], "seeds_text": "1", "rl_steps": 3.0, "sampled_tokens": None, "before": {}, "after": {},
        "retention": None, "paired": None, "baseline": None,
    }]})  # fmt: skip
    assert text.startswith("% two lines\n")
    assert all(line.startswith(("%", "\\")) or line.endswith(r"\\") for line in text.splitlines())
    assert r"a\_b & 1 & 3 & --" in text and r"c\_d & 0 of 1 (1 killed) & -- & --" in text
    assert text.endswith("% Note: a note of two lines\n% Not in the table: f (cell c_d, seed 3): killed, gone\n")
