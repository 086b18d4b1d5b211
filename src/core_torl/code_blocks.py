"""Which parts of a text are Python programs, which are outputs, and what is left for the answer.

A policy asks for a run by writing a python block and then the line that opens an output block. Everything here is a
pure function of strings; spans count characters.

A line that ends in a python fence opens a block, whatever stands before the fence on the line. A line that starts with
three backticks closes it, indented or not. The line that opens an output block closes it as well, for policies often
leave the closing fence out. A block that is closed by nothing is no program.

A program may itself hold a line of backticks, in a text that it prints. So the block goes to the first closing fence at
which the program parses, and to the first closing fence of all if it never does. Parsing is bounded in the number of
fences and of characters: the time is linear in the text, also for one that was written to be slow.

Source: ToRL, section 2.3. The released reader knows neither ``py`` nor ``Python`` nor indented fences, and cuts a block
at a line of backticks inside a string.
"""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

FENCE = "```"
TAGS = ("python3", "python", "py")
OUTPUT = f"{FENCE}output"
POLICIES = ("last", "all", "first")

# Bounds of the search for the closing fence: programs parsed for one block, fences looked at for one block,
# characters of one program, and characters parsed for a text as a multiple of its length.
_PARSED_PER_BLOCK = 4
_FENCES_PER_BLOCK = 32
_LONGEST_PARSED = 50_000
_PARSED_PER_TEXT = 4


