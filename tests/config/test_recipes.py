"""Recipes of real models hold the papers' settings, take either sampler, and need nothing but the data."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from core_torl.config.checks import check_train
from core_torl.config.errors import UserError
from core_torl.model.memory import KNOWN

from .test_compose import CONF, composed

RECIPES = sorted(
    p.stem for p in (CONF / "experiment").glob("*.yaml") if p.stem.startswith(("core_", "torl_1", "torl_7"))
)
CORE = {
    "qwen2_math_7b": ("Qwen/Qwen2-Math-7B", 1024),
    "deepseek_r1_distill_qwen_1_5b": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 6000),
    "qwen2_5_math_1_5b": ("Qwen/Qwen2.5-Math-1.5B", 2048),
    "llama_3_8b_instruct": ("meta-llama/Meta-Llama-3-8B-Instruct", 2048),
}


@functools.cache
def recipe(name: str, *overrides: str):
    """The composed recipe; nobody changes it."""
    return composed("train", f"experiment={name}", "data.path=file", "dry_run=true", *overrides)


def test_every_row_has_its_recipe():
    wanted = {f"core_{method}_{model}" for method in ("base", "cr", "kl", "sft") for model in CORE}
    torl = {"torl_1_5b", "torl_7b", "torl_1_5b_no_tool", "torl_7b_no_tool", "torl_1_5b_two_calls", "torl_1_5b_penalty"}
    assert set(RECIPES) == wanted | torl
    text = (CONF.parent / "docs" / "recipes.md").read_text()
    told = {name for name in RECIPES if f"`{name}`" in text}
    assert {n for n in RECIPES if "qwen2_math_7b" in n or "torl" in n or "core_cr" in n} <= told


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lacks_its_data_alone_and_says_so(name: str):
    with pytest.raises(UserError, match=r"data\.path has no value: set data\.path="):
        check_train(composed("train", f"experiment={name}", "dry_run=true"))
    check_train(recipe(name))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_samples_with_vllm_on_gpus_and_takes_transformers_too(name: str):
    cfg, other = recipe(name), recipe(name, "sampler=transformers")
    check_train(other)
    assert cfg.sampler._target_.endswith(".VllmSampler") and cfg.trainer.accelerator == "cuda"
    assert other.sampler._target_.endswith(".TransformersSampler")
    same = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop")
    assert [cfg.sampler[k] for k in same] == [other.sampler[k] for k in same]
    assert cfg.model.path in KNOWN, "a dry run knows its size"


@pytest.mark.parametrize("model", CORE)
@pytest.mark.parametrize("method", ["base", "cr", "kl"])
def test_cores_runs_hold_the_papers_settings(method: str, model: str):
    """Appendix B.1 and the released configs; see docs/recipes.md for what is from where."""
    cfg = recipe(f"core_{method}_{model}")
    assert cfg.variant._target_.split(".")[-2] == f"core_{method}"
    assert (cfg.model.path, cfg.sampler.max_new_tokens) == CORE[model] and cfg.model.max_prompt_tokens == 1024
    assert cfg.model.prompt == composed("train", "model/prompt=core").model.prompt
    half = (method, model) == ("cr", "qwen2_math_7b")
    assert (cfg.rl_steps, cfg.prompts_per_step) == ((50, 64) if half else (23, 128))
    assert (cfg.group_size, cfg.variant.minibatch_size, cfg.variant.update_epochs) == (4, 128, 1)
    v, o = cfg.variant, cfg.objective
    assert (v.lr, list(v.betas), v.weight_decay, v.grad_clip, v.warmup_steps) == (1e-6, [0.9, 0.999], 0.01, 1.0, 0)
    assert (o.clip_low, o.clip_high, o.kl_coef, o.kl_estimator, o.entropy_coef) == (0.2, 0.2, 0.001, "k3", 0.001)
    assert (cfg.sampler.temperature, cfg.sampler.top_p, v.microbatch_tokens) == (0.7, 1.0, 12288)
    assert cfg.model.lora.rank == 0 and cfg.model.dtype == "float32" and cfg.trainer.precision == "bf16-mixed"
    if method == "cr":
        assert (v.replaced, v.bonus, v.bonus_when, v.replace_policy) == (2, 0.4, "always", "random")
    if method == "kl":
        assert (v.kl_lambda, v.lambda_right, v.lambda_wrong, v.direction) == (0.01, 3.0, 0.5, "forward")
    assert cfg.trigger.when == ("never" if method == "base" else "all_wrong")


@pytest.mark.parametrize("model", CORE)
def test_the_fine_tuned_baselines_hold_the_released_settings(model: str):
    cfg = recipe(f"core_sft_{model}")
    assert cfg.variant._target_.endswith(".SupervisedFineTuning") and (cfg.model.path, cfg.group_size) == (
        CORE[model][0],
        1,
    )
    assert (cfg.variant.lr, cfg.variant.warmup_steps, cfg.rl_steps, cfg.prompts_per_step) == (5e-5, 12, 125, 120)
    assert (cfg.model.lora.rank, cfg.model.lora.target_modules, cfg.model.dtype) == (8, "all-linear", "bfloat16")
    assert cfg.objective.kl_coef == 0 and cfg.model.prompt.style == "chat"


def test_torls_other_rows_differ_in_one_thing_each():
    def flat(name: str) -> dict[str, object]:
        cfg = recipe(name)
        return {
            "budget": cfg.variant.tool_call_budget, "penalty": cfg.reward.executability, "steps": cfg.rl_steps,
            "model": cfg.model.path, "rest": (cfg.objective, cfg.data, cfg.group_size, cfg.sampler, cfg.trainer),
        }  # fmt: skip

    small, large = flat("torl_1_5b"), flat("torl_7b")
    assert flat("torl_1_5b_no_tool") == small | {"budget": 0}
    assert flat("torl_7b_no_tool") == large | {"budget": 0}
    assert flat("torl_1_5b_two_calls") == small | {"budget": 2}
    assert flat("torl_1_5b_penalty") == small | {"penalty": -0.5}


def test_an_ablation_goes_on_top_of_a_recipe():
    cfg = recipe("core_base_qwen2_math_7b", "ablation=random_reward")
    assert cfg.reward._target_.endswith(".RandomReward") and cfg.rl_steps == 23
    more = recipe("core_base_qwen2_math_7b", "ablation=extra_rollouts", "variant.minibatch_size=192")
    check_train(more)
    assert (more.group_size, more.variant.minibatch_size) == (6, 192)
    released = recipe("core_cr_qwen2_math_7b", "ablation=compat_released_cr")
    check_train(released)
    assert released.variant._target_.endswith(".CompatReleasedCR") and released.variant.lr == 1e-6


def test_recipes_of_one_paper_share_one_place_for_what_they_share():
    """A setting that two recipes repeat could differ in one of them."""
    for name in RECIPES:
        lines = Path(CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
        assert (
            len([x for x in lines if ": " in x and not x.lstrip().startswith(("#", "-"))]) <= 4 or name == "torl_1_5b"
        )


def test_every_shared_piece_is_in_a_recipe():
    files = (CONF / "experiment").rglob("*.yaml")
    used = {line.split("/")[-1] for f in files for line in f.read_text().splitlines() if "/experiment/common/" in line}
    assert used == {p.stem for p in (CONF / "experiment" / "common").glob("*.yaml")}
