"""What does safety cost? Answers checked per second by the killable pool, by fresh processes, and with no protection.

The obvious safe way to run computer algebra on text that a model wrote is one process per check; each of them imports
sympy anew. The pool keeps its processes and loses only those that had to be killed. The unprotected way, in the
calling process, is the ceiling: its first endless answer ends the run.

    OMP_NUM_THREADS=1 python benchmarks/verifier.py [--checks 1500] [--fresh 3]

All rows run in one go, interleaved in rounds, on the same answers; the median of the rounds is printed. Start costs
are left out for the pool (it starts once per training) and belong to each check of the fresh processes.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
from collections.abc import Callable, Sequence

from core_torl.reward import worker
from core_torl.reward.verifier import Verifier

Pair = tuple[str, str]
ROUNDS = 3


def make_pairs(number: int, seed: int) -> list[Pair]:
    """Different answers of the kinds that mathematics problems have, about half of them right."""
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < number:
        a, b, c = rng.randint(2, 999), rng.randint(2, 999), rng.randint(2, 99)
        wrong = rng.randint(0, 1)
        gold, given = rng.choice(
            [
                (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a + wrong}}}{{{b}}}"),
                (str(a * 1000 + b), f"{a},{b + wrong:03d}"),
                (rf"{a}\sqrt{{{c}}}", rf"{a}\sqrt{{{c + wrong}}}"),
                (rf"{a}\pi", rf"{a + wrong} \pi"),
                (f"({a}, {b}]", f"({a},{b + wrong}]" if a < b else f"({a},{b}]"),
                (f"{a}x + {b}", f"{b} + {a + wrong}x"),
                (f"{a}, {-b}", f"{-b - wrong}, {a}"),
            ]
        )
        pairs.append((gold, given))
    return pairs


def rate(check: Callable[[Sequence[Pair]], object], pairs: Sequence[Pair]) -> float:
    start = time.perf_counter()
    check(pairs)
    return len(pairs) / (time.perf_counter() - start)


def check_in_fresh_processes(pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        with Verifier(workers=1) as once:
            once.check([pair])


def check_in_process(pairs: Sequence[Pair]) -> None:
    for gold, given in pairs:
        worker.judge(gold, given)


def main() -> None:
    arguments = argparse.ArgumentParser(description="throughput of the answer verifier")
    arguments.add_argument("--checks", type=int, default=1500, help="answers per round for pool and in-process")
    arguments.add_argument("--fresh", type=int, default=3, help="answers per round for fresh processes")
    options = arguments.parse_args()
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off
    worker.judge("1", r"\frac{2}{2}")  # imports sympy and builds the grammar
    with Verifier(workers=1) as one, Verifier(workers=2) as two:
        warm_up = make_pairs(200, seed=-1)
        one.check(warm_up)
        two.check(warm_up)
        check_in_process(warm_up)
        ways: list[tuple[str, Callable[[Sequence[Pair]], object], int]] = [
            ("pool, 1 worker", one.check, options.checks),
            ("pool, 2 workers", two.check, options.checks),
            ("fresh process per check", check_in_fresh_processes, options.fresh),
            ("in-process, unprotected", check_in_process, options.checks),
        ]
        rates: dict[str, list[float]] = {name: [] for name, _, _ in ways}
        for round_ in range(ROUNDS):
            pairs = make_pairs(options.checks, seed=round_)
            for name, check, number in ways:
                rates[name].append(rate(check, pairs[:number]))
    print(f"{'way':<26}{'checks/s':>10}{'min':>9}{'max':>9}")
    for name, values in rates.items():
        print(f"{name:<26}{statistics.median(values):>10.1f}{min(values):>9.1f}{max(values):>9.1f}")
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"ratio verifier {median['pool, 1 worker'] / median['fresh process per check']:.1f}")


if __name__ == "__main__":
    main()
