"""What every sandbox promises: a program in, what it printed and how it ended out.

Six endings, and the line between the first five and the last one is what matters. ``infrastructure`` means that the
sandbox failed, not the program (a worker died, a server did not answer): nobody knows what the program would have
done, so a policy must neither see nor be judged by it. Everything else is the program's own doing.

The contract (tests/sandbox/test_contract.py holds every sandbox to it):

- Each program runs alone: no name, file or process of one call is there in another.
- Calls run side by side, ``concurrency`` of them at once; more of them wait for their turn, and waiting does not count
  against a program's time.
- ``submit`` never raises for what a program does; its future always ends.
- ``start`` proves with a canary that programs run and, unless the user allowed otherwise, that they are locked in.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from core_torl.trajectory import ToolStatus


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use. ``timeout_s`` is seconds on the clock, the sizes are MiB, output is bytes."""

    timeout_s: float = 10.0
    cpu_s: float = 10.0
    memory_mb: int = 1024
    processes: int = 16
    file_mb: int = 16
    scratch_mb: int = 64
    output_bytes: int = 100_000


@dataclass(frozen=True, slots=True)
class Execution:
    """How one program ended. ``detail`` explains a status other than ok and error; it is for logs, not for policies.

    ``stdout`` and ``stderr`` are cut at the output limit; undecodable bytes are replaced. ``seconds`` is the program's
    time on the clock, without waiting for a free worker.
    """

    stdout: str
    stderr: str
    status: ToolStatus
    seconds: float = 0.0
    detail: str = ""


@runtime_checkable
class Sandbox(Protocol):
    """Runs Python programs. See the module's contract."""

    concurrency: int

    def start(self) -> None:
        """Start workers and prove them with a canary. May be called twice.

        Raises UserError (one line, with the fix) where programs cannot run or cannot be locked in.
        """
        ...

    def submit(self, code: str) -> Future[Execution]:
        """Run ``code`` as soon as a worker is free."""
        ...

    def close(self) -> None:
        """End every worker and give back every resource. May be called twice."""
        ...
