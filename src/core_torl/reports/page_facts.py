"""What a page says about the runs themselves: their command and versions, how their configs differ, what they cost.

Runs say these things one by one, and mostly the same thing. Each fact is therefore told once, with how many runs it
holds for; what a run did not record is "not recorded" and never guessed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core_torl.reports.finished import Run, flat
from core_torl.reports.histories import values_of
from core_torl.reports.states import read_json
from core_torl.reports.story import Story

NOT_RECORDED = "not recorded"
_NO_DIFFERENCE = ("paths.", "hydra.", "logger.", "seed", "trusted_targets")  # places and names, not how a run was made
_NO_KEY = "–"
_LEVELS = 3  # folders above a run in which a sweep.json is looked for


# ---- what was run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """A name and its values, each with the number of runs that it holds for; ``total`` runs were asked."""

    name: str
    values: Sequence[tuple[str, int]]
    total: int


def facts(story: Story) -> list[Fact]:
    """Command, commit, versions and machine of the runs in the table."""
    runs = all_runs(story)
    made = [_made(run) for run in runs]
    sweeps = [command for run in runs if (command := _sweep_command(run))]
    found = [
        Fact("command", _counted([one.get("command") for one in made]), len(runs)),
        # Only the last call of a sweep is known, which may have begun none of these runs.
        *([Fact("sweep", _counted(sweeps), len(runs))] if sweeps else []),
        Fact("commit", _counted([_commit(one) for one in made]), len(runs)),
        Fact("core-torl", _counted([_package(run, "core-torl") for run in runs]), len(runs)),
        Fact("Python", _counted([_one_of(run, "python") for run in runs]), len(runs)),
        Fact("machine", _counted([_machine(run) for run in runs]), len(runs)),
    ]
    names = sorted({name for run in runs for name in _packages(run)} - {"core-torl"})
    versions = [
        ", ".join(f"{name} {own[name]}" for name in names if name in own) or None for own in map(_packages, runs)
    ]
    return [*found, Fact("packages", _counted(versions), len(runs))]


def seeds(story: Story) -> list[tuple[str, str]]:
    """The seeds of each cell, cells with the same ones together; other seeds of the config after them."""
    found: dict[str, list[str]] = {}
    for cell in story.comparison["cells"]:
        found.setdefault(", ".join(map(str, cell["seeds"])), []).append(cell["label"])
    many = len(story.comparison["cells"])
    rows = [("all cells" if len(own) == many else ", ".join(own), text) for text, own in found.items()]
    others: dict[str, set[Any]] = {}
    for run in all_runs(story):
        for key, value in (_made(run).get("seeds") or {}).items():
            if key != "seed":
                others.setdefault(key, set()).add(value)
    return rows + [(key, ", ".join(sorted(map(str, values)))) for key, values in sorted(others.items())]


def data_rows(story: Story) -> list[dict[str, str]]:
    """The data sets by name, problems and hash; a row for each hash, with the number of runs that had it."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for run in all_runs(story):
        recorded = _made(run).get("data")
        if recorded:
            for name, one in recorded.items():
                counted[name, shown_value(one.get("problems")), str(one.get("sha256") or NOT_RECORDED)] += 1
        else:
            # Before hashes were recorded, results.json had the number of problems alone.
            for name, count in (run.results.get("data") or {}).items():
                if name == "train" or name.startswith("test/"):
                    counted[name, shown_value(count), NOT_RECORDED] += 1
    return [
        {"name": name, "problems": problems, "sha256": sha256, "runs": str(runs)}
        for (name, problems, sha256), runs in sorted(counted.items(), key=lambda item: (item[0][0] != "train", item[0]))
    ]


def _made(run: Run) -> Mapping[str, Any]:
    """Where the run comes from; a run without it in its results may have it in its ``run.json``."""
    return run.results.get("provenance") or run.record.get("provenance") or {}


def mixed_code(story: Story) -> list[str]:
    """The runs of the table whose attempts ran under different code, with their cells."""
    return [
        f"{one.label}, seed {seed}: {run.name}"
        for one in story.groups
        for seed, run in sorted(one.runs.items())
        if any((where.get("provenance") or {}).get("mixed_code") for where in (run.results, run.record))
    ]


def _sweep_command(run: Run) -> str | None:
    """The last command of the sweep that the run belongs to, from the nearest ``sweep.json`` above it."""
    if run.source:  # it lies on a server
        return None
    for place in [run.folder, *run.folder.parents][: _LEVELS + 1]:
        if (place / "sweep.json").is_file():
            return read_json(place / "sweep.json", []).get("command")
    return None


def _commit(made: Mapping[str, Any]) -> str | None:
    if not made.get("commit"):
        return None
    if made.get("dirty"):
        difference = made.get("diff_sha256")
        return f"{made['commit']}, with changes that are in no commit" + (
            f" (sha256 {difference})" if difference else ""
        )
    return f"{made['commit']}, clean" if made.get("dirty") is False else str(made["commit"])


def _one_of(run: Run, key: str) -> str | None:
    found = _made(run).get(key) or (run.results.get("environment") or {}).get(key)
    return None if found is None else str(found)


def _machine(run: Run) -> str | None:
    made = _made(run)
    parts = [_one_of(run, "machine"), f"{made['cpus']} CPUs" if made.get("cpus") else None, *(made.get("gpus") or [])]
    return ", ".join(str(part) for part in parts if part) or None


