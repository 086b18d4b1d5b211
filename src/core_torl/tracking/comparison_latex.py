r"""A comparison of cells as a LaTeX table, from the same texts as the Markdown one.

It wants ``\usepackage{booktabs}`` and nothing else. Every text is escaped, intervals stand small behind their value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from core_torl.tracking.comparison_table import absent, empty_rows, final_legend, final_table, legend, table

_ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "–": "--",
    "…": r"\ldots{}", "|": r"\textbar{}",
}  # fmt: skip
_DIGITS = r"[+-]?[\d.,]+(?:e[+-]?\d+)?"
_NUMBER = re.compile(rf"{_DIGITS}%?")
_WITH_INTERVAL = re.compile(rf"(?P<value>{_DIGITS}) (?P<ends>\[{_DIGITS}, {_DIGITS}\])")
_POWER = re.compile(r"e([+-]?)0*(\d+)")


def escape(text: str) -> str:
    """Plain text as LaTeX prints it."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def cell(text: str) -> str:
    """One cell: signs as such, powers of ten as people write them, and the interval of a value small."""
    found = _WITH_INTERVAL.fullmatch(text)
    if found:
        return f"{_signed(found['value'])} {{\\scriptsize {_signed(found['ends'])}}}"
    return _signed(text) if _NUMBER.fullmatch(text) else escape(text)


def _signed(numbers: str) -> str:
    """1e-05 as a power, and a minus that is no hyphen."""
    signed = re.sub(r"(?<!e)[+-]", r"$\g<0>$", escape(numbers))
    return _POWER.sub(lambda e: rf"$\cdot 10^{{{e[1].removeprefix('+')}{e[2]}}}$", signed)


def latex(comparison: Mapping[str, Any]) -> str:
    """The whole ``table.tex``: a ``tabular`` of the cells and, where there is one, another of ``final``.

    What else a reader must know stands below it as comments: legend, notes, and the runs that are not in it.
    """
    heads, rows = table(comparison)
    parts = [f"% {comparison['title']}", "% needs \\usepackage{booktabs}"]
    parts += [tabular(heads, rows + empty_rows(comparison, len(heads)))]
    parts += [f"% {line}" for line in legend(comparison)]
    if "final" in comparison:
        parts += ["", tabular(*final_table(comparison)), f"% {final_legend(comparison)}"]
    parts += [f"% Note: {note}" for note in comparison["notes"]]
    parts += [f"% Not in the table: {run}" for run in absent(comparison)]
    return "\n".join(" ".join(part.splitlines()) if part.startswith("%") else part for part in parts) + "\n"


def tabular(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs ``tabular``: the first column left, all others right."""
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", "\\toprule"]
    lines += [f"{' & '.join(map(escape, heads))} \\\\", "\\midrule"]
    lines += [f"{' & '.join(map(cell, row))} \\\\" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])
