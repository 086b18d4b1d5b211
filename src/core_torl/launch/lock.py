"""One launcher at a time in a sweep's folder, whatever kind it is: a lock that the kernel gives back when it dies."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

from core_torl.config.errors import UserError

NAME = ".sweep.lock"
_held: dict[Path, int] = {}  # folder -> descriptor, until the process ends or lets go


def lock(sweep: Path) -> None:
    """Take the lock of ``sweep``, which is made; nothing happens if this process has it. UserError if another has."""
    if sweep in _held:
        return
    sweep.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(sweep / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 64, 0).decode() or "unknown"
        os.close(descriptor)
        raise UserError(
            f"{sweep}: process {holder} is launching jobs in it; wait for it, stop it, or choose another "
            "hydra.sweep.dir"
        ) from error
    except OSError as error:  # some network file systems have no locks
        print(f"core-torl: {sweep} cannot be locked ({error.strerror}): start no second sweep in it", file=sys.stderr)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    _held[sweep] = descriptor


def unlock_all() -> None:
    """Let go of every lock of this process."""
    while _held:
        os.close(_held.popitem()[1])
