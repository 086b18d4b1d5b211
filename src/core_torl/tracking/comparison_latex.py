r"""A comparison of cells as a LaTeX table, from the same texts as the Markdown one.

It wants ``\usepackage{booktabs}`` and nothing else. Every text is escaped, intervals stand small behind their value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from core_torl.tracking.comparison_table import final_legend, final_table, legend, table

_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "–": "--",
    "…": r"\ldots{}", "|": r"\textbar{}",
}  # fmt: skip
_NUMBER = re.compile(r"[+-]?[\d.,]+%?")
_WITH_INTERVAL = re.compile(r"(?P<value>[+-]?[\d.,]+) (?P<ends>\[.*\])")


def escape(text: str) -> str:
    """Plain text as LaTeX prints it."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def cell(text: str) -> str:
    """One cell: minus signs as such, and the interval of a value small."""
    found = _WITH_INTERVAL.fullmatch(text)
    if found:
        ends = found["ends"].replace("-", "$-$")
        return f"{_signed(found['value'])} {{\\scriptsize {ends}}}"
    return _signed(text) if _NUMBER.fullmatch(text) else escape(text)


def _signed(number: str) -> str:
    return escape(number).replace("-", "$-$").replace("+", "$+$")


def latex(comparison: Mapping[str, Any]) -> str:
    """The whole ``table.tex``: a ``tabular`` of the cells and, where there is one, another of ``final``."""
    parts = [f"% {comparison['title']}", "% needs \\usepackage{booktabs}", tabular(*table(comparison))]
    parts += [f"% {line}" for line in legend(comparison)]
    if "final" in comparison:
        parts += ["", tabular(*final_table(comparison)), f"% {final_legend(comparison)}"]
    return "\n".join(" ".join(part.splitlines()) if part.startswith("%") else part for part in parts) + "\n"


def tabular(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs ``tabular``: the first column left, all others right."""
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", "\\toprule"]
    lines += [f"{' & '.join(map(escape, heads))} \\\\", "\\midrule"]
    lines += [f"{' & '.join(map(cell, row))} \\\\" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])
