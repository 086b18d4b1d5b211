"""Namespaces and a root file system of one's own, by plain system calls: what bubblewrap does, without bubblewrap.

Runs in a worker before it loads anything for programs. Afterwards the process is the init of a new pid namespace, has
no network, and sees an interpreter and the mathematical packages, read-only. It keeps its capabilities, which are worth
something inside these namespaces only. Standard library only.
"""

from __future__ import annotations

import os
import signal
import struct
from contextlib import suppress
from typing import Any

from core_torl.sandbox import lockdown

_FLAGS = (
    lockdown.CLONE_NEWNS
    | lockdown.CLONE_NEWPID
    | lockdown.CLONE_NEWNET
    | lockdown.CLONE_NEWIPC
    | lockdown.CLONE_NEWUTS
    | lockdown.CLONE_NEWCGROUP
)
_MOUNT_SETATTR, _AT_FDCWD, _RECURSIVE = 442, -100, 0x8000
_READ_ONLY, _NOSUID, _NODEV = 1, 2, 4
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_STAGE = "/tmp"


def _attributes(path: str, set_: int) -> None:
    lockdown.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), _RECURSIVE, struct.pack("=QQQQ", set_, 0, 0, 0), 32)


def _new_user_namespace(id_map: str | None) -> None:
    """As root, ``id_map`` is written by a child that stays outside; else we map ourselves."""
    me, uid, gid = os.getpid(), os.getuid(), os.getgid()
    if id_map is None:
        lockdown.unshare(lockdown.CLONE_NEWUSER)
        maps = (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1"))
        for name, text in maps:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return
    (go_read, go_write) = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(OSError):  # told to the parent by the exit status
            os.close(go_write)
            if os.read(go_read, 1):
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{me}/{name}", "w") as file:
                        file.write(id_map)
                status = 0
        os._exit(status)
    os.close(go_read)
    try:
        lockdown.unshare(lockdown.CLONE_NEWUSER)
        os.write(go_write, b"+")
    finally:
        os.close(go_write)
        _, state = os.waitpid(child, 0)
    if state:
        raise OSError("the ids of a user namespace cannot be set up")


def _build_root(place: dict[str, Any]) -> None:
    """A new root with what ``place["shown"]`` and ``place["links"]`` name. Raises OSError."""
    flags = lockdown.MS_NOSUID | lockdown.MS_NODEV
    lockdown.mount(None, "/", None, lockdown.MS_REC | lockdown.MS_PRIVATE)
    lockdown.mount("tmpfs", _STAGE, "tmpfs", flags, "mode=755")
    new, old = f"{_STAGE}/new", f"{_STAGE}/old"
    os.mkdir(new)
    os.mkdir(old)
    lockdown.mount(new, new, None, lockdown.MS_BIND)
    lockdown.syscall(_PIVOT_ROOT[os.uname().machine], os.fsencode(_STAGE), os.fsencode(old))
    os.chdir("/")
    new, old = "/new", "/old"
    for inside, outside in place["shown"].items():
        target, source = new + inside, old + outside
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        lockdown.mount(source, target, None, lockdown.MS_BIND | lockdown.MS_REC)
        if not outside.startswith("/dev/"):
            _attributes(target, _READ_ONLY | _NOSUID | _NODEV)
    for inside, target in place["links"].items():
        os.symlink(target, new + inside)
    for folder in ("/dev/shm", place["scratch"], "/proc"):
        os.makedirs(new + folder, exist_ok=True)
    lockdown.mount("proc", f"{new}/proc", "proc", flags)
    for name in ("sys", "sysrq-trigger", "irq", "bus"):
        covered = f"{new}/proc/{name}"
        if os.path.exists(covered):
            lockdown.mount(covered, covered, None, lockdown.MS_BIND | lockdown.MS_REC)
            _attributes(covered, _READ_ONLY | _NOSUID | _NODEV)
    os.chdir(new)
    lockdown.syscall(_PIVOT_ROOT[os.uname().machine], b".", b".")
    lockdown.unmount(".")
    os.chdir("/")
    flags |= lockdown.MS_BIND | lockdown.MS_RDONLY | 32  # MS_REMOUNT
    lockdown.mount(None, "/", None, flags)


def enclose(place: dict[str, Any]) -> None:
    """Put this process into namespaces; returns in a child that is init there.

    The calling process waits for that child and ends with it. Raises OSError where the kernel does not allow it.
    """
    _new_user_namespace(place["id_map"])
    lockdown.unshare(_FLAGS)
    child = os.fork()
    if child:
        for fd in range(0, 64):  # the pipes belong to the child alone: their ends must close when it ends
            if fd != 2:
                with suppress(OSError):
                    os.close(fd)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _, state = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(state) & 0xFF)
    lockdown.prctl(lockdown.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    _build_root(place)
    # Programs have ids of their own; what they may read must not depend on ours.
    os.umask(0o022)
