"""What every sandbox promises, whichever it is."""

from __future__ import annotations

import threading
import time

import pytest

from core_torl.config.errors import UserError
from core_torl.sandbox.none import NoSandbox
from core_torl.sandbox.protocol import Sandbox
from core_torl.sandbox.sandbox_fusion import SandboxFusion
from tests.sandbox.conftest import KINDS, start
from tests.sandbox.fake_fusion import FakeFusion

pytestmark = pytest.mark.sandbox


@pytest.fixture(scope="module", params=[*KINDS, "sandbox_fusion"])
def sandbox(request):
    if request.param != "sandbox_fusion":
        made = start(request.param, workers=2, timeout_s=1.5)
        yield made
        made.close()
        return
    server = FakeFusion()
    made = SandboxFusion(url=server.url, concurrency=2, timeout_s=1.5, memory_mb=512)
    made.start()
    yield made
    made.close()
    server.close()


def run(sandbox, code):
    return sandbox.submit(code).result(timeout=30)


def test_is_a_sandbox(sandbox):
    assert isinstance(sandbox, Sandbox) and sandbox.concurrency == 2
    assert isinstance(NoSandbox(), Sandbox)


@pytest.mark.parametrize(
    ("code", "status", "stdout", "last"),
    [
        ("print(1 + 1)", "ok", "2\n", ""),
        ("import sys\nprint('a')\nprint('b', file=sys.stderr)", "ok", "a\n", "b"),
        ("print('before')\ny", "error", "before\n", "NameError: name 'y' is not defined"),
        ("def f(:\n", "error", "", "SyntaxError: invalid syntax"),
        ("import sys; print(3); sys.exit()", "ok", "3\n", ""),
        ("import sys; sys.exit(0)", "ok", "", ""),
        ("import sys; sys.exit(3)", "error", "", ""),
        ("import sys; sys.exit('so')", "error", "", "so"),
        ("raise SystemExit", "ok", "", ""),
        ("if __name__ == '__main__': print('main')", "ok", "main\n", ""),
        ("class A: pass\nprint(A.__module__)", "ok", "__main__\n", ""),
        ("print('é π', end='')", "ok", "é π", ""),
        ("import os\nos.kill(os.getpid(), 11)", "error", "", None),
        ("import time\nprint('x', flush=True)\ntime.sleep(9)", "time_limit", "x\n", ""),
        ("import sys\nprint(repr(sys.stdin.read()))", "ok", "''\n", ""),
        ("import sys\nprint(1)\nsys.stdout.close()", "ok", "1\n", ""),
        ("import sys\nprint(1)\nsys.stdout.flush()\nsys.stdout = None", "ok", "1\n", ""),
        ("import sys\nprint(1)\nsys.stderr.close()\ndel sys.stderr", "ok", "1\n", ""),
        ("import sys; sys.exit('MemoryError is what I say')", "error", "", "MemoryError is what I say"),
        ("raise SystemExit('MemoryError: none left')", "error", "", "MemoryError: none left"),
    ],
    ids=range(20),
)
def test_endings(sandbox, code, status, stdout, last):
    result = run(sandbox, code)
    assert (result.status, result.stdout) == (status, stdout), result
    if last is not None:
        assert (result.stderr.strip().splitlines() or [""])[-1] == last
    assert result.seconds >= 0


def test_output_beyond_the_limit_is_cut(sandbox):
    result = run(sandbox, "print('x' * 300_000)")
    assert result.status == "output_limit" and result.stdout == "x" * 100_000


def test_calls_run_side_by_side_and_waiting_is_free(sandbox):
    start_ = time.monotonic()
    calls = [sandbox.submit("import time; time.sleep(0.6)\nprint(1)") for _ in range(6)]
    assert [c.result().status for c in calls] == ["ok"] * 6  # the last waited longer than the limit of 1.5 s
    assert 1.7 < time.monotonic() - start_ < 6


