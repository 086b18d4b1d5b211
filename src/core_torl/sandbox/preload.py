"""What a worker loads ahead of time for its programs. Runs inside the sandbox, before any program."""

from __future__ import annotations

import sys
from contextlib import suppress


def warm() -> None:
    """Load what programs load, the lazy parts too; once here instead of once per program."""
    import sympy

    with suppress(ImportError):  # programs can do without numpy
        import numpy
        import numpy.random  # noqa: F401

    x = sympy.Symbol("x")
    sympy.solve(x**2 - x - 1, x)
    sympy.integrate(sympy.sin(x) * sympy.exp(x), x)
    sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
    sympy.factorint(2**32 + 1)
    sympy.N(sympy.pi, 20)
    str(sympy.Matrix([[1, 2], [3, 4]]).eigenvals())


def reseed() -> None:
    """Another state of numpy's generator for the next program; the standard library's reseeds itself after a fork."""
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()
