"""Training runs as a report sees them, sorted into groups that differ in nothing but their seed.

A run says itself where its logged rows come from, so that a folder, an offline W&B file and a W&B server look the same
from here on; ``reports.sources`` finds them. A run is finished once it has ``results.json``; one that has not is named
with its state and never averaged with the others. What tells two groups apart is given by name: config groups, or
dotted keys of the runs' configs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError, nearest
from core_torl.evaluation.comparison import Cell, ConceptShares
from core_torl.tracking.mirror import read_jsonl

COMPLETED = "completed"
NO_RECIPE = (
    "paths.",
    "logger.",
    "callbacks.",
    "resume",
    "reproduces",
    "seed",
    "dry_run",
    "export",
    "evaluate_every",
    "trusted_targets",
)  # keys that do not change what a run learns

History = Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """One training run, finished or not.

    ``folder`` is where it lies: its own folder, W&B's folder of it, or ``wandb:/entity/project/id`` for one on a
    server, of which nothing lies on this disk. ``results`` is what its ``results.json`` says; of an unfinished run only
    the section ``run``, as far as it is known. ``record`` is its ``run.json``. ``state`` is completed, running, killed,
    failed, interrupted, timeout, pending, or unfinished where nothing says more, and ``why`` says what is behind it.
    ``source`` is the name that people read, where that is not the folder. ``history`` reads the logged rows: it raises
    FileNotFoundError where there are none, ValueError where they cannot be read.
    """

    folder: Path
    results: dict[str, Any]
    state: str = COMPLETED
    why: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    history: History | None = None

    @property
    def name(self) -> str:
        return self.source or str(self.folder)

    @property
    def seed(self) -> int:
        return int(self.results["run"]["seed"])

    @property
    def choices(self) -> Mapping[str, Any]:
        return self.results["run"].get("choices") or {}

    @property
    def steps(self) -> float:
        return self.results.get("last", {}).get("train/rl_step", self.results["run"].get("rl_steps"))

    @property
    def tokens(self) -> float | None:
        return self.results.get("last", {}).get("train/sampled_tokens")

    def rows(self) -> list[dict[str, Any]]:
        """The logged rows, from ``metrics.jsonl`` unless the run knows a better way."""
        return read_jsonl(self.folder / "metrics.jsonl") if self.history is None else self.history()

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


# ---- cells -------------------------------------------------------------------------------------------------------


def group(runs: Sequence[Run], by: Sequence[str]) -> list[Group]:
    """Runs with equal values of ``by`` together; a name that a run lacks is none there.

    UserError: a seed twice in one group, or a name that no run has.
    """
    for name in by:
        check_name(runs, name)
    values = [{name: by_value(run, name) for name in by} for run in runs]
    shorter = {name: _shorten([v[name] for v in values]) for name in by if not any(name in r.choices for r in runs)}
    groups: dict[str, Group] = {}
    for run, own in zip(runs, values, strict=True):
        options = run.choices
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
            differ = differences(run, other)
            hint = f"; they differ in {', '.join(differ[:3])}: add it to by" if differ else "; move one of them away"
            raise UserError(f"cell {label} has seed {run.seed} twice: {other.name} and {run.name}{hint}")
        if differ := differences(run, first):
            raise UserError(
                f"cell {label} has runs of different recipes: {first.name} and {run.name} differ in "
                f"{', '.join(differ[:3])}: add it to by, or move one of them away"
            )
    return list(groups.values())


def differences(run: Run, other: Run) -> list[str]:
    """Keys that change what a run learns and have another value in the other run."""
    one, two = flat(run), flat(other)
    return [k for k in sorted({*one, *two}) if one.get(k) != two.get(k) and not k.startswith(NO_RECIPE)]


def check_name(runs: Sequence[Run], name: str) -> None:
    """UserError where ``name`` is neither a config group nor a key of any run."""
    known = {key for run in runs for key in (*run.choices, *flat(run))}
    if name not in known:
        raise UserError(f"by={name}: {runs[0].name} has no such config group or key.{nearest(name, known)}")


def by_value(run: Run, name: str) -> Any:
    """The option that a config group had in this run, or the value of a dotted key; None where it has neither."""
    if name in run.choices:
        option = run.choices[name]
        return None if option in ("None", "null") else option  # a group without a choice
    value = flat(run).get(name)
    return _frozen(value)


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that a value may be a key."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def x_of(run: Run, place: str) -> float:
    """The number at ``before/...``, ``after/...``, ``last/...`` or ``config/...`` in a run's results."""
    section, _, rest = place.partition("/")
    known = flat(run) if section == "config" else run.results.get(section, {})
    if rest not in known:
        raise UserError(f"x={place}: {run.name} has no such number.{nearest(place, [f'{section}/{k}' for k in known])}")
    value = known[rest]["value"] if section in ("before", "after") else known[rest]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"x={place}: {run.name} has {value!r} there, which is no number")
    return float(value)


def check_sets(runs: Sequence[Run], sets: Sequence[str], decoding: str, headline: str) -> None:
    """Each set of the table must be in some run, and the headline in every one."""
    known = sorted({f"{row['set']}/{row['decoding']}" for run in runs for row in run.results.get("per_concept") or []})
    for name in sets:
        if f"{name}/{decoding}" not in known:
            raise UserError(f"sets: no run has {name}/{decoding}. There are: {', '.join(known)}")
    for run in runs:
        if not run.concepts(headline):
            raise UserError(f"headline={headline}: {run.name} has no such rows. There are: {', '.join(known)}")


def flat(run: Run) -> dict[str, Any]:
    """Dotted keys of the run's config and their values; lists are values."""
    return dotted(run.results["run"].get("config") or {})


def dotted(tree: Any) -> dict[str, Any]:
    """A nested mapping as dotted keys and their values; lists are values."""
    found: dict[str, Any] = {}

    def walk(node: Mapping[str, Any], path: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            else:
                found[f"{path}{key}"] = value

    walk(tree, "")
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
