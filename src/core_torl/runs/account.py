"""What a result is accompanied by: what it cost, what data it saw, and how it compares with the run that it repeats."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.data.base import ProblemSets
from core_torl.launch.record import read_record
from core_torl.problem import Problem

SHOWN = 5  # differing numbers that are named


def problems_hash(problems: Sequence[Problem]) -> str:
    """Sixteen hexadecimal digits for all that the problems say, in their order."""
    return hashlib.sha256(repr(problems).encode()).hexdigest()[:16]


def data_hashes(problems: ProblemSets) -> dict[str, dict[str, Any]]:
    """For the training problems and each test set how many there are, and a hash of all that they say."""

    def one(part: Sequence[Problem]) -> dict[str, Any]:
        return {"problems": len(part), "sha256": problems_hash(part)}

    return {"train": one(problems.train), **{name: one(part) for name, part in problems.test.items()}}


def gpu_names() -> list[str]:
    """Names of the GPUs that this process may use."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def compute_used(started: float, history: Sequence[Mapping[str, Any]], last: Mapping[str, Any], output: Path,
                 gpus: list[str]) -> dict[str, Any]:  # fmt: skip
    """What the run cost. ``started`` is the ``time.monotonic()`` of this attempt's begin.

    ``wall_s`` is of the attempt that finished, evaluations included; ``train_s`` adds up the RL steps of all attempts,
    each step once, as they stand in the metrics.
    """
    record = read_record(output) or {}
    steps = [row["time/step_s"] for row in history if "time/step_s" in row]
    return {
        "wall_s": time.monotonic() - started, "train_s": math.fsum(steps),
        "cpus": record.get("provenance", {}).get("cpus"), "gpus": gpus,
        "samples": last.get("train/samples"), "sampled_tokens": last.get("train/sampled_tokens"),
        "attempts": len(record.get("attempts", [])) or 1,
    }  # fmt: skip


def first_results(folder: str | None) -> dict[str, Any] | None:
    """The results of the run that is repeated; None if none is. UserError if it has none: it never ended."""
    if folder is None:
        return None
    try:
        return json.loads((Path(folder) / "results.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"reproduces={folder}: no results.json to compare with; take a run that has ended") from error


def compared(
    first: Mapping[str, Any], after: Mapping[str, Any], last: Mapping[str, Any], provenance: Mapping[str, Any],
    folder: str,
) -> dict[str, Any]:  # fmt: skip
    """How a repeated run agrees with the first: how many numbers are equal, and those that are not.

    Accuracies after training and the metrics of the last RL step are compared; times and speeds are not. ``other`` says
    under what other circumstances the two were computed, as name -> (then, now).
    """
    one = {f"after/{k}": v["value"] for k, v in first["after"].items()}
    one |= {f"last/{k}": v for k, v in first["last"].items()}
    two = {f"after/{k}": v.value for k, v in after.items()} | {f"last/{k}": v for k, v in last.items()}
    names = [n for n in sorted(one.keys() | two.keys()) if not n.startswith("last/time/") and "_per_s" not in n]
    differ = {n: [one.get(n), two.get(n)] for n in names if not _same(one.get(n), two.get(n))}
    then, now = _circumstances(first.get("provenance") or {}), _circumstances(provenance)
    other = {n: [then.get(n), now.get(n)] for n in sorted(then.keys() | now.keys()) if then.get(n) != now.get(n)}
    return {"folder": folder, "equal": len(names) - len(differ), "differ": differ, "other": other}


def _circumstances(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Code, packages, machine and data of a run, as flat names."""
    found = {k: provenance.get(k) for k in ("commit", "diff_sha256", "version", "python", "machine", "gpus")}
    return (
        found | dict(provenance.get("packages") or {}) | {f"data {k}": v for k, v in provenance.get("data", {}).items()}
    )


def _same(one: Any, two: Any) -> bool:
    return one == two or (isinstance(one, float) and isinstance(two, float) and math.isnan(one) and math.isnan(two))


def comparison_line(found: Mapping[str, Any]) -> str:
    """The comparison in one line, for people."""
    changes = [f"{name} {was} -> {now}" for name, (was, now) in list(found["other"].items())[:SHOWN]]
    under = f" (under other circumstances: {'; '.join(changes)})" if changes else ""
    if not found["differ"]:
        return f"Repeats {found['folder']}: all {found['equal']} numbers are equal{under}"
    few = [f"{name} was {was} and is {now}" for name, (was, now) in list(found["differ"].items())[:SHOWN]]
    rest = len(found["differ"]) - len(few)
    return (
        f"Does NOT repeat {found['folder']}: {len(found['differ'])} of {len(found['differ']) + found['equal']} numbers "
        f"differ: {'; '.join(few)}{f'; and {rest} more' if rest else ''}"
        f"{under}"
    )
