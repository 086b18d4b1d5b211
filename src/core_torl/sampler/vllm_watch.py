"""Runs a vLLM server as a child and ends with it all that it started, when the server ends or the trainer is gone.

A trainer that is killed cannot stop its servers, and a server that is killed leaves its engine processes behind, which
hold the GPU. This small process stands between the two: ``python -m core_torl.sampler.vllm_watch COMMAND...``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from core_torl.launch.processes import PARENT

_PAUSE_S = 0.2
_GRACE_S = 5.0


def main(command: list[str], parent: int) -> int:
    """Run ``command`` until it ends or process ``parent`` does; returns its exit code."""
    ending: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: ending.append(number))
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None and not ending and os.getppid() == parent:
        time.sleep(_PAUSE_S)
    os.killpg(0, signal.SIGTERM)  # this process leads the group, and has a handler
    give_up = time.monotonic() + _GRACE_S
    while child.poll() is None and time.monotonic() < give_up:
        time.sleep(_PAUSE_S)
    code = child.poll()
    print(f"core-torl: the server ended ({'killed' if code is None else code})", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.killpg(0, signal.SIGKILL)  # engine processes that did not hear, and this one
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], int(os.environ[PARENT])))
