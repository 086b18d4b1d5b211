"""What a report chooses for itself: the fewest names that tell recipes apart, sets, headline, baseline, template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core_torl.config.errors import UserError
from core_torl.reports.automatic import (
    choose_baselines,
    choose_by,
    choose_decoding,
    choose_headline,
    choose_sets,
    find_sets,
    no_baseline,
    pick_template,
)
from core_torl.reports.finished import Group, Run, absent_run, group

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


def test_how_fast_a_run_is_makes_no_cell():
    """Keys of SPEED, in any group, neither split cells nor forbid a comparison; a group of nothing else neither."""
    runs = [
        run(s, {"trainer": {"threads": t, "accelerator": a}, "sampler": {"max_rows": t}, "lr": lr}, trainer=a)
        for lr in (1, 2)
        for s, t, a in ((0, 1, "cpu"), (1, 8, "cuda"))
    ]
    assert choose_by(runs) == ["lr"]
    assert [sorted(g.runs) for g in group(runs, ["lr"])] == [[0, 1], [0, 1]]
    runs = [run(0, {"trainer": {"threads": t, "lr": t}}, trainer=str(t)) for t in (1, 2)]
    assert choose_by(runs) == ["trainer"], "it sets something else too"
    twice = [run(0, {"trainer": {"threads": t}}, variant="v") for t in (1, 2)]
    with pytest.raises(UserError, match=r"seed 0 twice.*how fast they are \(trainer.threads\): add it to by"):
        group(twice, ["variant"])
    assert [g.label for g in group(twice, ["trainer.threads"])] == ["threads:1", "threads:2"]


def test_a_number_is_one_value_however_it_is_written():
    runs = [run(s, {"lr": lr}, variant="v") for s, lr in enumerate([1, 1.0])]
    assert choose_by(runs) == ["variant"]
    (one,) = group(runs, ["lr"])
    assert one.label == "lr:1" and sorted(one.runs) == [0, 1]
    assert choose_by([run(0, {"on": True}), run(0, {"on": 1})]) == ["on"]


def test_cells_stand_in_the_order_of_their_values():
    rates = (0.0003, 1e-3, 1e-05, 0.00024000000000000003)
    labels = [g.label for g in group([run(0, {"lr": lr}) for lr in rates], ["lr"])]
    assert labels == ["lr:1e-05", "lr:0.00024", "lr:0.0003", "lr:0.001"]
    assert [g.label for g in group([run(0, {"n": n}) for n in (16, None, 4)], ["n"])] == ["n:none", "n:4", "n:16"]
    named = [run(0, {"v": v}, variant=v) for v in ("lr_1e-3", "lr_0.0001", "k16", "k4")]
    assert [g.label for g in group(named, ["variant"])] == ["k4", "k16", "lr_0.0001", "lr_1e-3"]
    close = [run(0, {"lr": lr}) for lr in (0.1, 0.1 + 1e-12)]
    assert [g.label for g in group(close, ["lr"])] == ["lr:0.1", f"lr:{0.1 + 1e-12}"], "rounded, they would be one"


def test_unfinished_runs_are_missing_in_their_cell():
    runs = [run(s, {"v": v}, variant=v) for v, s in (("a", 0), ("a", 1), ("b", 0))]
    dead = [
        Run(Path(f"/{i}"), run(s, {"v": v}, variant=v).results | {"after": None}, state=state)
        for i, (v, s, state) in enumerate(
            [("a", 2, "killed"), ("a", 3, "failed"), ("a", 0, "killed"), ("c", 0, "failed"), ("a", 2, "failed")]
        )
    ] + [Run(Path("/?"), {"run": {}}, state="killed"), Run(Path("/??"), {}, state="killed")]
    groups = group(runs, ["variant"], dead)
    assert [(g.label, g.seeds_text) for g in groups] == [
        ("a", "2 of 4 (1 failed, 1 killed)"), ("b", "1"), ("c", "0 of 1 (1 failed)")
    ]  # fmt: skip
    places = [(one["cell"], one["seed"]) for one in (absent_run(r, groups) for r in dead)]
    assert places == [("a", 2), ("a", 3), ("a", 0), ("c", 0), ("a", 2), (None, None), (None, None)]


# ---- sets, headline, baseline ------------------------------------------------------------------------------------


def test_sets_are_all_without_primed_ones():
    assert choose_sets([run()], "greedy") == ["gap", "mastered"]
    with pytest.raises(UserError, match="decoding=sampled: no run has a test set of it"):
        choose_sets([run()], "sampled")


def test_sets_with_a_star_are_those_that_match():
    rows: dict[str, tuple[float | None, ...]] = {f"gap_distractors{k}/greedy": (0.5, 0.5) for k in (1, 10, 2)}
    names = ["gap", "gap_primed*", "nothing*", "gap_distractors*"]
    expected = ["gap", "gap_primed", "gap_distractors1", "gap_distractors2", "gap_distractors10"]
    assert find_sets([run(sets=SETS | rows)], "greedy", names) == expected
    assert find_sets([run(sets={"gap/greedy": (0.5, 0.5)})], "greedy", names) == ["gap"]
    with pytest.raises(UserError, match=r"no run has such a test set. There are: gap, gap_primed, mastered"):
        find_sets([run()], "greedy", ["nothing*"])


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


def test_a_headline_that_is_only_a_wish():
    wish = "two_stage/sampled/accuracy?"
    sets: dict[str, tuple[float | None, ...]] = {"one_stage/sampled": (1.0, None)}
    both = sets | {"two_stage/sampled": (0.4, None)}
    assert choose_headline([run(sets=both)] * 2, list("x"), "sampled", wish) == "two_stage/sampled/accuracy"
    some = [run(sets=both), run(sets=sets)]
    assert choose_headline(some, ["one_stage"], "sampled", wish) == "one_stage/sampled/accuracy"
    assert choose_headline(some, ["one_stage"], "sampled", wish[:-1]) == wish[:-1], "an order, refused later"


def cells(runs: list[Run], by: list[str]) -> list[Group]:
    return group(runs, by)


def test_the_baseline_is_the_one_cell_of_core_base():
    headline = "gap/greedy/robust_accuracy"
    runs = [run(0, {"v": v}, variant=v) for v in ("core_kl", "core_base")]
    assert choose_baselines(cells(runs, ["variant"]), headline) == {"core_kl": "core_base"}
    assert choose_baselines(cells(runs[:1], ["variant"]), headline) == {}
    recipes = [("core/base", "core_base"), ("core/random_reward", "core_base"), ("core/kl", "core_kl")]
    named = [run(0, {"e": e}, experiment=e, variant=v) for e, v in recipes]
    found = choose_baselines(cells(named, ["experiment"]), headline)
    assert found == {"core/random_reward": "core/base", "core/kl": "core/base"}
    other_seed = [runs[0], run(5, {"v": "core_base"}, variant="core_base")]
    assert choose_baselines(cells(other_seed, ["variant"]), headline) == {}, "nothing is paired with it"


def test_the_baseline_is_the_lowest_budget():
    budgets = [run(0, {"variant": {"tool_call_budget": c}}, variant="torl") for c in (2, 1, 4)]
    by = ["variant.tool_call_budget"]
    found = choose_baselines(cells(budgets, by), "gap/greedy/accuracy")
    assert found == {f"tool_call_budget:{c}": "tool_call_budget:1" for c in (2, 4)}
    same = [run(0, {"variant": {"tool_call_budget": 1}, "lr": lr}, variant="torl") for lr in (1, 2)]
    assert choose_baselines(cells(same, ["lr"]), "gap/greedy/accuracy") == {}


def test_several_baselines_each_for_cells_of_its_kind():
    """Recipes on two policies: each is compared with base on the same policy; so are budgets with and without fee."""
    headline = "gap/greedy/accuracy"
    runs = [
        run(0, {"m": m, "e": e}, experiment=e, variant="core_base" if "base" in e else "core_kl")
        for m in (1, 2) for e in ("core/base", "core/cr", "core/kl")
    ]  # fmt: skip
    found = choose_baselines(cells(runs, ["experiment", "m"]), headline)
    assert found == {f"core/{e} m:{m}": f"core/base m:{m}" for e in ("cr", "kl") for m in (1, 2)}
    lone = [*runs, run(0, {"m": 3, "e": "core/kl"}, experiment="core/kl", variant="core_kl")]
    assert choose_baselines(cells(lone, ["experiment", "m"]), headline) == {}, "one cell has no base"
    budgets = [run(0, {"variant": {"tool_call_budget": c}, "fee": f}, variant="t") for c in (0, 1) for f in (0.0, 0.5)]
    found = choose_baselines(cells(budgets, ["variant.tool_call_budget", "fee"]), headline)
    assert found == {f"tool_call_budget:1 fee:{f}": f"tool_call_budget:0 fee:{f}" for f in (0.0, 0.5)}


def test_no_baseline_is_said_with_the_cells():
    groups = cells([run(0, {"lr": lr}, variant="v") for lr in (1, 2)], ["lr"])
    assert choose_baselines(groups, "gap/greedy/accuracy") == {}
    assert no_baseline(groups).endswith("set baseline=LABEL. Cells: lr:1, lr:2.")


# ---- template ----------------------------------------------------------------------------------------------------


def test_the_template_suits_the_runs():
    torl = [run(s, {"variant": {"tool_call_budget": 1}}, sets={"two_stage/sampled": (0.5, None)}) for s in (0, 1)]
    assert pick_template(torl) == "torl"
    assert pick_template(torl[:1]) == "run" and pick_template(torl[:1], torl[1:]) == "torl"
    assert pick_template([run(0), run(1)]) == "core"
    greedy = [run(s, {"variant": {"tool_call_budget": 1}}, sets={"two_stage/greedy": (0.5, None)}) for s in (0, 1)]
    assert pick_template(greedy) == "sweep" and pick_template([*torl, run(2)]) == "sweep"
    assert pick_template([], [run(0), run(1)]) == "sweep"
