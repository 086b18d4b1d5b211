r"""What did the policy answer? Reading a final answer out of text, without guessing.

The final answer is what stands in the last box, ``\boxed{...}``. Everything in this module is a pure function of
strings and strict on purpose. A reader that falls back to "any capital letter near the word answer" pays a policy
for writing "the answer is a mess", and a policy under RL finds such gifts quickly. So: no box, no answer; a box that
was never closed is no answer; a box that names two options names none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# An escaped character is one token, so that ``\{`` and ``\\`` never count as a brace or as the start of a box.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)(?![A-Za-z])\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_STYLE = re.compile(r"^\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|rm|bf)\s*\{(?P<inside>[^{}]*)\}")
_LETTER = re.compile(r"^\(?\s*(?P<letter>[A-Za-z])\s*(?P<mark>[).:]*)(?P<rest>.*)$", re.DOTALL)
_SPACING = re.compile(r"\\[ ,;:!]|~|\s")
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` (or ``\fbox{...}``) of ``text``, stripped; None where there is none.

    Braces must balance, escaped ones aside. If the box that was opened last is never closed (an answer cut off by the
    length limit), the result is None: an earlier box was a step, not the answer. Of boxes inside each other the
    outermost counts, unless it holds nothing but another box. One pass, so that hostile text costs linear time.
    """
    open_braces: list[int | None] = []  # for each open brace the start of its content if it belongs to a box
    closed: dict[int, int] = {}
    last = None
    for token in _TOKEN.finditer(text):
        if token["box"]:
            last = token.end()
            open_braces.append(last)
        elif token["open"]:
            open_braces.append(None)
        elif token["close"] and open_braces:
            start = open_braces.pop()
            if start is not None:
                closed[start] = token.start()
    if last is None or last not in closed:
        return None
    start = min(s for s, end in closed.items() if s <= last and end >= closed[last])
    end = closed[start]
    while True:
        content = start + len(text[start:end]) - len(text[start:end].lstrip())
        inner = _TOKEN.match(text, content, end)
        if not (inner and inner["box"]) or text[closed[inner.end()] + 1 : end].strip():
            return text[start:end].strip()
        start, end = inner.end(), closed[inner.end()]


def _is_one_group(content: str) -> bool:
    """True if the first brace of ``content`` closes at its very end."""
    depth = 0
    for token in _TOKEN.finditer(content):
        if token["box"] or token["open"]:
            depth += 1
        elif token["close"]:
            depth -= 1
            if depth == 0:
                return token.end() == len(content)
    return False


def bare(answer: str) -> str:
    r"""``answer`` without what only surrounds it: spaces, ``$...$``, ``\(...\)``, a box, a final full stop."""
    text = answer.strip()
    while True:
        before = text
        for left, right in _WRAPPERS:
            inside = text[len(left) : len(text) - len(right)]
            if len(text) >= len(left) + len(right) and text.startswith(left) and text.endswith(right):
                # "$1$ and $2$" has dollars at both ends and is no single formula.
                if left not in inside and right not in inside:
                    text = inside.strip()
                break
        if text.startswith((r"\boxed", r"\fbox")) and _is_one_group(text):
            text = (last_box(text) or "").strip()
        if text.endswith(".") and not text.endswith((r"\right.", "..")):
            text = text[:-1].rstrip()
        if text == before:
            return text


def _plain(text: str) -> str:
    """An option text as it is compared: no spaces, no dollars, no final full stop."""
    return re.sub(r"[\s$]", "", bare(text)).removesuffix(".")


def option_letter(text: str, options: Sequence[str], letters: str) -> str | None:
    r"""The option that ``text`` chooses in its last box, as one of ``letters``; None if it chooses none or several.

    A box counts as a choice if it holds one letter (``B``, ``(B)``, ``b.``, ``\text{B}``), a letter, a mark and words
    (``B. 17``, ``(B) 17``), or exactly the text of one option, spaces and dollars aside. ``letters[i]`` belongs to
    ``options[i]``. A letter beside the words of another option (``B. 12`` where C says 12) is a contradiction: None.
    """
    content = last_box(text)
    if content is None:
        return None
    content = bare(content)
    style = _STYLE.match(content)
    if style:
        content = (style["inside"] + content[style.end() :]).strip()
    by_text = [letter for letter, option in zip(letters, options, strict=True) if _plain(option) == _plain(content)]
    match = _LETTER.match(_SPACING.sub(" ", content))
    if match and (letter := match["letter"].upper()) in letters:
        rest = match["rest"].strip()
        if not rest:
            return letter
        if match["mark"]:
            named = [other for other, option in zip(letters, options, strict=True) if _plain(option) == _plain(rest)]
            if letter in named:
                return letter
            if not named and not (len(rest.strip("(). ")) == 1 and rest.strip("(). ").upper() in letters):
                return letter
            return None
    return by_text[0] if len(by_text) == 1 and _plain(content) else None
