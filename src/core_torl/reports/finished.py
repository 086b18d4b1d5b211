"""Finished training runs below a folder, sorted into groups that differ in nothing but their seed.

A run is finished once it has written ``results.json``; one that has not is named and never averaged with the others.
What tells two groups apart is given by name: config groups, or dotted keys of the runs' configs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from core_torl.config.errors import UserError, nearest
from core_torl.evaluation.comparison import Cell, ConceptShares

_INSIDE_A_RUN = (".hydra", "wandb", "checkpoints", "policy")
_NO_RECIPE = (
    "paths.",
    "logger.",
    "callbacks.",
    "resume",
    "seed",
    "dry_run",
    "export",
    "evaluate_every",
    "trusted_targets",
)  # keys that do not change what a run learns


@dataclass(frozen=True)
class Run:
    """One finished training run: its folder and what its ``results.json`` says."""

    folder: Path
    results: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.results["run"]["seed"])

    @property
    def steps(self) -> float:
        return self.results.get("last", {}).get("train/rl_step", self.results["run"].get("rl_steps"))

    @property
    def tokens(self) -> float | None:
        return self.results.get("last", {}).get("train/sampled_tokens")

    def concepts(self, label: str, section: str = "per_concept") -> ConceptShares:
        """concept -> (share, problems) of ``set/decoding/measure``; empty where the run has no such rows."""
        name, decoding, measure = label.split("/")
        rows = [r for r in self.results.get(section) or [] if (r["set"], r["decoding"]) == (name, decoding)]
        # Robust accuracy is about those problems whose options may be permuted.
        robust = measure == "robust_accuracy"
        counts = {r["concept"]: r.get("n_robust", r["n"]) if robust else r["n"] for r in rows}
        return {r["concept"]: (r[measure], counts[r["concept"]]) for r in rows if r[measure] is not None}


@dataclass
class Group:
    """The runs of one cell by seed, with the values of ``by`` that they share and the words for them in its label."""

    label: str
    by: dict[str, Any]
    words: dict[str, str]
    runs: dict[int, Run] = field(default_factory=dict)

    def cell(self, label: str, section: str = "per_concept") -> Cell:
        found = {seed: run.concepts(label, section) for seed, run in sorted(self.runs.items())}
        return {seed: rows for seed, rows in found.items() if rows}


# ---- reading -----------------------------------------------------------------------------------------------------


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[dict[str, str]]]:
    """Finished training runs below ``folders``, and unfinished ones as ``{"folder", "why"}``; no evaluations."""
    runs, unfinished, seen = [], [], set()
    for top in folders:
        if not top.is_dir():
            raise UserError(f"runs={top}: no such folder")
        for name, inside, files in os.walk(top):
            folder = Path(name)
            hydra = ".hydra" in inside
            inside[:] = sorted(d for d in inside if d not in _INSIDE_A_RUN)
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if "results.json" in files:
                results = _read_results(folder / "results.json")
                if "after" in results and "run" in results:
                    runs.append(Run(folder, results))
                elif "after" in results:
                    unfinished.append({"folder": str(folder), "why": "its results.json has no section 'run'"})
            elif hydra and _is_training(folder / ".hydra" / "config.yaml"):
                unfinished.append({"folder": str(folder), "why": "unfinished, no results.json"})
    return runs, unfinished


def _read_results(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no JSON ({error.msg}); move the folder away, or repeat the run") from error
    return found if isinstance(found, dict) else {}


def _is_training(config: Path) -> bool:
    """False for what other front doors and dry runs leave behind; a run whose config is lost counts as a training."""
    try:
        tree = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError):
        return True
    return not isinstance(tree, dict) or ("rl_steps" in tree and not tree.get("dry_run"))


# ---- cells -------------------------------------------------------------------------------------------------------


def group(runs: Sequence[Run], by: Sequence[str]) -> list[Group]:
    """Runs with equal values of ``by`` together. UserError: a seed twice in one group, or a name that a run lacks."""
    values = [{name: by_value(run, name) for name in by} for run in runs]
    shorter = {
        name: _shorten([v[name] for v in values]) for name in by if name not in runs[0].results["run"]["choices"]
    }
    groups: dict[str, Group] = {}
    for run, own in zip(runs, values, strict=True):
        options = run.results["run"]["choices"]
        # An option says itself what it is; a value of a key needs the key's name.
        words = {
            name: str(own[name])
            if name in options and own[name] is not None
            else _text(name, shorter.get(name, {}).get(own[name], own[name]))
            for name in by
        }
        label = " ".join(words.values())
        one = groups.setdefault(label, Group(label, own, words))
        first = next(iter(one.runs.values()), run)
        other = one.runs.setdefault(run.seed, run)
        if other is not run:
            differ = _differences(run, other)
            hint = f"; they differ in {', '.join(differ[:3])}: add it to by" if differ else "; move one of them away"
            raise UserError(f"cell {label} has seed {run.seed} twice: {other.folder} and {run.folder}{hint}")
        if differ := _differences(run, first):
            raise UserError(
                f"cell {label} has runs of different recipes: {first.folder} and {run.folder} differ in "
                f"{', '.join(differ[:3])}: add it to by, or move one of them away"
            )
    return list(groups.values())


def _differences(run: Run, other: Run) -> list[str]:
    """Keys that change what a run learns and have another value in the other run."""
    one, two = _flat(run), _flat(other)
    return [k for k in sorted({*one, *two}) if one.get(k) != two.get(k) and not k.startswith(_NO_RECIPE)]


def by_value(run: Run, name: str) -> Any:
    """The option that a config group had in this run, or the value of a dotted key of its config."""
    choices, keys = run.results["run"]["choices"], _flat(run)
    if name in choices:
        return None if choices[name] in ("None", "null") else choices[name]  # a group without a choice
    if name in keys:
        value = keys[name]
        return tuple(value) if isinstance(value, list) else value
    raise UserError(f"by={name}: {run.folder} has no such config group or key.{nearest(name, [*choices, *keys])}")


def x_of(run: Run, place: str) -> float:
    """The number at ``before/...``, ``after/...``, ``last/...`` or ``config/...`` in a run's results."""
    section, _, rest = place.partition("/")
    known = _flat(run) if section == "config" else run.results.get(section, {})
    if rest not in known:
        raise UserError(
            f"x={place}: {run.folder} has no such number.{nearest(place, [f'{section}/{k}' for k in known])}"
        )
    value = known[rest]["value"] if section in ("before", "after") else known[rest]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"x={place}: {run.folder} has {value!r} there, which is no number")
    return float(value)


