"""Problems of the calculation world: questions whose answer a tiny policy cannot know but a line of Python can.

A **kind** is a noun phrase over whole numbers ("the gcd of 1071 and 462"), its value, and the Python that computes it.
A one-stage problem asks for one phrase. A two-stage problem gives the value of one phrase a name and asks for another
phrase that needs it ("Let p be the next prime after 8123 . What is p*34+17 ?").

Operands fall in a test or a training share by a hash of the phrase alone, so neither stage of a test problem has
operands that a training problem or a warm-start text of that kind ever used.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core_torl.problem import Problem

TEST_SHARE = 5  # one tuple of operands in five belongs to the test share


@dataclass(frozen=True)
class Kind:
    """``phrase``, ``setup``, ``expression`` and ``mistake`` are format strings over the operands.

    ``setup`` are the lines before ``expression`` can be evaluated; ``mistake`` is a program that calls a function which
    does not exist, as somebody writes who remembers its name wrongly.
    """

    name: str
    phrase: str
    draw: Callable[[random.Random], tuple[int, ...]]
    value: Callable[..., int]
    expression: str
    mistake: str
    setup: tuple[str, ...] = ()

    def program(self, operands: Sequence[int], named: bool) -> list[str]:
        """The lines that print the value; ``named`` gives it a name first."""
        setup = [line.format(*operands) for line in self.setup]
        expression = self.expression.format(*operands)
        return [*setup, f"x = {expression}", "print(x)"] if named else [*setup, f"print({expression})"]


def next_prime(n: int) -> int:
    n += 1
    while any(n % d == 0 for d in range(2, math.isqrt(n) + 1)):
        n += 1
    return n


def _gcd_operands(rng: random.Random) -> tuple[int, ...]:
    common = rng.randrange(11, 100)  # else most answers would be 1, and easily guessed
    a, b = rng.sample(range(11, 100), 2)
    return common * a, common * b


def _range_operands(rng: random.Random) -> tuple[int, ...]:
    first = rng.randrange(2, 40)
    return first, first + rng.randrange(10, 60)


def _two_digits(count: int) -> Callable[[random.Random], tuple[int, ...]]:
    return lambda rng: tuple(rng.randrange(11, 100) for _ in range(count))


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "product", "{0}*{1}+{2}", _two_digits(3), lambda a, b, c: a * b + c, "{0}*{1}+{2}",
            "print(product({0},{1})+{2})",
        ),
        Kind(
            "large_product", "{0}*{1}", lambda rng: (rng.randrange(101, 1000), rng.randrange(101, 1000)),
            lambda a, b: a * b, "{0}*{1}", "print(product({0},{1}))",
        ),
        Kind(
            "power", "{0}**{1} mod {2}",
            lambda rng: (rng.randrange(11, 100), rng.randrange(11, 100), rng.randrange(101, 1000)),
            lambda a, b, m: pow(a, b, m), "pow({0},{1},{2})", "print(power({0},{1},{2}))",
        ),
        Kind(
            "gcd", "the gcd of {0} and {1}", _gcd_operands, math.gcd, "gcd({0},{1})", "print(gcd({0},{1}))",
            ("from math import gcd",),
        ),
        Kind(
            "range_sum", "the sum of k*k for k from {0} to {1}", _range_operands,
            lambda a, b: sum(k * k for k in range(a, b + 1)), "sum(k*k for k in range({0},{1}+1))",
            "print(total(k*k for k in range({0},{1}+1)))",
        ),
        Kind(
            "next_prime", "the next prime after {0}", lambda rng: (rng.randrange(1000, 10_000),), next_prime, "n",
            "print(next_prime({0}))", ("n = {0}+1", "while any(n%d==0 for d in range(2,n)): n += 1"),
        ),
        Kind(
            "larger", "the larger of {0}*{1} and {2}*{3}", _two_digits(4), lambda a, b, c, d: max(a * b, c * d),
            "max({0}*{1},{2}*{3})", "print(maximum({0}*{1},{2}*{3}))",
        ),
    )
}  # fmt: skip
# The first operand of a second stage is the first stage's value; these kinds take any number there.
FIRST, SECOND = ("next_prime", "gcd", "power", "larger"), ("product", "power")
STAGES: dict[str, tuple[str, ...]] = {name: (name,) for name in KINDS}
STAGES |= {f"{first}_then_{second}": (first, second) for first in FIRST for second in SECOND}
ONE_STAGE = tuple(name for name, stages in STAGES.items() if len(stages) == 1)
TWO_STAGE = tuple(name for name, stages in STAGES.items() if len(stages) == 2)


@dataclass(frozen=True)
class Task:
    """A problem of one or two stages with everything that is needed to solve it.

    ``operands[i]`` belong to stage i; the first operand of the second stage is the value of the first.
    """

    name: str
    operands: tuple[tuple[int, ...], ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(KINDS[name] for name in STAGES[self.name])

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(kind.value(*o) for kind, o in zip(self.kinds, self.operands, strict=True))

    @property
    def phrases(self) -> tuple[str, ...]:
        """The second stage's phrase has the name p where the number will stand."""
        first, *rest = zip(self.kinds, self.operands, strict=True)
        return (first[0].phrase.format(*first[1]), *(kind.phrase.format("p", *o[1:]) for kind, o in rest))

    @property
    def question(self) -> str:
        *first, asked = self.phrases
        return "".join(f"Let p be {phrase} . " for phrase in first) + f"What is {asked} ?"


