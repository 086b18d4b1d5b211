"""Training runs as a report sees them, sorted into groups that differ in nothing but their seed.

A run says itself where its logged rows come from, so that a folder, an offline W&B file and a W&B server look the same
from here on; ``reports.sources`` finds them. A run is finished once it has ``results.json``; one that has not is named
with its state and never averaged with the others, but the cell that it belongs to knows that it is missing. What tells
two groups apart is given by name: config groups, or dotted keys of the runs' configs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError, nearest
from core_torl.evaluation.comparison import Cell, ConceptShares
from core_torl.launch.identity import PLACES, SPEED
from core_torl.tracking.mirror import read_jsonl

COMPLETED = "completed"
# Keys that do not change what a run learns, beside where it writes and how fast it is.
_NO_RECIPE = (*PLACES, "seed", "dry_run", "export", "evaluate_every")
# Measures of a share -> the column that counts the problems it is a share of.
_COUNTS = {"accuracy": "n", "robust_accuracy": "n_robust", "retained": "n_retained"}

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
        # Robust accuracy is about those problems whose options may be permuted, what is retained about those solved.
        counts = {r["concept"]: r.get(_COUNTS[measure], r["n"]) for r in rows}
        # Only sets with distractors have what is retained.
        return {r["concept"]: (r[measure], counts[r["concept"]]) for r in rows if r.get(measure) is not None}


@dataclass
class Group:
    """The runs of one cell by seed, with the values of ``by`` that they share and the words for them in its label.

    ``missing`` are its unfinished runs, those left out whose seed is among the finished ones.
    """

    label: str
    by: dict[str, Any]
    words: dict[str, str]
    runs: dict[int, Run] = field(default_factory=dict)
    missing: list[Run] = field(default_factory=list)

    def cell(self, label: str, section: str = "per_concept") -> Cell:
        found = {seed: run.concepts(label, section) for seed, run in sorted(self.runs.items())}
        return {seed: rows for seed, rows in found.items() if rows}

    @property
    def seeds_text(self) -> str:
        """``5``, or ``3 of 5 (1 failed, 1 killed)`` where runs are missing."""
        if not self.missing:
            return str(len(self.runs))
        states = sorted(Counter(run.state for run in self.missing).items())
        why = ", ".join(f"{count} {state}" for state, count in states)
        return f"{len(self.runs)} of {len(self.runs) + len(self.missing)} ({why})"


# ---- cells -------------------------------------------------------------------------------------------------------


def group(runs: Sequence[Run], by: Sequence[str], unfinished: Sequence[Run] = ()) -> list[Group]:
    """Runs with equal values of ``by`` together, by these values; a name that a run lacks is none there.

    ``unfinished`` runs are noted in the cell that they belong to, as far as their config and seed are known; one whose
    cell has no finished run makes a cell without runs. UserError: a seed twice in one group, or a name that no run has.
    """
    for name in by:
        check_name(runs, name)
    known = [run for run in unfinished if run.results.get("run", {}).get("config") and _seed(run) is not None]
    every = [*runs, *known]
    values = [{name: by_value(run, name) for name in by} for run in every]
    # An option says itself what it is; a value of a key needs the key's name.
    groups_by = {name for name in by if any(name in run.choices for run in every)}
    texts = {name: _texts(name, [v[name] for v in values], name in groups_by) for name in by}
    groups: dict[str, Group] = {}
    for i, (run, own) in enumerate(zip(every, values, strict=True)):
        words = {name: texts[name][own[name]] for name in by}
        label = " ".join(words.values())
        one = groups.setdefault(label, Group(label, own, words))
        if i < len(runs):
            _add(one, run)
        elif _seed(run) not in {*one.runs, *map(_seed, one.missing)}:
            one.missing.append(run)
    return sorted(groups.values(), key=lambda one: [sort_key(value) for value in one.by.values()])


def _add(one: Group, run: Run) -> None:
    first = next(iter(one.runs.values()), run)
    other = one.runs.setdefault(run.seed, run)
    if other is not run:
        differ, faster = differences(run, other), speed_differences([run, other])
        hint = (
            f"; they differ in {', '.join(differ[:3])}: add it to by" if differ
            else f"; they differ in how fast they are ({', '.join(faster[:3])}): add it to by, or move one of them away"
            if faster else "; move one of them away"
        )  # fmt: skip
        raise UserError(f"cell {one.label} has seed {run.seed} twice: {other.name} and {run.name}{hint}")
    if differ := differences(run, first):
        raise UserError(
            f"cell {one.label} has runs of different recipes: {first.name} and {run.name} differ in "
            f"{', '.join(differ[:3])}: add it to by, or move one of them away"
        )


def _seed(run: Run) -> int | None:
    """The seed of a run of which not everything may be known."""
    found = run.results.get("run", {}).get("seed")
    return None if found is None else int(found)


def absent_run(run: Run, groups: Sequence[Group]) -> dict[str, Any]:
    """What a report says of an unfinished run; its cell and its seed are None where its config is not known."""
    config = run.results.get("run", {}).get("config")
    cells = (g.label for g in groups if config and all(by_value(run, name) == v for name, v in g.by.items()))
    return {
        "folder": run.name, "state": run.state, "why": run.why, "cell": next(cells, None), "seed": _seed(run)
    }  # fmt: skip


def is_recipe(key: str) -> bool:
    """Whether a dotted key of a config can change what a run learns: not where it writes, nor how fast it is."""
    parts = key.split(".")
    return parts[0] not in _NO_RECIPE and not set(parts) & set(SPEED)


def differences(run: Run, other: Run) -> list[str]:
    """Keys that change what a run learns and have another value in the other run."""
    one, two = flat(run), flat(other)
    return [k for k in sorted({*one, *two}) if one.get(k) != two.get(k) and is_recipe(k)]


def speed_differences(runs: Sequence[Run]) -> list[str]:
    """Keys that change how fast a run is and that do not have one value in these runs."""
    flats = [flat(run) for run in runs]
    keys = sorted({key for own in flats for key in own if set(key.split(".")) & set(SPEED)})
    return [
        k for k in keys if k.partition(".")[0] not in _NO_RECIPE and any(o.get(k) != flats[0].get(k) for o in flats)
    ]


def sort_key(value: Any) -> tuple[Any, ...]:
    """Nothing first, then numbers as numbers, then texts with the numbers in them as numbers: replaced:4 before :16."""
    if value is None:
        return (0,)
    if isinstance(value, int | float):
        return (1, float(value))
    if isinstance(value, tuple):
        return (3, *map(sort_key, value))
    parts = _NUMBERS.split(str(value))
    return (2, *((0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts)))


_NUMBERS = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")


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


def _texts(name: str, values: Sequence[Any], options: bool) -> dict[Any, str]:
    """What a label says of each value: an option as it is, a value of a key behind the last part of the key.

    A colon, because Hydra takes no second equals sign in ``baseline=...``. Equal numbers have one text, however they
    were written, and rounding errors are left out where that leaves the texts apart.
    """
    texts = {value: _plain(value) for value in dict.fromkeys(values)}
    short = {v: f"{v:.6g}" if isinstance(v, float) and float(f"{v:.6g}") != v else text for v, text in texts.items()}
    texts = short if len(set(short.values())) == len(texts) else texts
    if not options:
        texts |= {value: str(path) for value, path in _shorten(values).items()}
    last = name.rsplit(".", 1)[-1]
    return {value: text if options and value is not None else f"{last}:{text}" for value, text in texts.items()}


def _plain(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


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
