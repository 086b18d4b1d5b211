"""A coached variant whose keys contradict each other, or whose coach nobody would ask, is refused with its sentence."""

from __future__ import annotations

import copy
import functools

import pytest
from omegaconf import DictConfig, OmegaConf

from core_torl.config.checks import check_group_size, check_train
from core_torl.config.coach_checks import CHOICES, check_choice, check_coach
from core_torl.config.errors import UserError

from .test_compose import composed

CR, KL, HYBRID = ["variant=core_cr"], ["variant=core_kl"], ["variant=core_hybrid"]
# Overrides, and the line they are refused with; a text that ends in "..." is the line's beginning.
REFUSED: dict[str, tuple[list[str], str]] = {
    "K = N": ([*CR, "variant.replaced=8"], "variant.replaced=8 (K) must lie in 1..7, below group_size=8 (N)"),
    "K > N": (
        [*CR, "variant.replaced=5", "group_size=4"], "variant.replaced=5 (K) must lie in 1..3, below group_size=4 (N)",
    ),
    "K = 0": ([*CR, "variant.replaced=0"], "variant.replaced=0 (K) must lie in 1..7, below group_size=8 (N)"),
    "K < 0": ([*CR, "variant.replaced=-1"], "variant.replaced=-1 (K) must lie in 1..7, below group_size=8 (N)"),
    "K in a hybrid": ([*HYBRID, "variant.replaced=8"], "variant.replaced=8 (K) must lie in 1..7..."),
    "bonus that is never paid": (
        [*CR, "variant.bonus_when=none"],
        "variant.bonus=0.4 with variant.bonus_when=none is never paid: set variant.bonus=0, or "
        "variant.bonus_when=always",
    ),
    "negative bonus": ([*CR, "variant.bonus=-0.1"], "variant.bonus=-0.1: must not be negative"),
    "nothing to prime with": (
        [*CR, "intervention=none"],
        "intervention=none: this variant has nothing to prime a prompt with; take intervention=true_concept, or "
        "variant=core_base to train without a coach",
    ),
    "nothing to prime with in KL": ([*KL, "intervention=none"], "intervention=none: this variant has nothing..."),
    "an intervention that nobody asks": (
        ["variant=core_base", "intervention=filler"],
        "intervention=filler: this variant has no coach and would ignore it; take variant=core_cr, core_kl or "
        "core_hybrid, or intervention=none",
    ),
    "a trigger that nobody asks": (
        ["variant=core_base", "trigger=always"],
        "trigger=always: this variant has no coach and would ignore it; take variant=core_cr, core_kl or core_hybrid, "
        "or trigger=never",
    ),
    "a trigger for given answers": (
        ["ablation=sft", "trigger=all_wrong"], "trigger=all_wrong: this variant has no coach...",
    ),
    "guided on-policy rows": (
        [*CR, "variant.behaviour=guided", "variant.train_prompt=primed"],
        "variant.behaviour=guided with variant.train_prompt=primed: such a row is on-policy and has no ratio to "
        "correct; use variant.behaviour=recompute",
    ),
    "released code with a choice it has not": (
        ["ablation=compat_released_cr", "variant.behaviour=guided"],
        "variant=compat_released_cr trains on the failed answers themselves: it has no use for "
        "variant.train_prompt=primed or variant.behaviour=guided; leave them at plain and recompute",
    ),
    "shaping without a guided row": (
        [*CR, "objective.guided_ratio=shaping"],
        "objective.guided_ratio=shaping is about guided rows, and there are none here: set variant=core_cr "
        "variant.behaviour=guided, or objective.guided_ratio=clip",
    ),
    "a budget that nothing spends": (
        ["ablation=sft", "token_budget=500"],
        "token_budget=500: variant=sft samples no tokens, so that it would never end; set token_budget=null and rl_steps",
    ),
    "a continuation without its beginning": (
        [*CR, "intervention=expert_prefix"],
        "intervention=expert_prefix: what the policy adds makes no sense without the prefix; set "
        "variant.train_prompt=primed",
    ),
    "a prefix as a teacher": (
        [*KL, "intervention=expert_prefix"],
        "intervention=expert_prefix gives no second distribution over the same answer: use it with variant=core_cr "
        "variant.train_prompt=primed",
    ),
    "a prefix as half a teacher": (
        [*HYBRID, "intervention=expert_prefix", "variant.train_prompt=primed"],
        "intervention=expert_prefix gives no second distribution...",
    ),
    "bonus_when": (
        [*CR, "variant.bonus_when=alwys"],
        "variant.bonus_when='alwys': use one of always, only_if_correct, none. Did you mean 'always'?",
    ),
    "replace_policy": (
        [*CR, "variant.replace_policy=longst"],
        "variant.replace_policy='longst': use one of random, longest, truncated_first. Did you mean 'longest'?",
    ),
    "train_prompt": (
        [*CR, "variant.train_prompt=prime"],
        "variant.train_prompt='prime': use one of plain, primed. Did you mean 'primed'?",
    ),
    "behaviour": (
        [*CR, "variant.behaviour=guide"],
        "variant.behaviour='guide': use one of recompute, guided. Did you mean 'guided'?",
    ),
    "teacher": (
        [*KL, "variant.teacher=ref"],
        "variant.teacher='ref': use one of current, old, reference.",
    ),
    "direction": (
        [*KL, "variant.direction=revers"],
        "variant.direction='revers': use one of forward, reverse, jensen_shannon. Did you mean 'reverse'?",
    ),
    "reduction": (
        [*KL, "variant.reduction=token_men"],
        "variant.reduction='token_men': use one of token_mean, sum. Did you mean 'token_mean'?",
    ),
    "average_over": (
        [*HYBRID, "variant.average_over=trigger"],
        "variant.average_over='trigger': use one of triggered, batch. Did you mean 'triggered'?",
    ),
    "no references": ([*KL, "variant.references=0"], "variant.references=0: must be at least 1"),
    "lambda": ([*KL, "variant.kl_lambda=-0.01"], "variant.kl_lambda=-0.01: must not be negative"),
    "lambda of right ones": ([*KL, "variant.lambda_right=-1"], "variant.lambda_right=-1.0: must not be negative"),
    "lambda of wrong ones": ([*KL, "variant.lambda_wrong=-1"], "variant.lambda_wrong=-1.0: must not be negative"),
    "rho above": ([*HYBRID, "variant.rho=1.1"], "variant.rho=1.1: a share between 0 (all KL) and 1 (all CR)"),
    "rho below": ([*HYBRID, "variant.rho=-0.1"], "variant.rho=-0.1: a share between 0 (all KL) and 1 (all CR)"),
    "token budget": (["token_budget=0"], "token_budget=0: must be at least 1, or null for none"),
    "sft without likelihood": (
        ["variant=sft", "group_size=1"],
        "variant=sft has one given answer for each problem: add objective=likelihood group_size=1, or use "
        "ablation=sft, which does",
    ),
    "sft with groups": (["variant=sft", "objective=likelihood"], "variant=sft has one given answer..."),
    "likelihood of sampled answers": (
        ["objective=likelihood"],
        "objective=likelihood makes every answer likelier, right or wrong: use it with variant=sft",
    ),
    "likelihood under a coach": ([*CR, "objective=likelihood"], "objective=likelihood makes every answer likelier..."),
    "a group of one": (["group_size=1"], "group_size=1: a group advantage needs at least 2 answers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_training_refuses(case: str):
    overrides, says = REFUSED[case]
    with pytest.raises(UserError) as error:
        check_train(composed("train", *overrides))
    line = str(error.value)
    assert line.startswith(says.removesuffix("...")) if says.endswith("...") else line == says


@pytest.mark.parametrize(
    "overrides",
    [
        [*CR, "variant.replaced=1", "group_size=2"],
        [*CR, "variant.replaced=7"],
        [*CR, "variant.bonus_when=none", "variant.bonus=0"],
        [*CR, "variant.behaviour=guided"],
        [*CR, "variant.train_prompt=primed"],
        [*CR, "variant.train_prompt=primed", "intervention=expert_prefix"],
        [*CR, "trigger=never"],
        [*KL, "variant.kl_lambda=0"],
        [*HYBRID, "variant.rho=0"],
        [*HYBRID, "variant.rho=1"],
        ["token_budget=1"],
    ],
    ids=" ".join,
)
def test_values_at_the_edge_are_fine(overrides: list[str]):
    check_train(composed("train", *overrides))


@functools.cache
def _plain(variant: str) -> DictConfig:
    return composed("train", f"variant={variant}")


@pytest.mark.parametrize("key", CHOICES)
def test_every_value_that_is_named_is_taken_and_no_other(key: str):
    cfg = copy.deepcopy(_plain("core_hybrid"))
    for value in CHOICES[key]:
        cfg.variant[key] = value
        cfg.variant.bonus = 0.0 if value == "none" else 0.4
        check_coach(cfg)
    cfg.variant[key] = "zzz"
    with pytest.raises(UserError, match=rf"^variant\.{key}='zzz': use one of {', '.join(CHOICES[key])}\.$"):
        check_coach(cfg)
    with pytest.raises(ValueError, match=rf"^variant\.{key}='zzz'"):
        check_choice(key, "zzz")


def test_a_coach_of_ones_own_is_no_coach_of_ours():
    """Its package may be called anything; the checks read the module's name and must not stumble over it."""
    for target in ("mine", "mine.Coach", "mine.coaches.Coach"):
        cfg = copy.deepcopy(_plain("core_cr"))
        cfg.intervention._target_ = target
        check_coach(cfg)


def test_a_variant_of_ones_own_needs_a_group():
    cfg = OmegaConf.create(
        {"variant": {"_target_": "mine.Variant"}, "objective": {"_target_": "mine.Objective"}, "group_size": 1}
    )
    with pytest.raises(UserError, match="at least 2 answers"):
        check_group_size(cfg)
    check_group_size(OmegaConf.merge(cfg, {"group_size": 2}))