@dataclass(frozen=True, slots=True)
class Block:
    """A closed python block: its program, dedented, with line feeds, and its characters ``start`` to ``end``.

    The span is half open and includes the fences. Of a block that an output block closed, it ends where that begins.
    """

    code: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Fence:
    """A line with a fence. ``start``, ``end``: of the fence, its tag included; ``content``: where the next line starts.

    "close" starts its line. "tail" ends a line that starts with something else: it can close an output only.
    """

    kind: Literal["python", "output", "close", "tail"]
    start: int
    end: int
    content: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything found in a text, in order: closed blocks, output blocks, and programs that nothing closes."""

    blocks: list[Block]
    outputs: list[tuple[int, int]]
    unclosed: list[tuple[int, int]]


def python_blocks(text: str) -> list[Block]:
    """The closed python blocks of ``text``, in order; their spans do not overlap."""
    return layout(text).blocks


def output_spans(text: str) -> list[tuple[int, int]]:
    """Spans of the output blocks in ``text``, in order, with their fences; an unclosed one runs to the end of the text.

    It ends before a python block or another output block that starts inside it. A turn that asks for a run ends with
    the opening fence, and that counts here as an unclosed block without content.
    """
    return layout(text).outputs


def outside_blocks(text: str) -> str:
    """``text`` without its python and output blocks, a line feed in the place of each: what may hold the final answer.

    A program that nothing closes is left out too: it is code as far as it goes, to the next python fence or to the end.
    """
    found = layout(text)
    spans = [(block.start, block.end) for block in found.blocks] + found.outputs + found.unclosed
    kept, place = [], 0
    for start, end in sorted(spans):
        kept.append(text[place:start])
        place = end
    return "\n".join([*kept, text[place:]])


def select(blocks: Sequence[Block], policy: str) -> str | None:
    """The program to run: that of the ``last`` or ``first`` block, or ``all`` in one; None where there is no block.

    Raises:
        ValueError: another ``policy``.
    """
    if policy not in POLICIES:
        raise ValueError(f"block_policy={policy!r}: use {', '.join(POLICIES[:-1])} or {POLICIES[-1]}")
    if not blocks:
        return None
    if policy == "all":
        return "\n".join(block.code for block in blocks)
    return blocks[-1 if policy == "last" else 0].code


def layout(text: str) -> Layout:
    """All blocks of ``text`` at once; the other functions are views of it."""
    fences = list(_fences(text))
    found = Layout([], [], [])
    left = [_PARSED_PER_TEXT * len(text)]  # characters that may still be parsed; a list, as _closing spends from it
    i = 0
    while i < len(fences):
        fence = fences[i]
        if fence.kind == "python":
            closing = _closing(text, fences, i, left)
            if closing is None:
                # Nothing but another python fence can come next.
                following = fences[i + 1].start if i + 1 < len(fences) else len(text)
                found.unclosed.append((fence.start, following))
                i += 1
                continue
            other = fences[closing]
            end = other.start if other.kind == "output" else other.end
            found.blocks.append(Block(_code(text, fence, other), fence.start, end))
            # An output fence is a block of its own; the other kinds are used up.
            i = closing if other.kind == "output" else closing + 1
        elif fence.kind == "output":
            other = fences[i + 1] if i + 1 < len(fences) else None
            if fence.end != fence.start + len(OUTPUT):  # opened and closed on one line
                found.outputs.append((fence.start, fence.end))
            elif other is None:
                found.outputs.append((fence.start, len(text)))
            else:
                closed = other.kind in ("close", "tail")
                found.outputs.append((fence.start, other.end if closed else other.start))
                i += closed
            i += 1
        else:
            i += 1
    return found


def _fences(text: str) -> Iterator[_Fence]:
    """The lines of ``text`` that hold a fence. A line ends at a line feed only."""
    begin, last = 0, ""
    while begin < len(text):
        stop = text.find("\n", begin)
        content = len(text) if stop < 0 else stop + 1
        fence = _fence(text[begin:content], begin, content)
        if fence is not None and (fence.kind != "tail" or last == "output"):
            last = fence.kind
            yield fence
        begin = content


def _fence(line: str, begin: int, content: int) -> _Fence | None:
    if FENCE not in line:
        return None
    body = line.rstrip()
    # Only the end can be a tag; a character whose lower case is longer must not move the places of the others.
    tail = body[-len(OUTPUT) :].lower()
    for tag in TAGS:
        if tail.endswith(tag) and (before := body[: -len(tag)].rstrip(" \t")).endswith(FENCE):
            return _Fence("python", begin + len(before.rstrip("`")), begin + len(body), content)
    if tail == OUTPUT:
        return _Fence("output", begin + len(body) - len(OUTPUT), begin + len(body), content)
    indent = len(body) - len(body.lstrip())
    start = begin + indent
    rest = body[indent + len(OUTPUT) :]
    if body[indent : indent + len(OUTPUT)].lower() == OUTPUT and not (rest[0].isalnum() or rest[0] == "_"):
        inline = body.endswith(FENCE)
        return _Fence("output", start, begin + len(body) if inline else start + len(OUTPUT), content)
    if body.startswith(FENCE, indent):
        return _Fence("close", start, start + len(body[indent:]) - len(body[indent:].lstrip("`")), content)
    return _Fence("tail", begin + len(body.rstrip("`")), begin + len(body), content) if body.endswith(FENCE) else None


def _closing(text: str, fences: Sequence[_Fence], opening: int, left: list[int]) -> int | None:
    """Which fence closes the block that ``fences[opening]`` opens; None if the next python fence comes before any."""
    first: int | None = None
    nested = False
    parsed = 0
    for i in range(opening + 1, min(opening + 1 + _FENCES_PER_BLOCK, len(fences))):
        fence = fences[i]
        if fence.kind == "python":
            # After a closing fence this is the next block. Before one it may be a line of a string in the program.
            if first is not None:
                break
            nested = True
            continue
        if first is None and not nested:
            first = i
        length = fence.start - fences[opening].content
        if parsed < _PARSED_PER_BLOCK and length <= min(_LONGEST_PARSED, left[0]):
            parsed += 1
            left[0] -= length
            if _parses(_code(text, fences[opening], fence)):
                return i
        if fence.kind == "output":
            break
    return first


def _code(text: str, opening: _Fence, closing: _Fence) -> str:
    """The program between two fences, its last line feed left out; indented as a whole it is moved to the margin."""
    code = text[opening.content : closing.start].replace("\r\n", "\n")
    body, _, last = code.rpartition("\n")
    if not last.strip():  # the indent of the closing fence
        code = body
    first = next((line for line in code.split("\n") if line.strip()), "")
    return textwrap.dedent(code) if first[:1] in (" ", "\t") else code


def _parses(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string is a warning
        try:
            ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: NUL or a lone surrogate
            return False
    return True
