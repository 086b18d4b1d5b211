"""Front doors run in a batch, in one fresh interpreter: what they print, how they exit, what they import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

_BATCH = """
import contextlib, importlib, io, json, logging, sys, traceback
results = []
for door, arguments in json.loads(sys.stdin.read()):
    sys.argv = [f"core-torl-{door.replace('_', '-')}", *arguments]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(f"core_torl.{door}").main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    logging.getLogger().handlers.clear()
    results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
heavy = sorted({"torch", "transformers", "pytorch_lightning", "wandb", "datasets"} & set(sys.modules))
print(json.dumps({"results": results, "heavy": heavy}))
"""


def run_batch(commands: Iterable[tuple[str, Sequence[str]]], folder: Path, **env: str) -> dict[str, Any]:
    """``results``: code, out and err of each command; ``heavy``: slow libraries that any of them imported."""
    root = Path(__file__).parents[2]
    plain = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", _BATCH],
        input=json.dumps([[door, list(arguments)] for door, arguments in commands]),
        cwd=folder,
        env={**plain, "PYTHONPATH": str(root / "src"), **env},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def keys_without_comment(path: Path) -> list[str]:
    """Line and name of each key of a YAML file without a comment above it.

    Except ``defaults``, ``_target_`` and headings, whose keys have comments of their own.
    """
    lines = path.read_text().splitlines()
    bare, in_defaults = [], False
    for number, line in enumerate(lines):
        found = re.match(r"( *)([\w.]+):(\s.*|)$", line)
        if not found:
            continue
        indent, key, value = found[1], found[2], found[3].strip()
        in_defaults = key == "defaults" or (in_defaults and bool(indent))
        following = next((x for x in lines[number + 1 :] if x.strip() and not x.lstrip().startswith("#")), "")
        heading = not value and following.startswith(indent + "  ") and not following.strip().startswith("- ")
        above = lines[number - 1].strip() if number else ""
        commented = above.startswith("#") and not above.startswith("# @")
        if not in_defaults and key != "_target_" and not heading and not commented:
            bare.append(f"{path.name}:{number + 1} {key}")
    return bare


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Callable[..., None]:
    """``installed(version)`` puts a package folder there that says so; None: no vLLM at all."""
    from core_torl.config import vllm_checks

    def put(version: str | None, text: str = "__version__ = version = '{}'\n") -> None:
        file = tmp_path / "__init__.py"
        file.touch()
        (tmp_path / "_version.py").write_text("version: str\n__version__: str\n" + text.format(version))
        found = None if version is None else ModuleSpec("vllm", None, origin=str(file))
        monkeypatch.setattr(vllm_checks, "find_spec", lambda name: found)

    return put
