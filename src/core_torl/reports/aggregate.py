"""All runs in one table: ``runs.parquet`` has a row for each run found, ``curves.parquet`` what they logged.

A row is what a run was (``group/...``, ``config/...``), how it stands (``state``, ``why``) and what came of it; a run
that is not finished has its row too, and no number that could be averaged. Rows are in the order of their configs, so
that neither the name of a folder nor the order in which jobs ended can be seen in them. A run that is killed and
resumed ends with the same numbers as one that was not; only clocks and places differ, which ``is_clock`` names, and
``same_results`` compares everything else.

What hundreds of runs have logged does not fit into memory. ``gathered`` reads each run once, writes its curves down at
once, and keeps what pictures and tables need.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_torl.reports.finished import COMPLETED, Run, flat
from core_torl.reports.histories import Kept, places_of, read_each
from core_torl.tracking.curves import AXES
from core_torl.tracking.metrics import SECOND, STEP, find

if TYPE_CHECKING:
    import pyarrow as pa

RUNS, CURVES = "runs.parquet", "curves.parquet"
# Columns and beginnings of columns that say where, when and by what a run was made, not what came of it.
CLOCK = (
    "run", "folder", "why", "config/paths.", "config/logger.", "config/resume", "config/reproduces",
    "compute/wall_s", "compute/train_s", "compute/attempts", "compute/cpus", "compute/gpus", "provenance/",
)  # fmt: skip
_CLOCK_UNITS = (SECOND, "tokens/s")
_COMPUTE = {
    "wall_s": float, "train_s": float, "cpus": int, "gpus": str, "sampled_tokens": int, "samples": int, "attempts": int,
}  # fmt: skip
_PROVENANCE = {"commit": str, "dirty": bool, "version": str}
_FIRST_GROUPS = ("group/experiment", "group/variant", "group/ablation")
_LONGEST = 2**63


def is_clock(column: str) -> bool:
    """Whether a column may differ between a run and its repetition: a time, a place, a commit, an attempt."""
    if column.startswith(("last/", "curve/")):
        known = find(column.partition("/")[2])
        return known is not None and known.unit in _CLOCK_UNITS
    return any(column.startswith(c) if c.endswith(("/", ".")) else column == c for c in CLOCK)


# ---- the tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """All runs and what they logged: ``table`` has a row for each, ``histories`` some metrics of each."""

    table: pa.Table
    histories: Kept
    curves: Path

    def write(self, output: Path) -> None:
        """Write both tables into ``output``, each whole or not at all."""
        from pyarrow import parquet

        output.mkdir(parents=True, exist_ok=True)
        for name in (RUNS, CURVES):
            part = output / f"{name}.part"
            if name == RUNS:
                parquet.write_table(self.table, part)
            else:
                shutil.copyfile(self.curves, part)
            os.replace(part, output / name)


@contextmanager
def gathered(
    runs: Sequence[Run], sources: Sequence[str], metrics: Iterable[str], notes: list[str]
) -> Iterator[Gathered]:
    """Read all ``runs``; ``metrics`` are those to keep of what they logged. Nothing is written but a temporary file.

    Of an unfinished run ``last/train/...`` says how far it came. ``notes`` grows by the runs that have no curves.
    """
    from pyarrow import parquet

    pairs = [(_row(run, name), run) for run, name in zip(runs, names(runs, sources), strict=True)]
    columns = _columns([row for row, _ in pairs])
    order = [c for c in columns if c.startswith(("group/", "config/")) and not is_clock(c) and c != "config/seed"]
    pairs.sort(key=lambda pair: _place(pair[0], order))
    names_of = {run.folder: row["run"] for row, run in pairs}
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / CURVES
        with parquet.ParquetWriter(path, _curves_schema()) as writer:
            histories = read_each(
                (run for _, run in pairs), metrics, notes,
                lambda run, rows: writer.write_table(_curves(names_of[run.folder], rows)),
            )  # fmt: skip
        for row, run in pairs:
            if run.state != COMPLETED:
                last = histories.last.get(run.folder, {})
                row |= {f"last/{k}": v for k, v in last.items() if k.startswith("train/")}
        yield Gathered(_table([row for row, _ in pairs]), histories, path)


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Numbers of a config key are typed where all rows agree; other values are JSON text."""
    import pyarrow as pa

    kinds: dict[str, type] = {"run": str, "folder": str, "state": str, "why": str, "seed": int, "objective": float}
    kinds |= {f"compute/{k}": kind for k, kind in _COMPUTE.items()}
    kinds |= {f"provenance/{k}": kind for k, kind in _PROVENANCE.items()}
    return pa.table({name: _column([row.get(name) for row in rows], kinds.get(name)) for name in _columns(rows)})


