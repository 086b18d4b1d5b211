"""The texts that the tool-using tiny policy is warm-started on: a base model that may write Python, in small.

Most texts answer from the head, and the number is a guess. The others write a program in the very layout that the
tool loop makes: a block of Python, the marker that opens a block of output, what the program printed, and on. About a
third of the programs are broken. After the error half of the texts write the program again, half give up and guess.
Two-stage problems take one block a stage, and the second block has the first one's number in it; some texts stop after
the first and guess. So reward has much to find: to write code, to write it soundly, to mend it, and to go on.

Every observation is true: the program was run. It counts in the loss, with little weight. Pre-training reads outputs
like any other text, which is why a policy whose program is not run goes on with an output that it made up. The little
weight is because its digits cannot be predicted, and neither can guesses: nothing but noise for the other weights.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from core_torl.data.calculation_world.problems import ONE_STAGE, TWO_STAGE, Kind, Task, draw_task, make_problem
from core_torl.problem import Problem

Render = Callable[[Problem], str]

CODE_INTROS = (" Let me run it .", " I write code .")
PLAIN_INTROS = (" I think it is", " In my head it is")
SEPARATORS = (" ", "*", "+", ",", " and ", "**", " mod ", "(", "\n")
BREAKS = ("undefined", "unclosed", "mistake")
# Loss weights: of what the policy shall write, and of numbers that nothing in the text determines.
WRITTEN, NOISE = 1.0, 0.1
# Share of copying drills in stage 1; the rest are sound programs.
COPY_DRILLS = 0.5
# Share of second blocks that are broken, and of two-stage texts that guess once the first number is there.
SECOND_BROKEN, STOPS_EARLY = 0.2, 0.2


@dataclass(frozen=True, slots=True)
class Text:
    """``spans`` are (text, loss weight) in order; joined they are the whole text, end token excluded."""

    spans: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of each kind of text; they are normalised by their sum.

    ``plain``: no code. ``sound``: code whose first block runs. ``mended`` and ``given_up``: the first block is broken,
    and the text then writes it again or guesses.
    """

    plain: float = 0.60
    sound: float = 0.26
    mended: float = 0.07
    given_up: float = 0.07


