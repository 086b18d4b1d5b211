"""What does a locked-in program cost? Programs per second and worker, in each sandbox and in a fresh interpreter.

The obvious way to run a program that a model wrote is a fresh ``python -I``, without any protection; each of them
imports sympy anew. The sandboxes fork from a process that has it loaded, and lock every program in.

    OMP_NUM_THREADS=1 python benchmarks/sandbox.py [--calls 200] [--fresh 5]

All rows run in one go, interleaved in rounds, on the same programs, one at a time; the median of the rounds is printed.
Factoring a small number costs little beside the import, so that column shows the sandbox; solving an equation takes
sympy itself tens of milliseconds, wherever it runs. The ratio is that of the factoring programs.
Start costs are left out for the sandboxes (they start once per training).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from core_torl.config.errors import UserError
from core_torl.sandbox.bubblewrap import Bubblewrap
from core_torl.sandbox.locked_forkserver import LandlockPlan, LockedForkserver
from core_torl.sandbox.pool import ProcessSandbox

ROUNDS = 3


class Landlocked(LockedForkserver):
    """The second way of the locked fork-server, for containers without user namespaces."""

    name = "landlock"

    def plans(self):
        return [LandlockPlan()]


def printing(n: int) -> str:
    return f"print({n})"


def factoring(n: int) -> str:
    return f"import sympy\nprint(sympy.factorint({1_000_003 * (n + 2)}))"


def solving(n: int) -> str:
    return f"import sympy\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - {n + 5} * x + {n}, x))"


def fresh(code: str) -> None:
    subprocess.run([sys.executable, "-I", "-c", code], check=True, stdout=subprocess.DEVNULL)


def runner(sandbox: ProcessSandbox) -> Callable[[str], None]:
    def run(code: str) -> None:
        result = sandbox.submit(code).result()
        if result.status != "ok":
            raise RuntimeError(f"a program of the benchmark ended with {result.status}: {result.stderr}")

    return run


def rate(run: Callable[[str], None], make: Callable[[int], str], number: int) -> float:
    start = time.perf_counter()
    for n in range(number):
        run(make(n))
    return number / (time.perf_counter() - start)


def main() -> None:
    arguments = argparse.ArgumentParser(description="throughput of the sandboxes")
    arguments.add_argument("--calls", type=int, default=200, help="programs per round in each sandbox")
    arguments.add_argument("--fresh", type=int, default=5, help="programs per round in fresh processes")
    options = arguments.parse_args()
    ways: list[tuple[str, Callable[[str], None], int]] = [("fresh python -I", fresh, options.fresh)]
    sandboxes: list[ProcessSandbox] = []
    for kind in (Bubblewrap, LockedForkserver, Landlocked):
        sandbox = kind(workers=1)
        try:
            sandbox.start()
        except UserError as error:
            print(f"left out {kind.name}: {error}")
            continue
        sandboxes.append(sandbox)
        ways.append((f"{kind.name}: {sandbox.isolation['plan']}", runner(sandbox), options.calls))
    rates: dict[tuple[str, str], list[float]] = {}
    try:
        for _ in range(ROUNDS):
            for name, run, number in ways:
                for kind_, make in (("print", printing), ("factorint", factoring), ("solve", solving)):
                    rates.setdefault((name, kind_), []).append(rate(run, make, number))
    finally:
        for sandbox in sandboxes:
            sandbox.close()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'way':<52}{'print/s':>10}{'factorint/s':>13}{'min':>8}{'max':>8}{'solve/s':>10}")
    median = {key: statistics.median(values) for key, values in rates.items()}
    for name, _, _ in ways:
        values = rates[name, "factorint"]
        numbers = (
            f"{median[name, 'print']:>10.1f}{median[name, 'factorint']:>13.1f}{min(values):>8.1f}{max(values):>8.1f}"
        )
        print(f"{name:<52}{numbers}{median[name, 'solve']:>10.1f}")
    print(f"ratio sandbox {median[ways[1][0], 'factorint'] / median['fresh python -I', 'factorint']:.1f}")


if __name__ == "__main__":
    main()
