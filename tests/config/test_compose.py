"""Every shipped YAML file composes, alone and as an option of its group, and every key in it says what it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from core_torl.config.checks import check_evaluate, check_report, check_train, check_warm_start, check_watch
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register

from .conftest import keys_without_comment

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
FILES = sorted(p.relative_to(CONF) for p in CONF.rglob("*.yaml"))
# Groups whose files change keys of any group.
GLOBAL = ("template", "ablation", "debug", "experiment", "world")
# The front door of a group that ``train`` does not have.
DOORS = {"world": "warm_start", "template": "report"}
# Pieces that options of the group above include; nobody chooses them.
PIECES = ("common",)


def choice(file: Path) -> tuple[str, str]:
    """Group and option: recipes may lie in folders of their group, other folders are groups of their own."""
    group = Path(file.parts[0]) if file.parts[0] in GLOBAL else file.parent
    return str(group), str(file.relative_to(group).with_suffix(""))


OPTIONS = [choice(f) for f in FILES if f.parent != Path() and f.parts[0] != "local" and f.parent.name not in PIECES]
# Values that only the user can give, and the company without which an option is refused.
COMPANY: dict[tuple[str, ...], list[str]] = {
    ("report",): ["runs=outputs"],
    ("data", "core_quizzes"): ["data.path=quizzes.jsonl"],
    ("data", "torl"): ["data.path=train.parquet"],
    ("data", "math"): ["data.path=train.jsonl"],
    ("model", "hf"): ["model.path=some/model"],
    ("trainer", "fsdp"): ["sampler.copy_weights=true"],
    ("variant", "sft"): ["objective=likelihood", "group_size=1"],
    ("objective", "likelihood"): ["variant=sft", "group_size=1"],
    ("intervention", "expert_prefix"): ["variant=core_cr", "variant.train_prompt=primed"],
}
for group, option in OPTIONS:
    if group == "experiment" and re.match(r"torl_\d|core_|common/", option):  # recipes of real models
        COMPANY[(group, option)] = [
            "data.path=train.parquet" if "torl" in option else "data.path=quizzes.jsonl",
            "dry_run=true",  # without vLLM, which they sample with
        ]
    if group == "template":
        COMPANY[(group, option)] = ["runs=outputs"]
    if group in ("intervention", "trigger") and option not in ("none", "never"):
        COMPANY.setdefault((group, option), ["variant=core_cr"])
CHECKS = {
    "train": check_train, "evaluate": check_evaluate, "warm_start": check_warm_start, "report": check_report,
    "watch": check_watch,
}  # fmt: skip


RANKS = ("ddp", "ddp_gpu", "fsdp")  # trainers of several processes


def composed(name: str, *overrides: str, folder: Path = CONF) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base=None):
        cfg = compose(name, overrides=["paths.output_dir=somewhere", *overrides])
    return cfg


def test_a_checkout_uses_the_files_beside_its_source():
    assert conf_dir() == str(CONF)


@pytest.mark.parametrize("name", CHECKS)
def test_a_front_door_composes_and_passes_its_checks_as_shipped(name: str):
    CHECKS[name](composed(name, *COMPANY.get((name,), [])))


def test_every_file_at_the_top_belongs_to_a_front_door():
    assert {f.stem for f in FILES if f.parent == Path()} == set(CHECKS)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda x: str(x))
def test_an_option_composes_and_passes_the_checks(group: str, option: str, installed):
    installed("0.32.0")  # vLLM counts as there: what is checked is the config
    door = DOORS.get(group, "train")
    cfg = composed(door, f"{group}={option}", *COMPANY.get((group, option), []))
    CHECKS[door](cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    # An evaluation runs in one process and says so: see test_checks.py.
    if (
        group in ("reward", "sampler", "model", "data", "evaluation", "trainer", "logger", "paths")
        and option not in RANKS
    ):
        check_evaluate(composed("evaluate", f"{group}={option}", *COMPANY.get((group, option), [])))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_global_files_say_so_and_others_do_not(file: Path):
    lines = (CONF / file).read_text().splitlines()
    assert (lines[0] == "# @package _global_") == (file.parts[0] in GLOBAL)
    described = lines[1] if file.parts[0] in GLOBAL else lines[0]
    assert re.match(r"# \w", described), "a file opens with a comment that says what it is"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_key_has_a_comment_above_it(file: Path):
    assert keys_without_comment(CONF / file) == []


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] in GLOBAL], ids=str)
def test_a_global_file_only_overrides_keys_that_exist(file: Path):
    """A file for the whole config could add keys that nothing reads; each of its keys must be in the plain config."""
    raw = OmegaConf.to_container(OmegaConf.load(CONF / file)) or {}
    assert isinstance(raw, dict)
    changed = [str(d) for d in raw.pop("defaults", []) if isinstance(d, str)]
    assert "_self_" not in changed, "what a file says comes after its defaults anyway"
    group, option = choice(file)
    cfg = composed(DOORS.get(group, "train"), f"{group}={option}")

    def missing(node: dict, path: str) -> list[str]:
        found = []
        for key, value in node.items():
            at = f"{path}{key}"
            if OmegaConf.select(cfg, at, throw_on_missing=False, default="absent") == "absent":
                found.append(at)
            elif isinstance(value, dict):
                found += missing(value, f"{at}.")
        return found

    assert not missing({str(k): v for k, v in raw.items()}, "")


def test_the_order_of_overrides_is_experiment_then_ablation_then_debug():
    """An ablation changes values of an experiment, a debug option those of both, the command line everything."""
    plain, demo = composed("train"), composed("train", "experiment=demo")
    assert plain.rl_steps != demo.rl_steps and demo.logger.group == "demo"
    ablated = composed("train", "experiment=demo", "ablation=extra_rollouts")
    assert demo.group_size != ablated.group_size == 6 and ablated.rl_steps == demo.rl_steps
    limited = composed("train", "experiment=demo", "ablation=extra_rollouts", "debug=limit")
    assert limited.rl_steps < demo.rl_steps and limited.logger.group == "demo"
    assert limited.group_size == composed("train", "debug=limit").group_size != ablated.group_size
    assert composed("train", "experiment=demo", "debug=limit", "rl_steps=7").rl_steps == 7


def test_an_ablation_changes_the_group_that_an_experiment_chose():
    """The group itself, not only keys: ``sft`` puts another variant where the experiment had put CORE-CR."""
    cfg = composed("train", "experiment=core/cr", "ablation=sft")
    check_train(cfg)
    assert cfg.variant._target_.endswith(".SupervisedFineTuning") and cfg.group_size == 1


COACHED = ("core_cr", "core_kl", "core_hybrid", "compat_released_cr")


@pytest.mark.parametrize("variant", COACHED)
def test_a_coached_variant_brings_its_trigger_and_its_concept(variant: str):
    cfg = composed("train", f"variant={variant}")
    assert cfg.trigger == composed("train", "variant=core_cr", "trigger=all_wrong").trigger
    assert cfg.trigger.when == "all_wrong" and cfg.intervention._target_.endswith(".TrueConcept")
    cfg = composed("train", f"variant={variant}", "trigger=pass_rate", "intervention=filler", "trigger.pass_rate=0.5")
    assert (cfg.trigger.when, cfg.trigger.pass_rate) == ("pass_rate", 0.5)
    assert cfg.intervention._target_.endswith(".Filler") and cfg.intervention.words


def test_every_variant_without_a_coach_has_neither():
    for group, variant in OPTIONS:
        if group == "variant" and variant not in COACHED:
            cfg = composed("train", f"variant={variant}")
            assert cfg.trigger.when == "never" and cfg.intervention._target_.endswith(".NoIntervention")


def test_a_trigger_option_is_named_after_what_it_does():
    """All four files hold the same keys; a copy whose ``when`` was forgotten would be another option's twin."""
    options = [option for group, option in OPTIONS if group == "trigger"]
    assert [composed("train", f"trigger={o}").trigger.when for o in options] == options