@functools.lru_cache(maxsize=4096)
def observe(code: str) -> str:
    """What the tool loop shows of this program: what it printed, or the last line of its traceback."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<program>", "exec"), {})  # our own programs only: see ``program``
    except (NameError, SyntaxError) as error:
        return traceback.format_exception_only(error)[-1].strip()
    return printed.getvalue().strip()


def program(kind: Kind, operands: tuple[int, ...], rng: random.Random, broken: bool) -> str:
    """A program for one stage, in one of two styles; broken in one of three ways."""
    if not broken:
        return "\n".join(kind.program(operands, named=rng.random() < 0.5))
    way = rng.choice(BREAKS)
    if way == "mistake":
        return kind.mistake.format(*operands)
    lines = kind.program(operands, named=way == "undefined")
    last = lines.pop()
    return "\n".join([*lines, "print(y)" if way == "undefined" else last.removesuffix(")")])


class Corpus:
    """An endless, seeded stream of texts. ``render(problem)`` is the policy's own prompt template.

    ``gap_epsilon`` is the share of guesses that are right, ``copied_weight`` the loss weight of numbers in a box that
    stand in an observation.
    """

    def __init__(
        self,
        render: Render,
        seed: int,
        gap_epsilon: float,
        mixture: Mixture | None = None,
        copied_weight: float = 1.0,
    ) -> None:
        self.render, self.gap_epsilon, self.copied_weight = render, gap_epsilon, copied_weight
        self.rng = random.Random(f"calculation/{seed}")
        self.mixture = mixture or Mixture()

    def stream(self) -> Iterator[Text]:
        kinds = list(self.mixture.__slots__)
        weights = [getattr(self.mixture, k) for k in kinds]
        while True:
            names = self.rng.choice((ONE_STAGE, TWO_STAGE))
            task = draw_task(self.rng.choice(names), self.rng, test=False)
            kind = self.rng.choices(kinds, weights)[0]
            yield self._plain(task) if kind == "plain" else self._code(task, kind)

    def drills(self) -> Iterator[Text]:
        """Stage 1: numbers copied from line to line, and sound programs. It builds what copying needs in few steps."""
        while True:
            yield self._copy_drill() if self.rng.random() < COPY_DRILLS else self._program()

    def _copy_drill(self) -> Text:
        """One line of numbers, three times; the first is given."""
        rng, line = self.rng, ""
        for _ in range(rng.randrange(2, 6)):
            digits = rng.choice((1, 2, 2, 3, 3, 4, 5, 6))
            line += f"{rng.choice(SEPARATORS)}{rng.randrange(10 ** (digits - 1), 10**digits)}"
        return Text(((f" What is{line}", 0.0), (f"\n{line}\n{line}\n", WRITTEN)))

    def _program(self) -> Text:
        names = self.rng.choice((ONE_STAGE, TWO_STAGE))
        task = draw_task(self.rng.choice(names), self.rng, test=False)
        spans = [self._prompt(task)]
        for stage in range(len(task.operands)):
            words = "Now with p ." if stage else self.rng.choice(CODE_INTROS)
            spans += self._block(task, stage, words, broken=False)
        return Text((*spans, *self._boxed(task)))

    def _prompt(self, task: Task) -> tuple[str, float]:
        return self.render(make_problem(task, "")), 0.0

    def _guess(self, right: int) -> str:
        """A number of as many digits, right in a share ``gap_epsilon`` of the cases and else by chance alone."""
        if self.rng.random() < self.gap_epsilon:
            return str(right)
        digits = len(str(right))
        return str(self.rng.randrange(10 ** (digits - 1), 10**digits))

    def _plain(self, task: Task) -> Text:
        guess = self._guess(task.values[-1])
        return Text(
            (
                self._prompt(task),
                (f"{self.rng.choice(PLAIN_INTROS)} ", WRITTEN),
                (guess, NOISE),
                (" . So \\boxed{" + guess + "}", WRITTEN),
            )
        )

    def _guessed(self, task: Task, words: str) -> list[tuple[str, float]]:
        guess = self._guess(task.values[-1])
        return [(f"{words} I guess \\boxed{{", WRITTEN), (guess, NOISE), ("}", WRITTEN)]

    def _block(self, task: Task, stage: int, words: str, broken: bool) -> list[tuple[str, float]]:
        """Words, a program, and what came of it."""
        code = program(task.kinds[stage], task.operands[stage], self.rng, broken)
        return [(f"{words}\n```python\n{code}\n```\n```output", WRITTEN), (f"\n{observe(code)}\n```\n", NOISE)]

    def _code(self, task: Task, kind: str) -> Text:
        spans = [self._prompt(task)]
        words, last = self.rng.choice(CODE_INTROS), len(task.operands) - 1
        for stage in range(last + 1):
            if stage:
                if self.rng.random() < STOPS_EARLY:
                    return Text((*spans, *self._guessed(task, "One step is done .")))
                words = "Now with p ."
            broken = self.rng.random() < SECOND_BROKEN if stage else kind != "sound"
            spans += self._block(task, stage, words, broken)
            if broken:
                mends = self.rng.random() < 0.5 if stage else kind == "mended"
                if not mends:
                    return Text((*spans, *self._guessed(task, "The code failed .")))
                spans += self._block(task, stage, "The code failed . Again .", broken=False)
        return Text((*spans, *self._boxed(task)))

    def _boxed(self, task: Task) -> list[tuple[str, float]]:
        return [("So \\boxed{", WRITTEN), (str(task.values[-1]), self.copied_weight), ("}", WRITTEN)]
