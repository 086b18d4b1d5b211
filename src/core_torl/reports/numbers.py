"""The numbers of a comparison: accuracies of each cell, and differences to a baseline paired by seed and by concept.

Accuracies come from the rows per concept in ``results.json``, so that seeds and concepts can both be drawn; see
``evaluation.comparison``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from core_torl.config.errors import UserError
from core_torl.evaluation.comparison import Cell, cell_mean, holm_of_known, paired, share
from core_torl.evaluation.statistics import Estimate
from core_torl.reports.finished import Group, speed_differences
from core_torl.tracking.comparison_table import measures

MASTERED = "mastered"  # the test set of what the model could do before


def compare(
    groups: Sequence[Group], headline: str, sets: Sequence[str], decoding: str,
    baseline: str | Mapping[str, str] | None, confidence: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """All numbers of the comparison, estimates as ``Estimate``; ``notes`` says what a reader would not expect.

    ``baseline`` is the label of the cell that all others are compared with, or says that for each cell. A group
    without runs is named under ``empty`` and has no numbers.
    """
    labels = list(dict.fromkeys([headline, *(label for name in sets for label in measures(name, decoding))]))
    empty = [{"label": one.label, "seeds": one.seeds_text} for one in groups if not one.runs]
    groups = [one for one in groups if one.runs]
    pairs = {one.label: baseline for one in groups if one.label != baseline} if isinstance(baseline, str) else baseline
    pairs = pairs or {}
    references = {one.label: one.cell(headline) for one in groups if one.label in pairs.values()}
    notes = [note for one in groups if (note := _speed(one))]
    if (other := _seeds(groups)) is not None:
        notes.append(other)
    cells = []
    for one in groups:
        base = pairs.get(one.label)
        after = {label: cell_mean(c, confidence, seed) for label in labels if (c := one.cell(label))}
        before = {label: e for label in labels if (e := _before(one, label, confidence, seed))}
        kept = f"{MASTERED}/{decoding}/accuracy"
        few = {len(c) for label in labels if (c := one.cell(label))} - {len(one.runs)}
        if few:
            notes.append(f"{one.label}: some test sets are those of {min(few)} of its {len(one.runs)} runs only.")
        tokens = [run.tokens for run in one.runs.values() if run.tokens is not None]
        if 0 < len(tokens) < len(one.runs):
            notes.append(f"{one.label}: tokens are those of {len(tokens)} of its {len(one.runs)} runs only.")
        cells.append({
            "label": one.label, "by": one.by, "seeds": sorted(one.runs), "seeds_text": one.seeds_text,
            "rl_steps": sum(run.steps for run in one.runs.values()) / len(one.runs),
            "sampled_tokens": sum(tokens) / len(tokens) if tokens else None,
            "before": before, "after": after,
            "retention": after[kept].value / before[kept].value
            if kept in after and kept in before and before[kept].value > 0 else None,
            "baseline": base,
            "paired": None if base is None
            else _paired(one, references[base], headline, base, confidence, seed, notes),
            "runs": [
                {"folder": run.name, "seed": s, "rl_steps": run.steps, "sampled_tokens": run.tokens,
                 "headline": share(run.concepts(headline))}
                for s, run in sorted(one.runs.items())
            ],
        })  # fmt: skip
    compared = [c for c in cells if c["paired"] is not None]
    for name, p in holm_of_known({c["label"]: c["paired"]["p"] for c in compared}).items():
        next(c for c in compared if c["label"] == name)["paired"]["p_holm"] = p
    notes += [note for label in labels if (note := _weights(groups, label))]
    return {
        "headline": headline, "sets": list(sets), "decoding": decoding,
        "baseline": baseline if isinstance(baseline, str) else None, "confidence": confidence,
        "seed": seed, "cells": cells, "empty": empty, "notes": notes,
    }  # fmt: skip


def _speed(one: Group) -> str | None:
    """Runs of a cell may differ in how fast they are; their times cannot be compared then."""
    differ = speed_differences(list(one.runs.values()))
    if not differ:
        return None
    return (
        f"{one.label}: its runs differ in {', '.join(differ)}, which changes how fast a run is and not what it learns."
    )


def _seeds(groups: Sequence[Group]) -> str | None:
    """Cells of other seeds are means of other things; None where all have the same."""
    found: dict[str, list[str]] = {}
    for one in groups:
        found.setdefault(", ".join(map(str, sorted(one.runs))), []).append(one.label)
    if len(found) < 2:
        return None
    each = "; ".join(f"{', '.join(own)} {'has' if len(own) == 1 else 'have'} {seeds}" for seeds, own in found.items())
    return f"Not all cells have the same seeds: {each}."


def _before(one: Group, label: str, confidence: float, seed: int) -> Estimate | None:
    """From the rows per concept before training; from the estimates, without an interval, where those are absent."""
    cell = one.cell(label, "per_concept_before")
    if len(cell) == len(one.runs):
        return cell_mean(cell, confidence, seed)
    values = [run.results["before"][label]["value"] for run in one.runs.values() if label in run.results["before"]]
    if len(values) < len(one.runs):
        return None
    return Estimate(sum(values) / len(values), math.nan, math.nan, len(values), "no interval: no rows per concept")


def _paired(
    one: Group, reference: Cell, headline: str, baseline: str, confidence: float, seed: int, notes: list[str]
) -> dict[str, Any]:
    try:
        found = paired(one.cell(headline), reference, confidence, seed)
    except ValueError as error:
        raise UserError(f"{one.label} against {baseline}: {error}") from error
    if found.left_out_seeds or found.left_out_concepts:
        notes.append(
            f"{one.label} against {baseline}: paired over {len(found.seeds)} common seeds and {found.concepts} common "
            f"concepts; {found.left_out_seeds} seeds and {found.left_out_concepts} concepts have no partner."
        )
    if found.p is None:
        notes.append(f"{one.label} against {baseline}: no p-value, {found.test.removeprefix('none: ')}.")
    return dataclasses.asdict(found) | {"difference": found.difference}


def _weights(groups: Sequence[Group], label: str) -> str | None:
    """Where only some problems of a concept were permuted, a mean over rows per concept is not that over problems."""
    runs = [run for one in groups for run in one.runs.values() if label in run.results["after"] and run.concepts(label)]
    off = [run for run in runs if abs(share(run.concepts(label)) - run.results["after"][label]["value"]) > 1e-6]
    if not off:
        return None
    return f"{label}: concepts are weighted by all their problems; {len(off)} runs have another value in results.json."


def plain(value: Any) -> Any:
    """As JSON can hold it: estimates as dicts, what is not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