def is_test_phrase(phrase: str) -> bool:
    """Whether these operands are reserved for test problems; fixed for ever, independent of any seed."""
    return hashlib.sha256(phrase.encode()).digest()[0] % TEST_SHARE == 0


def draw_task(name: str, rng: random.Random, test: bool) -> Task:
    """A task whose stages all have operands of the test share, or all of the training share."""
    operands: list[tuple[int, ...]] = []
    for number, kind in enumerate(KINDS[stage] for stage in STAGES[name]):
        while True:
            drawn = kind.draw(rng)
            shown = kind.phrase.format("p", *drawn[1:]) if number else kind.phrase.format(*drawn)
            if is_test_phrase(shown) is test:
                break
        if number:
            drawn = (KINDS[STAGES[name][0]].value(*operands[0]), *drawn[1:])
        operands.append(drawn)
    return Task(name, tuple(operands))


def make_problem(task: Task, uid: str) -> Problem:
    stage = "one_stage" if len(task.operands) == 1 else "two_stage"
    return Problem(uid=uid, question=task.question, answer=str(task.values[-1]), tags=(stage, task.name))


def make_problems(names: Sequence[str], count: int, seed: int, split: str, test: bool) -> list[Problem]:
    """``count`` problems, the names in turn, no question twice, the same for the same seed on every machine."""
    streams = {name: random.Random(f"{seed}/{split}/{name}") for name in names}
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        name = names[len(problems) % len(names)]
        task = draw_task(name, streams[name], test)
        problems.setdefault(task.question, make_problem(task, f"{split}/{name}/{len(problems)}"))
    return list(problems.values())


def redraw_problem(problem: Problem, seed: int) -> Problem:
    """A problem of the same kind with operands of the training share drawn anew.

    A pure function of (problem.uid, seed); the new uid is the old one, ``~`` and the seed's last six digits.

    Raises:
        ValueError: the problem is not one of this world.
    """
    name = next((tag for tag in problem.tags if tag in STAGES), None)
    if name is None:
        raise ValueError(f"{problem.uid}: not a problem of the calculation world, its operands cannot be drawn anew")
    task = draw_task(name, random.Random(f"{seed}/redraw/{problem.uid}"), test=False)
    return make_problem(task, f"{problem.uid}~{seed % 10**6}")
