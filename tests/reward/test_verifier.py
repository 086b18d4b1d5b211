r"""The pool: every job ends, no verdict depends on its neighbours, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from core_torl.reward.base import OUTCOMES
from core_torl.reward.verifier import MAX_CHARS, Verdict, Verifier

pytestmark = pytest.mark.slow

ENDLESS = [("1", "9^{9^{9^{9}}}"), ("1", "100000000!"), ("1", "7^{10^{8}}")]


def slow_but_right(first: int) -> tuple[str, str]:
    """About half a second of CPU time: two sets in opposite order. A new ``first`` each time, as sympy remembers."""
    numbers = [str(first + i) for i in range(60)]
    return rf"\{{{','.join(numbers)}\}}", rf"\{{{','.join(reversed(numbers))}\}}"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, timeout_s=1.0) as pool:
        yield pool


def test_endless_jobs_time_out_and_the_others_are_right(verifier: Verifier) -> None:
    easy = [(str(i), f"{2 * i}/2") for i in range(1, 9)]
    batch = [ENDLESS[0], *easy[:4], ENDLESS[1], *easy[4:], ENDLESS[2], ("1", "2")]
    verifier.check([("1", "1")])
    before = verifier.pids
    verdicts = verifier.check(batch)
    expected = {"timeout": set(ENDLESS), "wrong": {("1", "2")}, "correct": set(easy)}
    for pair, verdict in zip(batch, verdicts, strict=True):
        assert pair in expected[verdict.outcome], (pair, verdict)
    assert "CPU" in verdicts[0].detail
    assert not set(before) & set(verifier.pids), "two workers, three kills: each worker has been replaced"
    assert not any(alive(pid) for pid in before), "a killed worker is collected, not left as a zombie"
    assert verifier.check([("2", "1+1")]) == [Verdict("correct")]


def test_order_duplicates_and_empty_batches(verifier: Verifier) -> None:
    pairs = [(str(i % 3), "1") for i in range(30)]
    assert [v.outcome for v in verifier.check(pairs)] == ["correct" if i % 3 == 1 else "wrong" for i in range(30)]
    assert verifier.check([]) == []


def test_odd_texts_are_verdicts_not_exceptions(verifier: Verifier) -> None:
    texts = ["", "\n", "\x00", "\ud800", "}{", "\\", "'; import os", "1" * (MAX_CHARS + 1), "(" * 200 + "1" + ")" * 200]
    for verdict in verifier.check([("1", text) for text in texts]):
        assert verdict.outcome in OUTCOMES and verdict.outcome != "error"
    assert verifier.check([("2" * (MAX_CHARS + 1), "1")])[0].outcome == "unparsed_gold"


def test_from_many_threads(verifier: Verifier) -> None:
    with ThreadPoolExecutor(4) as threads:
        batches = list(threads.map(lambda i: verifier.check([(str(i), str(i)), (str(i), "-1")]), range(12)))
    assert all([v.outcome for v in batch] == ["correct", "wrong"] for batch in batches)


def test_a_worker_that_died_idle_is_replaced_in_silence(verifier: Verifier) -> None:
    verifier.check([("1", "1"), ("2", "2")])
    os.kill(verifier.pids[0], signal.SIGKILL)
    assert [v.outcome for v in verifier.check([("1", "1"), ("2", "3")])] == ["correct", "wrong"]


def check_and_meddle(verifier: Verifier, pair: tuple[str, str], signals: list[tuple[int, float]]) -> Verdict:
    """Check ``pair``; once its worker has begun, send that the signals, each followed by a pause in seconds."""
    verifier.check([("1", "1")])
    (worker,) = verifier._pool
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.extend(verifier.check([pair])))
    thread.start()
    while not (worker.started and worker.pair == pair):
        assert thread.is_alive(), "the job was over before anything could be done to its worker"
        time.sleep(0.001)
    for number, pause_s in signals:
        os.kill(worker.process.pid, number)
        time.sleep(pause_s)
    thread.join()
    return verdicts[0]


def test_clock_and_memory_and_death() -> None:
    with Verifier(timeout_s=2.0, wall_timeout_s=60.0, memory_mb=128) as pool:
        # A machine too busy to run the worker, for longer than timeout_s: no CPU time passes, the answer stays right.
        assert check_and_meddle(pool, slow_but_right(100), [(signal.SIGSTOP, 2.5), (signal.SIGCONT, 0.0)]) == Verdict(
            "correct"
        )
        # Stopped for good: only the clock on the wall can tell.
        pool.wall_timeout_s = 2.0
        verdict = check_and_meddle(pool, slow_but_right(200), [(signal.SIGSTOP, 0.0)])
        assert verdict.outcome == "timeout" and "clock" in verdict.detail
        # Killed by somebody else in the middle of its job.
        pool.wall_timeout_s = 60.0
        verdict = check_and_meddle(pool, slow_but_right(300), [(signal.SIGKILL, 0.0)])
        assert verdict.outcome == "error" and "-9" in verdict.detail
        # The expanded polynomial has a hundred million terms; math-verify by itself would call this wrong.
        pool.timeout_s = 30.0
        verdict = pool.check([("y+1", "(x+1)^{100000000}-y")])[0]
        assert verdict.outcome == "error" and "memory" in verdict.detail


def test_an_interrupted_check_leaves_no_late_answer(verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    verifier.check([("1", "1")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(verifier, "_listen", interrupt)
        verifier.check([("1", "2")])
    assert all(worker.pair is None for worker in verifier._pool)
    assert verifier.check([("1", "1")]) == [Verdict("correct")]


def test_a_worker_that_cannot_start_is_an_error_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Verifier() as pool, pytest.raises(RuntimeError, match=r"before it was ready.*reward\.memory_mb"):
        pool.check([("1", "1")])


def test_nothing_is_left_when_the_interpreter_ends() -> None:
    code = (
        "from core_torl.reward.verifier import Verifier\n"
        "v = Verifier()\n"
        "assert v.check([('1', '1')])[0].outcome == 'correct'\n"
        "import sys\n"
        "assert not {'torch', 'transformers', 'sympy'} & set(sys.modules)\n"
        "print(*v.pids)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    (pid,) = map(int, run.stdout.split())
    assert not alive(pid)
    assert run.stderr == ""


def test_close_may_come_first_last_and_twice(verifier: Verifier) -> None:
    Verifier().close()  # nothing was started
    verifier.check([("1", "1")])
    pids = verifier.pids
    verifier.close()
    verifier.close()
    assert pids and verifier.pids == [] and not any(alive(pid) for pid in pids)


def test_the_worker_is_lean() -> None:
    code = "import sys, core_torl.reward.worker; print(*{'torch', 'transformers', 'sympy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == ""
