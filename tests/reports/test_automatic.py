"""What a report chooses for itself: the fewest names that tell recipes apart, sets, headline, baseline, template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core_torl.config.errors import UserError
from core_torl.reports.automatic import (
    choose_baseline,
    choose_by,
    choose_decoding,
    choose_headline,
    choose_sets,
    pick_template,
)
from core_torl.reports.finished import Group, Run, group

SETS = {"gap/greedy": (0.5, 0.4), "mastered/greedy": (0.9, 0.9), "gap_primed/greedy": (0.9, 0.9)}


def run(
    seed: int = 0, config: dict[str, Any] | None = None, overrides: list[str] | None = None,
    sets: dict[str, tuple[float | None, ...]] | None = None, **choices: str,
) -> Run:  # fmt: skip
    """A finished run; ``sets`` are accuracy and robust accuracy by set/decoding."""
    rows = [
        {"set": name.split("/")[0], "decoding": name.split("/")[1], "concept": "c", "n": 2, "accuracy": accuracy,
         "robust_accuracy": robust}
        for name, (accuracy, robust) in (SETS if sets is None else sets).items()
    ]  # fmt: skip
    section = {"choices": choices, "config": {"seed": seed, **(config or {})}, "seed": seed}
    folder = Path(f"/{choices}/{config}/{seed}")
    return Run(folder, {"run": section, "per_concept": rows, "after": {}}, record={"overrides": overrides or []})


# ---- cells -------------------------------------------------------------------------------------------------------


def test_a_variant_stands_for_the_keys_that_it_sets():
    runs = [
        run(s, {"variant": {"_target_": v, "bonus": b}, "trigger": {"when": w}}, variant=v, trigger=w)
        for s in (0, 1)
        for v, w, b in [("core_base", "never", 0.0), ("core_cr", "all_wrong", 1.0), ("core_kl", "all_wrong", 0.0)]
    ]
    assert choose_by(runs) == ["variant"]


def test_a_recipe_comes_before_the_variant_that_it_chooses():
    runs = [
        run(0, {"x": i}, experiment=e, variant=v)
        for i, (e, v) in enumerate([("core/base", "core_base"), ("core/random", "core_base"), ("core/kl", "core_kl")])
    ]
    assert choose_by(runs) == ["experiment"]


def test_groups_and_keys_together_groups_first():
    runs = [run(0, {"variant": {"lr": lr}, "v": v}, variant=v) for v in ("a", "b") for lr in (1e-4, 3e-4, 1e-3)]
    assert choose_by(runs) == ["variant", "variant.lr"]


def test_what_was_set_by_hand_comes_before_what_follows_from_it():
    """A tool's budget is taken from the variant's; without overrides the key of the better-known group is taken."""
    keys = [{"tool": {"call_budget": c}, "variant": {"tool_call_budget": c}} for c in (0, 1)]
    assert choose_by([run(0, k, [f"tool.call_budget={i}"]) for i, k in enumerate(keys)]) == ["tool.call_budget"]
    assert choose_by([run(0, k) for k in keys]) == ["variant.tool_call_budget"]


def test_seed_places_and_logging_are_no_recipe():
    runs = [
        run(
            s,
            {"paths": {"output_dir": str(s)}, "logger": {"name": s}, "resume": s, "lr": 1},
            logger=str(s),
            variant="v",
        )
        for s in (0, 1)
    ]
    assert choose_by(runs) == ["variant"], "one cell, which still has a name"
    assert choose_by([run(0, {}, experiment="demo", variant="v")]) == ["experiment"]


def test_a_key_that_some_runs_lack_is_none_there():
    runs = [run(0, {"variant": {"name": "base"}}, variant="base")]
    runs += [run(0, {"variant": {"name": "cr", "bonus": b}}, variant="cr") for b in (0.0, 1.0)]
    by = choose_by(runs)
    assert by == ["variant.bonus"], "it tells all three apart"
    assert [g.label for g in group(runs, by)] == ["bonus:none", "bonus:0.0", "bonus:1.0"]


def test_the_chosen_names_always_make_cells():
    """Every run of another recipe is another cell, whatever mix of groups and keys it takes."""
    runs = [
        run(s, {"a": a, "b": b, "ab": f"{a}{b}", "deep": {"list": [a]}}, variant=v)
        for s in (0, 1) for a in (0, 1) for b in (0, 1) for v in ("x", "y")
    ]  # fmt: skip
    assert len(group(runs, choose_by(runs))) == 8


# ---- sets, headline, baseline ------------------------------------------------------------------------------------


def test_sets_are_all_without_primed_ones():
    assert choose_sets([run()], "greedy") == ["gap", "mastered"]
    with pytest.raises(UserError, match="decoding=sampled: no run has a test set of it"):
        choose_sets([run()], "sampled")


def test_decoding_is_greedy_where_all_runs_have_it():
    assert choose_decoding([run(), run()]) == "greedy"
    assert choose_decoding([run(), run(sets={"gap/sampled": (0.1, None)})]) == "sampled"


@pytest.mark.parametrize(
    ("sets", "headline"),
    [
        ([SETS], "gap/greedy/robust_accuracy"),
        ([SETS, {"gap/greedy": (0.5, None), "mastered/greedy": (0.9, 0.9)}], "gap/greedy/accuracy"),
        ([{"a/greedy": (0.5, None)}], "a/greedy/accuracy"),
        ([{"a/greedy": (0.5, 0.5), "b/greedy": (0.5, None)}, {"b/greedy": (0.5, None)}], "b/greedy/accuracy"),
    ],
    ids=["robust", "plain in one run", "plain", "a set that all runs have"],
)
def test_the_headline(sets: list[Any], headline: str):
    runs = [run(sets=one) for one in sets]
    assert choose_headline(runs, choose_sets(runs, "greedy"), "greedy") == headline


def cells(runs: list[Run], by: list[str]) -> list[Group]:
    return group(runs, by)


def test_the_baseline_is_the_one_cell_of_core_base():
    headline = "gap/greedy/robust_accuracy"
    runs = [run(0, {"v": v}, variant=v) for v in ("core_kl", "core_base")]
    assert choose_baseline(cells(runs, ["variant"]), headline) == "core_base"
    assert choose_baseline(cells(runs[:1], ["variant"]), headline) is None
    two = [run(0, {"lr": lr, "v": v}, variant=v) for v in ("core_kl", "core_base") for lr in (1, 2)]
    assert choose_baseline(cells(two, ["variant", "lr"]), headline) is None, "two cells have it"
    recipes = [("core/base", "core_base"), ("core/random_reward", "core_base"), ("core/kl", "core_kl")]
    named = [run(0, {"e": e}, experiment=e, variant=v) for e, v in recipes]
    assert choose_baseline(cells(named, ["experiment"]), headline) == "core/base"
    other_seed = [runs[0], run(5, {"v": "core_base"}, variant="core_base")]
    assert choose_baseline(cells(other_seed, ["variant"]), headline) is None, "nothing is paired with it"


def test_the_baseline_is_the_lowest_budget():
    budgets = [run(0, {"variant": {"tool_call_budget": c}}, variant="torl") for c in (2, 1, 4)]
    by = ["variant.tool_call_budget"]
    assert choose_baseline(cells(budgets, by), "gap/greedy/accuracy") == "tool_call_budget:1"
    same = [run(0, {"variant": {"tool_call_budget": 1}, "lr": lr}, variant="torl") for lr in (1, 2)]
    assert choose_baseline(cells(same, ["lr"]), "gap/greedy/accuracy") is None


# ---- template ----------------------------------------------------------------------------------------------------


def test_the_template_suits_the_runs():
    torl = [run(s, {"variant": {"tool_call_budget": 1}}, sets={"two_stage/sampled": (0.5, None)}) for s in (0, 1)]
    assert pick_template(torl) == "torl"
    assert pick_template(torl[:1]) == "run" and pick_template(torl[:1], torl[1:]) == "torl"
    assert pick_template([run(0), run(1)]) == "core"
    greedy = [run(s, {"variant": {"tool_call_budget": 1}}, sets={"two_stage/greedy": (0.5, None)}) for s in (0, 1)]
    assert pick_template(greedy) == "sweep" and pick_template([*torl, run(2)]) == "sweep"
    assert pick_template([], [run(0), run(1)]) == "sweep"
