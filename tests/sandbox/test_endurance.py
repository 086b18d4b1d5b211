"""Many calls, one in a hundred an attack: every answer right, and nothing left behind.

``CORE_TORL_ENDURANCE=10000`` makes it longer.
"""

from __future__ import annotations

import gc
import os

import pytest

from tests.sandbox.conftest import start
from tests.sandbox.test_lifecycle import descendants, descriptors, settle, temporary

pytestmark = [pytest.mark.sandbox, pytest.mark.slow, pytest.mark.timeout(3000)]

CALLS = int(os.environ.get("CORE_TORL_ENDURANCE", "1000"))
ATTACKS = (
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "import os\nos.kill(-1, 9)",
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(99)\n    os._exit(0)",
    "for i in range(64): open(f'f{i}', 'wb').write(bytes(1 << 20))",
    "while True: print('x' * 1000)",
    "import subprocess\nsubprocess.Popen(['/bin/sleep', '99'], start_new_session=True)",
    "import time\ntime.sleep(99)",
)


@pytest.mark.parametrize("kind", ["bubblewrap", "locked_forkserver"])
def test_nothing_is_left_behind(kind):
    gc.collect()
    before = descendants(), descriptors(), temporary()
    sandbox = start(kind, workers=2, timeout_s=1.0)
    running = len(descendants()), descriptors()
    first, wrong, lost = 0, [], 0
    while first < CALLS:
        numbers = range(first, min(first + 200, CALLS))
        codes = [
            ATTACKS[n // 100 % len(ATTACKS)] if n % 100 == 50 else f"import sympy\nprint(sympy.Integer({n}) ** 2)"
            for n in numbers
        ]
        for n, call in zip(numbers, [sandbox.submit(code) for code in codes], strict=True):
            result = call.result(60)
            lost += result.status == "infrastructure"
            if n % 100 != 50 and (result.status, result.stdout) != ("ok", f"{n**2}\n"):
                wrong.append((n, result))
        first += 200
    assert (wrong, lost) == ([], 0)
    settle(lambda: len(descendants()) <= running[0] and descriptors() <= running[1], True)
    sandbox.close()
    settle(lambda: (descendants(), descriptors(), temporary()), before)
