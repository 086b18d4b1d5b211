"""What a program needs to see of this machine: an interpreter, its shared libraries, and the mathematical packages.

Everything else (home folders, configuration, the project's own files, whatever lies in /tmp) stays out of the list,
and so out of the sandbox. All of it is shown read-only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core_torl.sandbox.protocol import Limits
from core_torl.sandbox.worker import WorkerLost

PACKAGES = ("sympy", "mpmath", "numpy", "scipy", "gmpy2")  # those that are installed; the first two must be
PACKAGES_DIR = "/packages"  # where they lie inside
_TOP = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SOURCES = Path(__file__).resolve().parents[2]
_INSIDE = ("__init__", *(f"sandbox/{name}" for name in ("__init__", "forkserver", "lockdown", "preload", "program")))
# How the interpreter inside begins: with the folder of this package's source, then the settings.
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from core_torl.sandbox.forkserver import main; main(sys.argv[2])"
VARIABLES = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # sympy orders some things by hash: the same program prints the same in every worker.
    "PYTHONHASHSEED": "0",
}


@dataclass(frozen=True, slots=True)
class View:
    """``shown`` maps places inside to places outside; ``links`` are symbolic links inside and what they point to."""

    python: str
    shown: dict[str, str]
    links: dict[str, str]
    packages: dict[str, str]
    scratch: str


def view() -> View:
    """What to show on this machine. Raises WorkerLost if sympy is missing."""
    base = os.path.realpath(sys.base_prefix)
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    shown, links = {"/usr": "/usr"}, {}
    for path in _TOP:
        if os.path.islink(path):
            links[path] = os.readlink(path).lstrip("/")
        elif os.path.isdir(path):
            shown[path] = path
    if os.path.exists("/etc/ld.so.cache"):
        shown["/etc/ld.so.cache"] = "/etc/ld.so.cache"
    for path in (base, os.path.realpath(sys.base_exec_prefix), os.path.dirname(python)):
        if not any(path == there or path.startswith(f"{there}/") for there in shown):
            shown[path] = path
    packages = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            if name in PACKAGES[:2]:
                raise WorkerLost(f"the package {name} is not installed")
            continue
        place = os.path.realpath(spec.submodule_search_locations[0])
        packages[f"{PACKAGES_DIR}/{name}"] = place
        if os.path.isdir(f"{place}.libs"):
            packages[f"{PACKAGES_DIR}/{name}.libs"] = f"{place}.libs"
    hidden = any(path.startswith("/tmp/") for path in shown)
    return View(python, shown, links, packages, "/scratch" if hidden else "/tmp")


def code_files() -> dict[str, str]:
    """The files of this package that run inside: module path to place on this machine."""
    return {f"core_torl/{name}.py": str(_SOURCES / "core_torl" / f"{name}.py") for name in _INSIDE}


def sources() -> str:
    """The folder that holds this package."""
    return str(_SOURCES)


def settings(limits: Limits, place: dict[str, Any]) -> str:
    """The argument of the fork-server."""
    return json.dumps({"limits": asdict(limits), "place": place})
