"""What a report chooses for itself where its user did not: cells, test sets, headline, baseline, template.

Cells are told apart by the fewest names that tell all recipes apart. A name that was set in an override comes before
one that only follows from it, and a config group before the keys that its options set.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from core_torl.config.errors import UserError
from core_torl.reports.finished import Group, Run, by_value, flat, is_recipe, sort_key
from core_torl.tracking.comparison_table import PRIMED

AUTO = "auto"
_FIRST = ("experiment", "variant", "ablation", "intervention", "trigger", "reward", "objective", "model", "data")
# Groups that do not change what a run learns.
_NO_RECIPE_GROUPS = ("hydra", "schema@", "paths", "logger", "callbacks", "local", "debug")
_BUDGET = "variant.tool_call_budget"

Partition = tuple[int, ...]


# ---- cells -------------------------------------------------------------------------------------------------------


def choose_by(runs: Sequence[Run]) -> list[str]:
    """The config groups and keys in which the recipes of ``runs`` differ: at least one name, so that a cell has one."""
    groups, keys = _differing(runs, groups=True), _differing(runs, groups=False)
    target = _join(len(runs), [*groups.values(), *keys.values()])
    set_by_hand = {o.partition("=")[0].lstrip("+~") for run in runs for o in run.record.get("overrides") or ()}
    chosen: list[str] = []
    reached = _join(len(runs), [])
    known = groups | keys
    for stage in (
        [g for g in groups if g in set_by_hand],
        [k for k in keys if k in set_by_hand],
        [g for g in groups if g not in set_by_hand],
        [k for k in keys if k not in set_by_hand],
    ):
        while reached != target:
            best = max(stage, key=lambda n: (len({*_join(len(runs), [reached, known[n]])}), _rank(n)), default=None)
            if best is None or (joined := _join(len(runs), [reached, known[best]])) == reached:
                break
            chosen.append(best)
            reached = joined
    # What a later name says as well, an earlier one need not: the last chosen goes first.
    for name in reversed(list(chosen)):
        rest = [known[n] for n in chosen if n != name]
        if len(chosen) > 1 and _join(len(runs), rest) == target:
            chosen.remove(name)
    if not chosen:
        named = any(by_value(run, "experiment") for run in runs)
        return ["experiment"] if named or not any("variant" in run.choices for run in runs) else ["variant"]
    return sorted(chosen, key=lambda n: (n not in groups, [-r for r in _rank(n)[:1]], n))


def _differing(runs: Sequence[Run], groups: bool) -> dict[str, Partition]:
    """Names with more than one value, and for each run the number of its value."""
    values: Callable[[Run], dict[str, Any]]
    if groups:
        names = {g for run in runs for g in run.choices if not g.startswith(_NO_RECIPE_GROUPS)}
        values = lambda run: {g: by_value(run, g) for g in names if g in run.choices}  # noqa: E731
    else:
        names = {k for run in runs for k in flat(run) if is_recipe(k)}
        values = flat
    every = [values(run) for run in runs]
    keys = {} if not groups else {k for run in runs for k in flat(run)}
    found = {}
    for name in sorted(names):
        texts = [json.dumps(_number(own.get(name)), sort_keys=True, default=str) for own in every]
        if len(set(texts)) > 1 and not (groups and _only_faster(runs, name, keys)):
            found[name] = _numbered(texts)
    return found


def _number(value: Any) -> Any:
    """1 and 1.0 are one value, true is none of them."""
    if isinstance(value, list):
        return [_number(v) for v in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _only_faster(runs: Sequence[Run], group: str, keys: Iterable[str]) -> bool:
    """Whether the options of a config group differ in nothing but keys that do not change what a run learns."""
    own = [key for key in keys if key.startswith(f"{group}.")]
    differ = [key for key in own if any(flat(run).get(key) != flat(runs[0]).get(key) for run in runs)]
    return bool(differ) and not any(map(is_recipe, differ))


def _join(count: int, parts: Iterable[Partition]) -> Partition:
    """Runs together that are together in all parts."""
    return _numbered(list(zip(*parts, strict=True)) or [()] * count)


def _numbered(values: Sequence[Any]) -> Partition:
    known: dict[Any, int] = {}
    return tuple(known.setdefault(v, len(known)) for v in values)


def _rank(name: str) -> tuple[int, int, int]:
    """Higher is better: well-known groups, then keys of well-known groups, then names with few parts, then short."""
    first = name.partition(".")[0]
    order = len(_FIRST) - _FIRST.index(first) if first in _FIRST else 0
    return order, -name.count("."), -len(name)


# ---- sets, headline, baseline ------------------------------------------------------------------------------------


def choose_decoding(runs: Sequence[Run]) -> str:
    """Greedy where every run has it, else sampled."""
    return "greedy" if all(any(r["decoding"] == "greedy" for r in _rows(run)) for run in runs) else "sampled"


def choose_sets(runs: Sequence[Run], decoding: str) -> list[str]:
    """All test sets without the concept in the prompt, in the order in which the runs have them."""
    names = dict.fromkeys(r["set"] for run in runs for r in _rows(run) if r["decoding"] == decoding)
    found = [name for name in names if not name.endswith(PRIMED)]
    if not found:
        raise UserError(
            f"decoding={decoding}: no run has a test set of it in results.json, so there is nothing to compare"
        )
    return found


def find_sets(runs: Sequence[Run], decoding: str, names: Sequence[str]) -> list[str]:
    """``names`` with each that has a star replaced by the test sets that match it, none of them where none does."""
    there = sorted({r["set"] for run in runs for r in _rows(run) if r["decoding"] == decoding}, key=sort_key)
    found = [match for name in names for match in (fnmatch.filter(there, name) if "*" in name else [name])]
    if not found:
        raise UserError(f"sets={list(names)}: no run has such a test set. There are: {', '.join(there)}")
    return list(dict.fromkeys(found))


def choose_headline(runs: Sequence[Run], sets: Sequence[str], decoding: str, wanted: str | None = None) -> str:
    """``wanted``, which with a question mark is only a wish: that all runs have it.

    Otherwise robust accuracy on the first set that all runs have, accuracy where that has none.
    """
    if wanted is not None:
        label = wanted.removesuffix("?")
        if label == wanted or all(run.concepts(label) for run in runs):
            return label
    for name in sets:
        for measure in ("robust_accuracy", "accuracy"):
            label = f"{name}/{decoding}/{measure}"
            if all(run.concepts(label) for run in runs):
                return label
    return f"{sets[0]}/{decoding}/accuracy"


def choose_baselines(groups: Sequence[Group], headline: str) -> dict[str, str]:
    """Label of a cell -> the cell that it is naturally compared with; {} where there is none, or more than one.

    That is the experiment called base, else CORE-Base, else the lowest budget of tool calls. Where several cells are
    one, as with two models under each experiment, each cell has the one with its own other values of ``by``.
    """
    if len(groups) < 2:
        return {}
    budgets = {one.label: {by_value(run, _BUDGET) for run in one.runs.values()} for one in groups}
    known = {b for own in budgets.values() for b in own if isinstance(b, int)}
    for names, fits in (
        (("experiment",), lambda one: all(str(by_value(r, "experiment")).endswith("/base") for r in one.runs.values())),
        (("variant",), lambda one: all(by_value(r, "variant") == "core_base" for r in one.runs.values())),
        (
            (_BUDGET, "tool.call_budget"),
            lambda one: len(known) > 1 and budgets[one.label] == {min(known)},
        ),
    ):
        found = [one for one in groups if fits(one)]
        if len(found) == 1 and _comparable(found[0], groups, headline):
            return {one.label: found[0].label for one in groups if one is not found[0]}
        if len(found) > 1 and (pairs := _within(groups, found, names, headline)):
            return pairs
    return {}


def _within(groups: Sequence[Group], bases: Sequence[Group], names: Sequence[str], headline: str) -> dict[str, str]:
    """Each cell with the one base that has its values of ``by`` but for ``names``; {} where one has none or two."""
    pairs = {}
    for one in groups:
        if one in bases:
            continue
        rest = {name: value for name, value in one.by.items() if name not in names}
        own = [base for base in bases if all(base.by[name] == value for name, value in rest.items())]
        if len(own) != 1 or not _comparable(own[0], [one], headline):
            return {}
        pairs[one.label] = own[0].label
    return pairs


def no_baseline(groups: Sequence[Group]) -> str:
    """The note of a report that was to choose a baseline and found none."""
    return (
        "No baseline was chosen, because no one cell is an experiment called base, CORE-Base or the lowest tool-call "
        "budget and shares seeds and concepts with every other cell: set baseline=LABEL. Cells: "
        f"{', '.join(one.label for one in groups)}."
    )


def _comparable(base: Group, groups: Sequence[Group], headline: str) -> bool:
    """Whether every cell shares a seed with the baseline, and concepts there."""
    own = base.cell(headline)
    return all(
        any(seed in own and own[seed].keys() & rows.keys() for seed, rows in one.cell(headline).items())
        for one in groups
    )


# ---- template ----------------------------------------------------------------------------------------------------


def pick_template(finished: Sequence[Run], unfinished: Sequence[Run] = ()) -> str:
    """The template that suits these runs: run, torl, core or sweep."""
    if len(finished) + len(unfinished) <= 1:
        return "run"
    if finished and all(_BUDGET in flat(run) and _has(run, "sampled") for run in finished):
        return "torl"
    if finished and all(_has(run, "greedy", "gap") and _has(run, "greedy", "mastered") for run in finished):
        return "core"
    return "sweep"


def _has(run: Run, decoding: str, name: str | None = None) -> bool:
    return any(r["decoding"] == decoding and name in (None, r["set"]) for r in _rows(run))


def _rows(run: Run) -> Sequence[Any]:
    return run.results.get("per_concept") or ()
