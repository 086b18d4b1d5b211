r"""The process that decides whether two formulas are equal, and that is made to be killed.

Computer algebra on text that a model wrote can run for ever, often inside one call of C code (a power tower, a large
factorial) where no Python signal handler gets a turn. So equality is decided here, in a process of its own, and the
clock is the kernel's: before a job the process arms a CPU timer (``ITIMER_PROF``) whose signal keeps its default
action, death. CPU time, not wall time: a machine that is busy or a process that was paused does not turn a right
answer into a timeout. The parent (``verifier.py``) sees the death, names it, and starts another worker.

Protocol, one JSON value per line: in ``[gold, prediction, timeout_s]``; out ``"ready"`` once, then for each job
``"started"`` and ``[outcome]``. Imports stay lean (no torch, no transformers): a worker starts in about two
seconds of CPU time, nearly all of it sympy, and none of it counts against a job.

Memory is bounded by ``RLIMIT_AS``. math-verify treats a MemoryError like any failed comparison and would answer
"not equal", so the calls in which memory is spent are guarded: they end the process instead.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from core_torl.reward.answers import bare

OUT_OF_MEMORY = 77  # exit status; os._exit with it skips everything that could need more memory

_PERCENT = re.compile(r"\s*\\?%$")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?")
# Spellings that math-verify reads as a product or not at all, and the same thing in LaTeX.
_SPELLINGS = (
    (re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)"), r"\1 \\times 10^{\2}"),
    (re.compile(r"([+-]?\d+)\s+(\d+)/(\d+)"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)

    return call


def _guard_memory() -> None:
    """Put the guard around every place where math-verify computes inside a ``try`` that swallows any exception."""
    from math_verify import grader, parser
    from sympy import Expr, Set
    from sympy.core.evalf import EvalfMixin

    def doit(expression: Any) -> Any:
        try:
            return expression.doit()
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return expression  # the original's rule: what cannot be evaluated is compared as it stands

    grader.safe_sympy_doit = doit
    for owner, names in (
        (parser, ("parse_latex_cached", "parse_expr_cached")),
        (grader, ("simplify", "solve", "sympy_expr_eq")),
        (EvalfMixin, ("evalf",)),
        (Expr, ("round",)),
        (Set, ("symmetric_difference",)),
    ):
        for name in names:
            setattr(owner, name, _guarded(getattr(owner, name)))


def parse(text: str) -> list[Any]:
    r"""``text`` (a bare answer, with or without dollars) as sympy objects; empty if it cannot be read as a whole.

    math-verify finds formulas inside prose; given ``12\pi`` without dollars it reads 12. Here the text is the answer,
    so it is wrapped as one formula, and its reader of numbers in prose is used only for a number in groups ("1 000").
    """
    import math_verify

    body = bare(text).replace("\u2212", "-").replace(r"\$", "").replace("$", "")
    percent = _PERCENT.search(body) is not None
    body = _PERCENT.sub("", body).strip()
    if not body:
        return []
    suffix = "%" if percent else ""
    options: dict[str, Any] = {"fallback_mode": "no_fallback", "parsing_timeout": None}
    if _GROUPED.fullmatch(body):
        return math_verify.parse(body + suffix, [math_verify.ExprExtractionConfig()], **options)
    for spelling, latex in _SPELLINGS:
        if spelling.fullmatch(body):
            body = spelling.sub(latex, body)
    return math_verify.parse(f"$${body}$${suffix}", [math_verify.LatexExtractionConfig()], **options)


def judge(gold: str, prediction: str) -> str:
    """The outcome of one pair. Gold goes first everywhere: math-verify follows the form of the gold answer.

    Texts that are equal once trimmed are correct even if neither can be read as mathematics.
    """
    import math_verify

    expected = parse(gold)
    if bare(gold) and bare(gold) == bare(prediction):
        return "correct"
    if not expected:
        return "unparsed_gold"
    given = parse(prediction)
    if not given:
        return "unparsed_prediction"
    # "x < 2" and "(-\infty, 2)" say the same; by default math-verify sees it only if the gold is the inequality.
    same = math_verify.verify(expected, given, timeout_seconds=None, allow_set_relation_comp=True)
    return "correct" if same else "wrong"


def main(memory_mb: int) -> NoReturn:
    """Serve jobs from standard input until it is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Ignored or blocked signals survive exec: without these two lines a parent's mask could disarm the clock.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off: they are, on purpose
    # A print in some library must not be read as an answer: the protocol keeps a descriptor of its own.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _guard_memory()
    judge("x", r"\frac{1}{2}")  # the first call builds the grammar; that, too, belongs to the start
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)

    def say(message: Any) -> None:
        out.write(json.dumps(message) + "\n")

    say("ready")
    for line in sys.stdin:
        gold, prediction, timeout_s = json.loads(line)
        say("started")
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        outcome = judge(gold, prediction)
        signal.setitimer(signal.ITIMER_PROF, 0)
        say([outcome])
    sys.exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
