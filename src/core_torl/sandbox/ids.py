"""Ids for programs that are nobody on this machine, so that the kernel's limit on processes holds them.

The kernel never applies ``RLIMIT_NPROC`` to the real root, also not in a user namespace that root is mapped into. So
where this project runs as root, programs get ids from a range that no account has, one for each worker. That takes a
user namespace with more than one id, which only root may set up. Where it runs as a plain user nothing is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from core_torl.sandbox.worker import WorkerLost

_FIRST = 2_000_000_000  # on the host; far from those of accounts, of subordinate ids and of systemd
_HELPER = "import ctypes, sys; print(ctypes.CDLL(None).unshare(0x10000000), flush=True); sys.stdin.read()"


@dataclass(frozen=True, slots=True)
class IdMap:
    """Inside, programs have the ids 1 to ``count``; outside those from ``first``."""

    first: int
    count: int

    @property
    def text(self) -> str:
        return f"0 0 1\n1 {self.first} {self.count}\n"


def id_map(workers: int) -> IdMap | None:
    """The map for this process's programs; None for a plain user, and for a root with too few ids of its own."""
    if os.geteuid() != 0:
        return None
    free = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    end = max(start + count for start, _, count in free)
    first = min(_FIRST, end - workers - 1)
    inside = any(start <= first and first + workers <= start + count for start, _, count in free)
    return IdMap(first, workers) if inside and first > 65_536 - workers - 2 else None


def user_namespace(ids: IdMap) -> int:
    """A descriptor of a new user namespace with these ids. Raises WorkerLost where it cannot be made."""
    helper = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert helper.stdin is not None and helper.stdout is not None
        if helper.stdout.readline().strip() != "0":
            raise WorkerLost("user namespaces are not allowed")
        try:
            for kind in ("uid_map", "gid_map"):
                Path(f"/proc/{helper.pid}/{kind}").write_text(ids.text)
            return os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise WorkerLost(f"a user namespace cannot be set up: {error.strerror}") from error
    finally:
        helper.communicate("")


def check_readable(paths: list[str]) -> None:
    """Raises WorkerLost if an id that is nobody could not read these folders."""
    for path in paths:
        wanted = 0o005 if os.path.isdir(path) else 0o004
        if os.stat(path).st_mode & wanted != wanted:
            raise WorkerLost(f"{path} must be readable for all, as programs get an id of their own: chmod -R o+rX")