def _curves_schema() -> pa.Schema:
    import pyarrow as pa

    kinds = dict.fromkeys(("run", *AXES, "metric", "value"), pa.int64())
    return pa.schema(kinds | {"run": pa.string(), "metric": pa.string(), "value": pa.float64()})


def _curves(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Every number that a run has logged, by step: run, rl_step, samples, sampled_tokens, metric, value."""
    import pyarrow as pa

    schema = _curves_schema()
    columns: dict[str, list[Any]] = {k: [] for k in schema.names}
    axes = {axis: places_of(rows, axis) for axis in AXES}
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        if STEP in row:
            steps.setdefault(int(row[STEP]), {}).update({k: v for k, v in row.items() if k not in AXES.values()})
    for step, values in sorted(steps.items()):
        for metric, value in sorted(values.items()):
            if isinstance(value, int | float):
                columns["run"].append(name)
                for axis, places in axes.items():
                    columns[axis].append(int(places[step]) if step in places else None)
                columns["metric"].append(metric)
                columns["value"].append(float(value))
    return pa.table(columns, schema)


def names(runs: Sequence[Run], sources: Sequence[str]) -> list[str]:
    """Each run's folder as seen from the folders that were searched; runs of a server keep their address."""
    tops = [Path(s).resolve() for s in sources if Path(s).is_dir()]
    top = Path(os.path.commonpath(tops)) if tops else Path.cwd()
    found = [run.source or os.path.relpath(run.folder.resolve(), top) for run in runs]
    return [run.folder.resolve().name if name == "." else name for run, name in zip(runs, found, strict=True)]


def _row(run: Run, name: str) -> dict[str, Any]:
    results, done = run.results, run.state == COMPLETED
    made = results.get("provenance") or run.record.get("provenance") or {}
    cost = {"attempts": len(run.record.get("attempts") or ()) or None, **(results.get("compute") or {})}
    row: dict[str, Any] = {
        "run": name, "folder": run.name, "state": run.state, "why": run.why, "seed": results["run"].get("seed"),
    }  # fmt: skip
    options = {g: o for g, o in run.choices.items() if not g.startswith(("hydra/", "schema@")) and g != "hydra"}
    row |= {f"group/{g}": None if o in ("None", "null") else o for g, o in options.items()}
    row |= {f"config/{k}": v for k, v in flat(run).items()}
    for section, column in (("before", "before"), ("after", "after"), ("gains", "gain")):
        for label, one in (results.get(section) or {}).items() if done else ():
            row |= {f"{column}/{label}{end}": one[k] for end, k in (("", "value"), ("_low", "low"), ("_high", "high"))}
    row |= {f"last/{k}": v for k, v in (results.get("last") or {}).items() if done}
    row["objective"] = results.get("objective") if done else None
    row |= {f"compute/{k}": json.dumps(v) if isinstance(v := cost.get(k), list) else v for k in _COMPUTE}
    row |= {f"provenance/{k}": made.get(k) for k in _PROVENANCE}
    for data, one in (made.get("data") or {}).items():
        row |= {f"data/{data}/{k}": v for k, v in one.items()}
    return row


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands first in each row, then groups, keys and numbers by name, sections in one order."""
    every = list(dict.fromkeys(name for row in rows for name in row))
    sections = ("group/", "config/", "before/", "after/", "gain/", "last/")
    head, tail = ["run", "folder", "state", "why", "seed"], ("objective", "compute/", "provenance/", "data/")
    found = [name for name in head if name in every]
    for section in (*sections, *tail):
        own = [name for name in every if name.startswith(section)]
        # A fixed section keeps the order in which it is defined.
        own = own if section in tail else sorted(own, key=lambda n: (n not in _FIRST_GROUPS, n))
        found += [*[g for g in _FIRST_GROUPS if g in own], *[n for n in own if n not in _FIRST_GROUPS]]
    return found


def _place(row: Mapping[str, Any], order: Sequence[str]) -> tuple[Any, ...]:
    """By config; seeds of one config by number; jobs of which no config is known at the end."""
    values = [_sortable(row.get(name)) for name in order]
    return (all(v == (0,) for v in values), *values, _sortable(row.get("seed")), row["run"])


def _sortable(value: Any) -> tuple[Any, ...]:
    if value is None:
        return (0,)
    return (1, value) if isinstance(value, int | float) else (2, value if isinstance(value, str) else json.dumps(value))


def _column(values: Sequence[Any], kind: type | None) -> pa.Array:
    """A typed column; where rows disagree, and for lists, JSON text."""
    import pyarrow as pa

    types: dict[type, Any] = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    kinds = {type(v) for v in values if v is not None} or {kind or str}
    if kinds == {int, float} or (kinds == {int} and kind is float):
        return pa.array([None if v is None else float(v) for v in values], types[float])
    if kinds == {float} and kind is int and all(v is None or v.is_integer() for v in values):
        return pa.array([None if v is None else int(v) for v in values], types[int])
    fits = len(kinds) == 1 and kinds <= set(types)
    if fits and not (kinds == {int} and any(abs(v or 0) >= _LONGEST for v in values)):
        return pa.array(values, types[next(iter(kinds))])
    return pa.array([None if v is None else json.dumps(v, sort_keys=True) for v in values], types[str])


# ---- comparing ---------------------------------------------------------------------------------------------------


def same_results(one: str | os.PathLike[str], two: str | os.PathLike[str]) -> list[str]:
    """What differs between the aggregates in two folders, clocks and places aside: a line each, [] if nothing does."""
    from pyarrow import parquet

    first, second = (parquet.read_table(Path(folder) / RUNS) for folder in (one, two))
    if first.num_rows != second.num_rows:
        return [f"{RUNS}: {first.num_rows} rows and {second.num_rows}"]
    found = []
    for name in dict.fromkeys([*first.column_names, *second.column_names]):
        if is_clock(name):
            continue
        if not {name} <= {*first.column_names} & {*second.column_names}:
            found.append(f"{RUNS}: {name} is in one of them only")
            continue
        pairs = zip(first[name].to_pylist(), second[name].to_pylist(), strict=True)
        found += [f"{RUNS}, row {i}: {name} is {a!r} and {b!r}" for i, (a, b) in enumerate(pairs) if not _equal(a, b)]
    logs = [
        _logged(parquet.read_table(Path(folder) / CURVES), table["run"].to_pylist())
        for folder, table in ((one, first), (two, second))
    ]
    for key in sorted({*logs[0], *logs[1]}):
        a, b = (log.get(key) for log in logs)
        if not _equal(a, b):
            row, step, metric = key
            found.append(f"{CURVES}, row {row} of {RUNS}, RL step {step}: {metric} is {a!r} and {b!r}")
    return found


def _logged(table: pa.Table, runs: Sequence[str]) -> dict[tuple[int, int, str], Any]:
    """(row of the run, RL step, metric) -> samples, sampled tokens and value."""
    place = {name: i for i, name in enumerate(runs)}
    columns: Iterable[list[Any]] = (table[k].to_pylist() for k in ("run", "metric", *AXES, "value"))
    return {
        (place[run], step, metric): (samples, tokens, value)
        for run, metric, step, samples, tokens, value in zip(*columns, strict=True)
        if not is_clock(f"curve/{metric}")
    }


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, tuple) and isinstance(two, tuple):
        return all(map(_equal, one, two))
    if isinstance(one, float) and isinstance(two, float) and math.isnan(one) and math.isnan(two):
        return True
    return one == two