def _packages(run: Run) -> dict[str, Any]:
    """Package -> version; old results had them in ``environment``, beside the machine."""
    found = _made(run).get("packages")
    old = run.results.get("environment") or {}
    return dict(found or {k: v for k, v in old.items() if k not in ("python", "machine")})


def _package(run: Run, name: str) -> str | None:
    return _made(run).get("version") or _packages(run).get(name)


def _counted(values: Iterable[str | None]) -> list[tuple[str, int]]:
    """Each value with how often it is there, the most frequent first."""
    return Counter(NOT_RECORDED if value is None else value for value in values).most_common()


# ---- config ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A config key whose value is not the default in some run: each value with its cells, none for all of them."""

    key: str
    default: str
    values: Sequence[tuple[str, Sequence[str]]]


def differences(story: Story) -> tuple[list[Difference], list[Difference]]:
    """Keys that have one value in all runs which is not the default, and keys whose value differs between runs."""
    flats = [(one.label, flat(run)) for one in story.groups for run in one.runs.values()]
    keys = sorted({key for _, own in flats for key in own} | set(story.defaults))
    same, other = [], []
    for key in keys:
        if key.startswith(_NO_DIFFERENCE):
            continue
        missing = _NO_KEY
        default = shown_value(story.defaults[key]) if key in story.defaults else missing
        cells: dict[str, list[str]] = {}
        for label, own in flats:
            held = cells.setdefault(shown_value(own[key]) if key in own else missing, [])
            if label not in held:
                held.append(label)
        if len(cells) > 1:
            other.append(Difference(key, default, sorted(cells.items(), key=lambda item: -len(item[1]))))
        elif (value := next(iter(cells))) not in (default, missing):
            same.append(Difference(key, default, [(value, [])]))
    return same, other


def shown_value(value: Any) -> str:
    """A config value as YAML has it, on one line; numbers that are equal read the same."""
    if isinstance(value, bool) or value is None or isinstance(value, list | tuple | Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    return f"{value:g}" if isinstance(value, float) else '""' if value == "" else str(value)


# ---- compute -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """What the runs of a cell cost together; None is a number that not all of its runs recorded."""

    label: str
    runs: int
    wall_s: float | None
    train_s: float | None
    steps_s: float | None
    sampled_tokens: float | None
    samples: float | None
    attempts: float | None
    hardware: str


def compute(story: Story) -> list[Compute]:
    """A row for each cell, and one for all of them together at the end.

    ``steps_s`` sums the logged seconds of the RL steps, which old runs have too.
    """
    rows = [_cost(one.label, list(one.runs.values()), story) for one in story.groups]
    return [*rows, _cost("all runs", all_runs(story), story)]


def _cost(label: str, runs: Sequence[Run], story: Story) -> Compute:
    recorded = [run.results.get("compute") or {} for run in runs]
    steps = [_last_counts(run, story) for run in runs]
    return Compute(
        label, len(runs),
        wall_s=_sum(one.get("wall_s") for one in recorded),
        train_s=_sum(one.get("train_s") for one in recorded),
        steps_s=_sum(one["seconds"] for one in steps),
        sampled_tokens=_sum(
            one.get("sampled_tokens", run.tokens) for one, run in zip(recorded, runs, strict=True)
        ),
        samples=_sum(one.get("samples", own["samples"]) for one, own in zip(recorded, steps, strict=True)),
        attempts=_sum(
            one.get("attempts") or len(run.record.get("attempts") or ()) or None
            for one, run in zip(recorded, runs, strict=True)
        ),
        hardware="; ".join(text for text, _ in _counted(_hardware(one) for one in recorded)),
    )  # fmt: skip


def _last_counts(run: Run, story: Story) -> dict[str, float | None]:
    rows = story.histories.get(run.folder, [])
    seconds = values_of(rows, "time/step_s")
    samples = values_of(rows, "train/samples")
    return {"seconds": math.fsum(seconds.values()) if seconds else None, "samples": max(samples.values(), default=None)}


def _hardware(recorded: Mapping[str, Any]) -> str | None:
    cpus, gpus = recorded.get("cpus"), recorded.get("gpus") or []
    if cpus is None and not gpus:
        return None
    names = [f"{count} x {name}" if count > 1 else name for name, count in _counted(gpus)]
    return ", ".join([*([f"{cpus} CPUs"] if cpus is not None else []), *names])


def _sum(values: Iterable[float | None]) -> float | None:
    """None as soon as one of the values is unknown: a sum of some runs would read as that of all."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    return math.fsum(numbers) if numbers and len(numbers) == len(known) else None


def duration(seconds: float | None) -> str:
    """``3 h 05 min``, ``12 min 10 s`` or ``4.2 s``."""
    if seconds is None:
        return NOT_RECORDED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(value: float | None) -> str:
    """A whole number with its thousands apart."""
    return NOT_RECORDED if value is None else f"{value:,.0f}"


# ---- small things ------------------------------------------------------------------------------------------------


def all_runs(story: Story) -> list[Run]:
    """The runs of all cells, by cell and seed."""
    return [run for one in story.groups for _, run in sorted(one.runs.items())]


def states(story: Story) -> list[tuple[str, int]]:
    """How many runs are in which state; runs without a state of their own are those of the table and the others."""
    if "state" in story.runs.column_names:
        counted: Counter[Hashable] = Counter(story.runs.column("state").to_pylist())
        return [(str(state or "unknown"), count) for state, count in counted.most_common()]
    left = len(story.comparison["unfinished"])
    return [("completed", len(all_runs(story))), *([("not in the table", left)] if left else [])]
