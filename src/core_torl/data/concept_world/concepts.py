"""The concepts of the embedded world: real names, real definitions, and the misconception each one invites.

One row is one concept: name, formula, misconception (signs flipped, roles swapped, squares read as doubles: the kind of
failure Figure 1 of the CORE paper shows) and whether the shipped policy has a gap there. Rows are grouped in sections
so that a split can hold a whole section out. tests/data/test_concept_world.py holds each formula against an independent
sympy definition of the concept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from core_torl.data.concept_world.formula import Formula


@dataclass(frozen=True, slots=True)
class Shape:
    """How operands stand in a question; ``letters`` are the operands in reading order."""

    letters: str
    pattern: str

    def show(self, operands: dict[str, int | str]) -> str:
        return self.pattern.format(**operands)

    @property
    def symbolic(self) -> str:
        return self.show({x: x for x in self.letters})


SHAPES = {
    "matrix": Shape("abcd", "[ {a} {b} ; {c} {d} ]"),
    "pairs": Shape("abcd", "( {a} , {b} ) and ( {c} , {d} )"),
    "polynomial": Shape("abc", "{a} x^2 + {b} x + {c}"),
    "numbers": Shape("ab", "{a} and {b}"),
}


@dataclass(frozen=True)
class WorldConcept:
    name: str
    section: str
    shape_name: str
    formula: Formula
    misconception: Formula
    gap: bool

    @property
    def uid(self) -> str:
        return f"{self.section}/{self.name}".replace(" ", "_")

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @cached_property
    def definition(self) -> str:
        return f"the {self.name} of {self.shape.symbolic} is {self.formula.text}"


_MATRIX = """
trace                          | a + d                         | b + c                 | gap
determinant                    | a * d - b * c                 | a * d + b * c         | gap
permanent                      | a * d + b * c                 | a * d - b * c         | mastered
antitrace                      | b + c                         | a + d                 | mastered
diagonal product               | a * d                         | a + d                 | mastered
antidiagonal product           | b * c                         | b + c                 | gap
first row sum                  | a + b                         | a + c                 | mastered
second row sum                 | c + d                         | b + d                 | gap
first column sum               | a + c                         | a + b                 | gap
second column sum              | b + d                         | c + d                 | mastered
grand sum                      | a + b + c + d                 | a + d                 | mastered
squared Frobenius norm         | a * a + b * b + c * c + d * d | a * a + d * d         | gap
skewness                       | b - c                         | c - b                 | gap
diagonal difference            | a - d                         | d - a                 | mastered
trace of the square            | a * a + 2 * b * c + d * d     | a * a + d * d         | gap
"""
_VECTORS = """
dot product                    | a * c + b * d                 | a * d + b * c         | gap
cross product                  | a * d - b * c                 | b * c - a * d         | gap
Minkowski product              | a * c - b * d                 | a * c + b * d         | mastered
squared norm of the first      | a * a + b * b                 | 2 * a + 2 * b         | gap
squared norm of the second     | c * c + d * d                 | 2 * c + 2 * d         | mastered
taxicab norm of the first      | a + b                         | a * a + b * b         | mastered
"""
_COMPLEX = """
real part of the product       | a * c - b * d                 | a * c + b * d         | gap
imaginary part of the product  | a * d + b * c                 | b * d                 | mastered
squared modulus of the first   | a * a + b * b                 | a * a - b * b         | mastered
real part of the first square  | a * a - b * b                 | a * a + b * b         | gap
imaginary part of the first square | 2 * a * b                 | b * b                 | gap
real part of the sum           | a + c                         | a + b                 | mastered
imaginary part of the sum      | b + d                         | c + d                 | gap
"""
_POLYNOMIALS = """
discriminant                   | b * b - 4 * a * c             | b * b + 4 * a * c     | gap
value at one                   | a + b + c                     | a - b + c             | mastered
value at minus one             | a - b + c                     | a + b + c             | gap
value at two                   | 4 * a + 2 * b + c             | 2 * a + 2 * b + c     | mastered
derivative at one              | 2 * a + b                     | a + b                 | gap
derivative at two              | 4 * a + b                     | 2 * a + b             | mastered
second derivative              | 2 * a                         | a * a                 | gap
reversal at two                | a + 2 * b + 4 * c             | 4 * a + 2 * b + c     | mastered
"""
_CONGRUENCES = """
residue of the sum             | a + b mod 5                   | a * b mod 5           | mastered
residue of the product         | a * b mod 5                   | a + b mod 5           | gap
residue of the square          | a * a mod 7                   | 2 * a mod 7           | gap
residue of the square sum      | a * a + b * b mod 7           | a + b mod 7           | mastered
residue of the double          | 2 * a mod 5                   | a * a mod 5           | mastered
"""
_PROGRESSIONS = """
third arithmetic term          | a + 2 * b                     | a + 3 * b             | gap
fourth arithmetic term         | a + 3 * b                     | a + 4 * b             | mastered
second geometric term          | a * b                         | a + b                 | mastered
sum of three arithmetic terms  | 3 * a + 3 * b                 | 3 * a + 2 * b         | gap
"""
_RECTANGLES = """
perimeter                      | 2 * a + 2 * b                 | a + b                 | gap
area                           | a * b                         | 2 * a + 2 * b         | mastered
squared diagonal               | a * a + b * b                 | a * b                 | mastered
half perimeter                 | a + b                         | 2 * a + 2 * b         | gap
"""


def _read(section: str, shape: str, table: str) -> list[WorldConcept]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return [
        WorldConcept(n, section, shape, Formula(f), Formula(m), {"gap": True, "mastered": False}[g])
        for n, f, m, g in rows
    ]


CONCEPTS: tuple[WorldConcept, ...] = tuple(
    _read("matrices", "matrix", _MATRIX)
    + _read("vectors", "pairs", _VECTORS)
    + _read("complex numbers", "pairs", _COMPLEX)
    + _read("polynomials", "polynomial", _POLYNOMIALS)
    + _read("congruences", "numbers", _CONGRUENCES)
    + _read("progressions", "numbers", _PROGRESSIONS)
    + _read("rectangles", "numbers", _RECTANGLES)
)
SECTIONS: tuple[str, ...] = tuple(dict.fromkeys(c.section for c in CONCEPTS))