RECIPES = {
    "base": ("core_base", "never", "none"), "cr": ("core_cr", "all_wrong", "true_concept"),
    "kl": ("core_kl", "all_wrong", "true_concept"), "hybrid": ("core_hybrid", "all_wrong", "true_concept"),
    "bread": ("core_cr", "all_wrong", "expert_prefix"), "no_bonus": ("core_cr", "all_wrong", "true_concept"),
    "compat_released_cr": ("compat_released_cr", "all_wrong", "true_concept"), "sft": ("sft", "never", "none"),
    "cr_filler": ("core_cr", "all_wrong", "filler"), "cr_generic_hint": ("core_cr", "all_wrong", "generic_hint"),
    "cr_random_concept": ("core_cr", "all_wrong", "random_concept"),
    "cr_same_section_concept": ("core_cr", "all_wrong", "same_section_concept"),
    "cr_worked_solution": ("core_cr", "all_wrong", "worked_solution"),
    "cr_filler_no_bonus": ("core_cr", "all_wrong", "filler"),
    "cr_random_concept_no_bonus": ("core_cr", "all_wrong", "random_concept"),
    "kl_random_reward": ("core_kl", "all_wrong", "true_concept"),
    "cr_shuffled_reward": ("core_cr", "all_wrong", "true_concept"),
    "random_reward": ("core_base", "never", "none"), "shuffled_reward": ("core_base", "never", "none"),
    "extra_rollouts": ("core_base", "never", "none"), "data_augmentation": ("core_base", "never", "none"),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_holds_what_its_name_says(recipe: str):
    cfg, (variant, trigger, intervention) = composed("train", f"experiment=core/{recipe}"), RECIPES[recipe]
    assert cfg.variant._target_.split(".")[-2] == variant
    assert cfg.trigger.when == trigger and cfg.intervention._target_.split(".")[-2] == intervention
    assert "no_bonus" not in recipe or (cfg.variant.bonus, cfg.variant.bonus_when) == (0, "none")
    assert ("random_reward" in recipe) == cfg.reward._target_.endswith(".RandomReward")
    assert ("shuffled_reward" in recipe) == cfg.reward._target_.endswith(".ShuffledReward")
    assert (cfg.token_budget is None) == (recipe == "sft"), "what samples is compared at one number of tokens"


@pytest.mark.parametrize(
    ("ablation", "group", "option"),
    [
        ("random_reward", "reward", "random"),
        ("shuffled_reward", "reward", "shuffled"),
        ("data_augmentation", "augmentation", "variations"),
        ("compat_released_cr", "variant", "compat_released_cr"),
        ("bread", "intervention", "expert_prefix"),
        ("sft", "variant", "sft"),
    ],
)
def test_an_ablation_puts_another_option_in_its_place(ablation: str, group: str, option: str):
    cfg = composed("train", f"ablation={ablation}")
    check_train(cfg)
    assert cfg[group] == composed("train", f"{group}={option}")[group] != composed("train")[group]


def test_types_come_from_the_schema():
    cfg = composed("train", "variant.lr=1", "variant.minibatch_size=null")
    assert cfg.variant.lr == 1.0 and isinstance(cfg.variant.lr, float)
    assert cfg.variant.minibatch_size is None
    assert cfg.sampler.max_new_tokens == cfg.model.max_new_tokens


@pytest.mark.parametrize(("experiment", "steps"), [("torl_1_5b", 1000), ("torl_7b", 500)])
def test_torls_experiments_hold_the_papers_settings(experiment: str, steps: int):
    cfg = composed("train", f"experiment={experiment}", "data.path=train.parquet", "dry_run=true")
    check_train(cfg)
    targets = {group: cfg[group]._target_.rpartition(".")[2] for group in ("variant", "reward", "data", "objective")}
    assert targets == {"variant": "ToRL", "reward": "TorlReward", "data": "TorlProblems", "objective": "GRPO"}
    assert (cfg.rl_steps, cfg.prompts_per_step, cfg.group_size, cfg.evaluate_every) == (steps, 128, 16, 4)
    v, o = cfg.variant, cfg.objective
    assert (v.tool_call_budget, v.minibatch_size, v.update_epochs, v.warmup_steps) == (1, None, 1, 0)
    assert (v.lr, list(v.betas), v.weight_decay, v.grad_clip) == (1e-6, [0.9, 0.999], 0.01, 1.0)
    assert (o.clip_low, o.clip_high, o.kl_coef, o.entropy_coef, o.normalize_std) == (0.2, 0.2, 0.0, 0.0, True)
    assert (cfg.reward.correct, cfg.reward.incorrect, cfg.reward.executability) == (1.0, -1.0, 0.0)
    assert (cfg.sampler.temperature, cfg.sampler.top_p, cfg.sampler.top_k) == (1.0, 1.0, 0)
    assert (cfg.model.max_prompt_tokens, cfg.sampler.max_new_tokens, cfg.model.dtype) == (390, 3072, "float32")
    assert cfg.model.path == f"Qwen/Qwen2.5-Math-{'7B' if experiment == 'torl_7b' else '1.5B'}"
    assert cfg.model.prompt == composed("train", "model/prompt=torl_0309").model.prompt
    assert cfg.evaluation.greedy and cfg.evaluation.samples == cfg.evaluation.permutations == 0
    assert (cfg.trainer.accelerator, cfg.callbacks.checkpoint_every) == ("cuda", 20)
    assert (cfg.tool, cfg.sandbox) == tuple(
        composed("train", "variant=torl", "variant.tool_call_budget=1")[g] for g in ("tool", "sandbox")
    )