def check_sets(runs: Sequence[Run], sets: Sequence[str], decoding: str, headline: str) -> None:
    """Each set of the table must be in some run, and the headline in every one."""
    known = sorted({f"{row['set']}/{row['decoding']}" for run in runs for row in run.results.get("per_concept") or []})
    for name in sets:
        if f"{name}/{decoding}" not in known:
            raise UserError(f"sets: no run has {name}/{decoding}. There are: {', '.join(known)}")
    for run in runs:
        if not run.concepts(headline):
            raise UserError(f"headline={headline}: {run.folder} has no such rows. There are: {', '.join(known)}")


def _flat(run: Run) -> dict[str, Any]:
    """Dotted keys of the run's config and their values; lists are values."""
    found: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], path: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            else:
                found[f"{path}{key}"] = value

    walk(run.results["run"]["config"], "")
    return found


def _text(name: str, value: Any) -> str:
    """A value with the last part of its key; an option of a config group that is not chosen is none.

    A colon, because Hydra takes no second equals sign in ``baseline=...``.
    """
    plain = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{name.rsplit('.', 1)[-1]}:{plain}"


def _shorten(values: Sequence[Any]) -> dict[Any, Any]:
    """Paths without the folders that all of them begin and end with; anything else, or a lone value, as it is."""
    names = sorted({v for v in values if isinstance(v, str)})
    if len(names) < 2 or len(names) < len(set(values)) or not any("/" in n for n in names):
        return {}
    parts = [n.split("/") for n in names]
    start = _common(parts)
    end = _common([p[start:][::-1] for p in parts])
    middle = ["/".join(p[start : len(p) - end]) for p in parts]
    return dict(zip(names, middle, strict=True)) if all(middle) else {}


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many first parts are the same in all."""
    differ = (i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1)
    return next(differ, min(map(len, parts)))
