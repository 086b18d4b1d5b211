"""Programs in fork-servers that lock themselves in, for machines without bubblewrap. Two ways, the stronger first.

1. *namespaces*: the worker makes user, pid, network, mount, IPC and host-name namespaces and a root file system of its
   own (``namespaces.py``). This guards against the same as ``bubblewrap.py`` and leaves the same open; bubblewrap is
   preferred because its walls are older and more widely looked at.
2. *landlock*: for containers in which namespaces are forbidden. Landlock keeps programs away from every file but the
   interpreter's, the packages' and their scratch folder; seccomp takes sockets, tracing and signals to others away.
   Holes beside those of the first way: the size of the scratch folder is not bounded as a whole (only each file is),
   ``/dev/shm`` is missing, and programs share their user id with this process, so the limit on processes counts all
   processes of that user, and does not bind root at all: root is refused here.

Where neither works a run is refused; ``allow_unsafe`` then allows fork-servers with limits and no locks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from core_torl.sandbox import lockdown
from core_torl.sandbox.environment import BOOT, PACKAGES_DIR, VARIABLES, View, settings, sources, view
from core_torl.sandbox.ids import IdMap, check_readable, id_map
from core_torl.sandbox.pool import Plan, ProcessSandbox
from core_torl.sandbox.protocol import Limits
from core_torl.sandbox.worker import Command, WorkerLost

_DEVICES = ("null", "zero", "full", "random", "urandom")


def _command(seen: View, place: dict[str, Any], limits: Limits) -> Command:
    scratch = place["scratch"]
    variables = {**VARIABLES, "HOME": scratch, "TMPDIR": scratch}
    words = ["/usr/bin/env", "-i", *(f"{name}={value}" for name, value in variables.items())]
    return Command([*words, seen.python, "-I", "-B", "-c", BOOT, sources(), settings(limits, place)])


class NamespacesPlan:
    """Workers in namespaces that they make themselves."""

    name = "locked fork-server (namespaces)"

    def open(self, workers: int) -> None:
        """Raises WorkerLost where programs could not read what they need."""
        self._view: View = view()
        self._ids: IdMap | None = id_map(workers)
        if self._ids is not None:
            check_readable([*self._view.shown.values(), *self._view.packages.values()])
        elif os.geteuid() == 0:
            raise WorkerLost("root has no ids for programs, so nothing would limit their processes")

    def command(self, index: int, limits: Limits) -> Command:
        seen = self._view
        devices = {f"/dev/{name}": f"/dev/{name}" for name in _DEVICES}
        place = {
            "code": sources(),
            "packages": PACKAGES_DIR,
            "scratch": seen.scratch,
            "enclose": True,
            "namespaces": True,
            "locks": True,
            "job_id": None if self._ids is None else 1 + index,
            "id_map": None if self._ids is None else self._ids.text,
            "shown": {**seen.shown, **seen.packages, **devices},
            "links": seen.links,
            "readable": ["/"],
        }
        return _command(seen, place, limits)

    def close(self) -> None:
        """Nothing is held."""


class LandlockPlan:
    """Workers whose programs Landlock and seccomp lock in; with ``locks=False`` nothing does."""

    def __init__(self, locks: bool = True) -> None:
        self.locks = locks
        self.name = "locked fork-server (landlock)" if locks else "fork-server without locks"
        self._folders: list[str] = []

    def open(self, workers: int) -> None:
        """Raises WorkerLost where the kernel has no Landlock or this process is root."""
        self._view: View = view()
        if self.locks and not lockdown.landlock_abi():
            raise WorkerLost("the kernel has no Landlock")
        if self.locks and lockdown.seccomp_filter(False) is None:
            raise WorkerLost("seccomp is not known for this processor")
        if self.locks and os.geteuid() == 0:
            raise WorkerLost("nothing would limit the processes of programs that run as root")
        self._folders += [tempfile.mkdtemp(prefix="core-torl-sandbox-") for _ in range(workers)]

    def command(self, index: int, limits: Limits) -> Command:
        seen = self._view
        # The packages lie side by side in one folder of links, which is what Python looks into.
        packages = os.path.join(self._folders[index], "packages")
        scratch = os.path.join(self._folders[index], "scratch")
        os.makedirs(packages, exist_ok=True)
        os.makedirs(scratch, exist_ok=True)
        for inside, outside in seen.packages.items():
            link = os.path.join(packages, os.path.basename(inside))
            if not os.path.islink(link):
                os.symlink(outside, link)
        shown = [*seen.shown.values(), *seen.packages.values(), packages]
        place = {
            "code": sources(),
            "packages": packages,
            "scratch": scratch,
            "enclose": False,
            "namespaces": False,
            "locks": self.locks,
            "job_id": None,
            "readable": [*shown, "/proc/cpuinfo", "/proc/meminfo", "/dev/random", "/dev/urandom"],
        }
        return _command(seen, place, limits)

    def close(self) -> None:
        """Delete the scratch folders."""
        while self._folders:
            shutil.rmtree(self._folders.pop())


def fallbacks(allow_unsafe: bool) -> list[Plan]:
    """The ways without bubblewrap, the strongest first."""
    plans: list[Plan] = [NamespacesPlan(), LandlockPlan()]
    return [*plans, LandlockPlan(locks=False)] if allow_unsafe else plans


class LockedForkserver(ProcessSandbox):
    """See the module. Arguments: conf/sandbox/locked_forkserver.yaml."""

    name = "locked_forkserver"

    def plans(self) -> Sequence[Plan]:
        return fallbacks(self.allow_unsafe)
