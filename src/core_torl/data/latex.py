r"""Undoing one escape too many: the published quizzes hold ``\\frac`` where LaTeX needs ``\frac``.

The quizzes of CORE (section 3.3.2) were written to JSON twice, so that after reading them a command has two
backslashes, the row break of a matrix four, and a line break is the two characters backslash and ``n``. About a
hundred commands escaped only once stand between them. The length of each run of backslashes tells which is which:

====== ====================================== =============================================
length before ``n`` that starts no command    before anything else
====== ====================================== =============================================
1      line break                             a command that was escaped once: kept
2      one backslash (``\\nu`` to ``\nu``)    one backslash
4      row break                              row break
5      row break and line break               row break and the start of a command
====== ====================================== =============================================

In general a run loses half of its pairs, and an odd one at its end is read like a run of length 1. One case needs more
than the length: two backslashes are a row break, not a command, inside an environment that itself was escaped once.

``clean`` takes a text out of one level of escaping, so it must run once only: its own output would lose row breaks.
"""

from __future__ import annotations

import re

# The only LaTeX commands starting with n that the quizzes could hold; after any other "n" a backslash means a new line.
N_COMMANDS = frozenset({"ne", "neq", "nu", "nabla", "not", "notin", "nmid", "ni", "neg"})

_RUN = re.compile(r"(\\+)([A-Za-z]*)")
# An environment opened with a single backslash up to its end, as short as possible.
_SINGLE_ENVIRONMENT = re.compile(r"(?<!\\)\\begin\{(\w+\*?)\}.*?(?<!\\)\\end\{\1\}", re.DOTALL)
_DOUBLED_COMMAND = re.compile(r"(?<!\\)\\\\[A-Za-z]{2,}")
_ESCAPED_CHARACTER = re.compile(r"\\.", re.DOTALL)


def clean(text: str) -> str:
    r"""``text`` with one level of escaping removed.

    >>> print(clean(r"$\\frac{1}{2} \\\\ \times$"))
    $\frac{1}{2} \\ \times$
    """
    pieces, position = [], 0
    for environment in _SINGLE_ENVIRONMENT.finditer(text):
        pieces.append(_unescape(text[position : environment.start()]))
        # Nothing in here was escaped twice unless a command says so: its row breaks are pairs already.
        inside = environment.group(0)
        pieces.append(_unescape(inside) if _DOUBLED_COMMAND.search(inside) else inside)
        position = environment.end()
    pieces.append(_unescape(text[position:]))
    return "".join(pieces)


def _unescape(text: str) -> str:
    return _RUN.sub(_shorter_run, text)


def _shorter_run(match: re.Match[str]) -> str:
    run, word = match.groups()
    pairs, odd = divmod(len(run), 2)
    kept = "\\" * pairs
    if not odd:
        return kept + word
    if word.startswith("n") and word not in N_COMMANDS:
        return kept + "\n" + word[1:]
    return kept + "\\" + word


def faults(text: str) -> list[str]:
    r"""What is wrong with the LaTeX of a cleaned text, in words; empty when nothing is.

    Looks for commands that still have two backslashes, line breaks still written out, braces that do not pair up
    (``\{`` and ``\}`` do not count) and an odd number of dollar signs.
    """
    found = []
    if _DOUBLED_COMMAND.search(text):
        found.append("a command with two backslashes")
    for match in _RUN.finditer(text):
        if len(match.group(1)) % 2 and match.group(2).startswith("n") and match.group(2) not in N_COMMANDS:
            found.append("a line break written as backslash n")
            break
    bare = _ESCAPED_CHARACTER.sub("", text)
    depth = 0
    for character in bare:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            break
    if depth:
        found.append("unbalanced braces")
    if bare.count("$") % 2:
        found.append("an odd number of dollar signs")
    return found