def test_every_answer_goes_to_its_own_question(sandbox):
    found: dict[int, str] = {}

    def ask(first: int) -> None:
        for n in range(first, first + 10):
            found[n] = run(sandbox, f"print({n} * {n})").stdout

    threads = [threading.Thread(target=ask, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n * n}\n" for n in found} and len(found) == 40


def test_start_may_be_called_twice(sandbox):
    sandbox.start()
    assert run(sandbox, "print(7)").stdout == "7\n"


def test_none_refuses():
    with pytest.raises(UserError, match="sandbox=bubblewrap"):
        NoSandbox().start()
    assert NoSandbox().submit("print(1)").result().status == "infrastructure"
    NoSandbox().close()


# What the process sandboxes add.


def test_tracebacks_show_the_program_alone(locked):
    result = run(locked, "def f():\n    return 1 / 0\n\nf()\n")
    assert result.stderr.splitlines() == [
        "Traceback (most recent call last):",
        '  File "main.py", line 4, in <module>',
        "    f()",
        '  File "main.py", line 2, in f',
        "    return 1 / 0",
        "           ~~^~~",
        "ZeroDivisionError: division by zero",
    ]


def test_a_signal_is_named_on_stderr(locked):
    assert run(locked, "import os; os.abort()").stderr.splitlines()[-1] == "Aborted (SIGABRT)"


def test_memory_is_told_from_errors(locked):
    assert run(locked, "x = bytearray(2 << 30)").status == "memory_limit"
    assert run(locked, "try:\n    x = bytearray(2 << 30)\nexcept MemoryError: print('caught')").stdout == "caught\n"
    assert run(locked, "import numpy\nx = numpy.ones(1 << 28)").status == "memory_limit"


@pytest.mark.parametrize(
    "word", ["MemoryError", "std::bad_alloc", "Cannot allocate memory", "numpy._ArrayMemoryError: x"]
)
@pytest.mark.parametrize("end", ["sys.exit(1)", "os._exit(1)", "os.abort()"])
def test_what_a_program_writes_on_stderr_is_no_want_of_memory(locked, word, end):
    code = f"import os, sys\nprint('Traceback (most recent call last):\\n{word}', file=sys.stderr, flush=True)\n{end}"
    assert run(locked, code).status == "error"


def test_want_of_memory_in_a_forked_process_is_not_its_parent_s(locked):
    code = "import os, sys\nif os.fork() == 0: raise MemoryError\nos.wait()\nsys.exit(1)"
    assert run(locked, code).status == "error"
    assert run(locked, "import sys\nsys.exit(1)").status == "error"  # nothing is left of an earlier one
    assert run(locked, "raise MemoryError").status == "memory_limit"
    assert run(locked, "import sys\nsys.exit(1)").status == "error"


def test_a_stream_of_the_program_s_own_cannot_break_out_of_the_end(locked):
    code = "import sys\nclass Tee:\n    def write(self, t): sys.__stdout__.write(t)\n    def flush(self): raise KeyError\nsys.stdout = Tee()\nprint(3)"
    result = run(locked, code)
    assert (result.status, result.detail) == ("error", "exit status 120") and "forkserver" not in result.stderr


def test_the_packages_are_there(locked):
    code = "import sympy, numpy, scipy.special, mpmath\nx = sympy.Symbol('x')\nprint(sympy.solve(x**2 - 4), numpy.arange(3).sum())"
    assert run(locked, code).stdout == "[-2, 2] 3\n"


def test_random_numbers_differ_from_call_to_call(locked):
    code = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    assert len({part for _ in range(3) for part in run(locked, code).stdout.split()}) == 6


def test_a_program_may_use_processes_and_threads(locked):
    code = (
        "import subprocess, threading, sys\nprint(subprocess.run(['/bin/echo', 'hi'], capture_output=True, text=True).stdout)\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()"
    )
    assert run(locked, code).stdout.split() == ["hi", "thread"]


def test_a_pool_of_processes_works_where_there_is_shared_memory(locked):
    if not locked.isolation["namespaces"]:
        pytest.skip("the landlock way has no /dev/shm")
    code = "from multiprocessing import Pool\ndef f(x): return x * x\nif __name__ == '__main__':\n    with Pool(2) as p: print(p.map(f, [1, 2]))"
    assert run(locked, code).stdout == "[1, 4]\n", run(locked, code)
