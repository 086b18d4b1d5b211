"""One job as one process group: started apart from the terminal, asked to stop, killed, and cleaned up after.

A job may start processes of its own: ranks, sandboxes, W&B's writer. They share its process group, so the launcher
leaves nothing of a job when that has ended, however it ended. And a job ends with its launcher: the kernel tells it
when that dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from core_torl.launch.prefork import Forked, Nursery

PARENT = "CORE_TORL_LAUNCHER"  # process id of the launcher, for the job
IDENTITY = "CORE_TORL_IDENTITY"  # what the launcher takes the job for
LEFTOVERS_S = 5.0  # how long what a job started may go on after it, to write its last bytes
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# A rank, port, run id or W&B service that the launcher itself has must not be shared by all of its jobs: a service that
# outlives a killed job keeps its run id. How errors are shown is changed within a front door and told to jobs by it.
_OWN = (
    "LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "WANDB_RUN_ID", "HYDRA_FULL_ERROR",
    "GROUP_RANK", "LOCAL_WORLD_SIZE", "WANDB_RESUME", "WANDB_NAME", "WANDB_SERVICE",
    "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",  # a job starts its own ranks
)  # fmt: skip


def _prctl(option: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0


def end_with_launcher() -> None:
    """In a job: be sent SIGTERM when the launcher dies, so that the run saves and ends. A no-op in other processes."""
    if not is_job():
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[PARENT]):  # it died while this process was starting
        os.kill(os.getpid(), signal.SIGTERM)


def is_job() -> bool:
    """Whether this process is a job of a launcher, and not one that a job started: only the job leads a session."""
    return PARENT in os.environ and os.getsid(0) == os.getpid()


def environment_of_jobs(own: Mapping[str, str]) -> dict[str, str]:
    """What a job finds in its environment: this process's, less what must not be shared, and what is its ``own``."""
    inherited = {k: v for k, v in os.environ.items() if k not in _OWN}
    return {**inherited, "PYTHONUNBUFFERED": "1", PARENT: str(os.getpid()), **own}


class JobProcess:
    """A running job. ``log`` takes both of its streams and is continued, not overwritten, by a further attempt.

    With a ``nursery`` it is forked there, without one it is started anew. Raises NurseryLost.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], nursery: Nursery | None = None
    ) -> None:
        self.started = time.monotonic()
        self._process: subprocess.Popen[bytes] | Forked
        own = environment_of_jobs(environment)
        if nursery is not None:
            self._process = nursery.fork(command[1:], log, own)
            return
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=own,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """What Ctrl-C would do: the run finishes its RL step, saves and ends. Ranks hear it from the first one."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Kill the job and all that it started, at once."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def clean_up(self) -> None:
        """After the job has ended: wait for what it started, then end that too, and reap it."""
        for number, patience in ((0, LEFTOVERS_S), (signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
            self._signal_group(number)
            give_up = time.monotonic() + patience
            while self._group_is_there():
                if time.monotonic() > give_up:
                    break
                time.sleep(0.02)
            else:
                return

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _group_is_there(self) -> bool:
        # Reap those that this process adopted; what is left of the group then runs.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-self.pid, os.WNOHANG)[0]:
                pass
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True


@contextlib.contextmanager
def orphans_adopted() -> Iterator[None]:
    """While the block runs, what dead jobs leave behind become children of this process; at its end they are reaped."""
    before = set(_children())
    adopting = _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        if adopting:
            for pid in set(_children()) - before:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _children() -> list[int]:
    """Process ids of this process's children, dead ones that nobody has reaped among them; [] outside of Linux."""
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            found += [int(pid) for pid in path.read_text().split()]
    return found
