"""Formulas small enough to be worked out in one line, and the line that works them out.

A formula is a sum of signed terms over the operands a, b, c, d; a term is a constant times a product of operands; the
sum may be reduced by a modulus. ``working`` writes the steps a student would write:
``a * d - b * c = 3 * 5 - 2 * 4 = 15 - 8 = 7``. Every symbol stands between spaces, so a word-level tokenizer sees it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

# No value that a text mentions may be larger: the tiny tokenizer has one token for each integer of this range.
VALUE_LIMIT = 99

_TERM = re.compile(r"([+-])\s*([^+-]+)")


@dataclass(frozen=True, slots=True)
class Term:
    """``sign * factors``; a factor is a constant (only as the first one) or an operand's letter."""

    sign: int
    factors: tuple[int | str, ...]

    def value(self, operands: Mapping[str, int]) -> int:
        """The product without its sign."""
        return prod(f if isinstance(f, int) else operands[f] for f in self.factors)


@dataclass(frozen=True)
class Formula:
    """Parsed form of e.g. ``"b * b - 4 * a * c"`` or ``"a * b mod 7"``."""

    text: str

    @cached_property
    def _parsed(self) -> tuple[tuple[Term, ...], int | None]:
        body, _, modulus = self.text.partition(" mod ")
        terms = []
        for sign, product in _TERM.findall(body if body.startswith("-") else "+ " + body):
            factors = tuple(int(f) if f.strip().isdigit() else f.strip() for f in product.split("*"))
            if any(isinstance(f, str) and not re.fullmatch("[a-d]", f) for f in factors):
                raise ValueError(f"formula {self.text!r}: cannot read the term {product.strip()!r}")
            terms.append(Term(-1 if sign == "-" else 1, factors))
        if not terms or terms[0].sign < 0:
            raise ValueError(f"formula {self.text!r}: needs a first term without a minus sign")
        return tuple(terms), int(modulus) if modulus else None

    @property
    def terms(self) -> tuple[Term, ...]:
        return self._parsed[0]

    @property
    def modulus(self) -> int | None:
        return self._parsed[1]

    def value(self, operands: Mapping[str, int]) -> int:
        total = sum(t.sign * t.value(operands) for t in self.terms)
        return total % self.modulus if self.modulus else total

    def steps(self, operands: Mapping[str, int]) -> list[str]:
        """The stations of the working, from the formula itself to its value, without repetitions."""
        suffix = f" mod {self.modulus}" if self.modulus else ""

        def join(products: list[str]) -> str:
            signs = ["", *("- " if t.sign < 0 else "+ " for t in self.terms[1:])]
            return " ".join(s + p for s, p in zip(signs, products, strict=True)) + suffix

        def show(term: Term) -> str:
            return " * ".join(str(f) if isinstance(f, int) else str(operands[f]) for f in term.factors)

        values = [t.value(operands) for t in self.terms]
        steps = [self.text, join([show(t) for t in self.terms]), join([str(v) for v in values])]
        running, rest = values[0], list(zip(self.terms[1:], values[1:], strict=True))
        while rest:
            term, value = rest.pop(0)
            running += term.sign * value
            tail = "".join(f" {'-' if t.sign < 0 else '+'} {v}" for t, v in rest)
            steps.append(f"{running}{tail}{suffix}")
        if self.modulus:
            steps.append(str(running % self.modulus))
        return [s for i, s in enumerate(steps) if i == 0 or s != steps[i - 1]]

    def working(self, operands: Mapping[str, int]) -> str:
        return " = ".join(self.steps(operands))

    def fits(self, operands: Mapping[str, int]) -> bool:
        """True if no number in the working leaves ``-VALUE_LIMIT .. VALUE_LIMIT``."""
        numbers = re.findall(r"-?\d+", " ".join(s for s in self.steps(operands)[1:]))
        return all(abs(int(n)) <= VALUE_LIMIT for n in numbers)
