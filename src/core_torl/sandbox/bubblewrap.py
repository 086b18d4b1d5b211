"""Programs in fork-servers that bubblewrap locks in: the sandbox that this project brings with it.

Each worker is one ``bwrap`` around one fork-server (``forkserver.py``) with sympy and numpy loaded. bubblewrap gives it
namespaces of its own (users, processes, network, mounts, IPC, host name) and a root file system that holds /usr, the
interpreter and the mathematical packages, all read-only, and nothing else. The fork-server keeps four capabilities
inside these namespaces, to give each program a scratch file system and an id of its own; a program has none.

It guards against programs that read or write files of this machine, use its network, see its environment or its
processes, use up its memory, processes, disk or output, run for ever, outlive their call, look at or leave something
for another call, or attack their worker. It does not guard against bugs of the kernel, against programs that use their
limits to the full at the same time (plan memory as workers x memory_mb plus about 150 MiB each), or against shared
memory that no process has in its own tables any more (touched, then unmapped by one and kept mapped by another): the
total limit does not see that, and the address space of each of the ``processes`` is what bounds it. And it does not
hide what kind of machine this is (processor, kernel version, contents of /usr), where the interpreter, the packages
and this project's own files lie on it (/proc/self/mountinfo names their folders on the host), or the limits
(/proc/1/cmdline is the worker's command line).

Where bubblewrap is missing or may not run, the locked fork-server takes its place, and the log says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import PurePath

from core_torl.sandbox.environment import BOOT, PACKAGES_DIR, VARIABLES, code_files, settings, view
from core_torl.sandbox.ids import check_readable, id_map, user_namespace
from core_torl.sandbox.locked_forkserver import fallbacks
from core_torl.sandbox.pool import Plan, ProcessSandbox
from core_torl.sandbox.protocol import Limits
from core_torl.sandbox.worker import Command, WorkerLost

_CODE_DIR = "/worker"
_DEVICES = ("null", "zero", "full", "random", "urandom")
# What the fork-server needs: mounts for scratch, ids for programs, signals to those. Programs get none of it.
_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_KILL")


class BubblewrapPlan:
    """Workers inside ``bwrap``."""

    name = "bubblewrap"

    def __init__(self) -> None:
        self._namespace: int | None = None
        self._ids = None

    def open(self, workers: int) -> None:
        """Raises WorkerLost if bubblewrap is not installed."""
        program = shutil.which("bwrap")
        if program is None:
            raise WorkerLost("bwrap is not installed")
        self._program, self._view, self._ids = program, view(), id_map(workers)
        if self._ids is not None:
            check_readable([*self._view.shown.values(), *self._view.packages.values()])
            self._namespace = user_namespace(self._ids)

    def close(self) -> None:
        if self._namespace is not None:
            os.close(self._namespace)
            self._namespace = None

    def walls(self) -> list[str]:
        """The arguments that make the file system inside."""
        seen, words = self._view, []
        # Folders that bwrap makes on the way to a mount would be readable for their owner only.
        places = [*seen.shown, *seen.packages, *(f"{_CODE_DIR}/{m}" for m in code_files()), "/dev/shm"]
        for folder in sorted({str(above) for place in places for above in PurePath(place).parents[:-1]}):
            words += ["--dir", folder]
        for inside, outside in {**seen.shown, **seen.packages}.items():
            words += ["--ro-bind", outside, inside]
        for inside, target in seen.links.items():
            words += ["--symlink", target, inside]
        for module, outside in code_files().items():
            words += ["--ro-bind", outside, f"{_CODE_DIR}/{module}"]
        for device in _DEVICES:
            words += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
            words += ["--symlink", target, f"/dev/{name}"]
        return [*words, "--dir", "/dev/shm", "--dir", seen.scratch, "--proc", "/proc", "--remount-ro", "/"]

    def command(self, index: int, limits: Limits) -> Command:
        words = [self._program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        words += ["--unshare-cgroup-try", "--hostname", "sandbox", "--as-pid-1", "--die-with-parent", "--new-session"]
        if self._namespace is None:
            words += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        else:
            words += ["--userns", str(self._namespace)]
        words += ["--cap-drop", "ALL"]
        for capability in _CAPABILITIES:
            words += ["--cap-add", capability]
        words.append("--clearenv")
        scratch = self._view.scratch
        for name, value in {**VARIABLES, "HOME": scratch, "TMPDIR": scratch}.items():
            words += ["--setenv", name, value]
        place = {
            "code": _CODE_DIR,
            "packages": PACKAGES_DIR,
            "scratch": scratch,
            "enclose": False,
            "namespaces": True,
            "locks": True,
            "job_id": None if self._ids is None else 1 + index,
            "readable": ["/"],
        }
        inside = [self._view.python, "-I", "-B", "-c", BOOT, _CODE_DIR, settings(limits, place)]
        descriptors = [] if self._namespace is None else [self._namespace]
        return Command([*words, *self.walls(), "--chdir", "/", *inside], descriptors)


class Bubblewrap(ProcessSandbox):
    """See the module. Arguments: conf/sandbox/bubblewrap.yaml."""

    name = "bubblewrap"

    def plans(self) -> Sequence[Plan]:
        return [BubblewrapPlan(), *fallbacks(self.allow_unsafe)]
