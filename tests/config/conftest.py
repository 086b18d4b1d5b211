"""Front doors run in a batch, in one fresh interpreter: what they print, how they exit, what they import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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
