"""What can be wrong with a coached variant before anything is loaded: contradictions between its keys and groups.

The values that a key may have stand here once; the variants read them from here.
"""

from __future__ import annotations

from omegaconf import DictConfig

from core_torl.config.errors import UserError, nearest

CHOICES: dict[str, tuple[str, ...]] = {
    "bonus_when": ("always", "only_if_correct", "none"),
    "replace_policy": ("random", "longest", "truncated_first"),
    "train_prompt": ("plain", "primed"),
    "behaviour": ("recompute", "guided"),
    "teacher": ("current", "old", "reference"),
    "direction": ("forward", "reverse", "jensen_shannon"),
    "reduction": ("token_mean", "sum"),
    "average_over": ("triggered", "batch"),
}


def check_choice(key: str, value: str) -> None:
    """Raises ValueError, naming the nearest one that exists, for a value that ``variant.key`` cannot have."""
    if value not in CHOICES[key]:
        raise ValueError(
            f"variant.{key}={value!r}: use one of {', '.join(CHOICES[key])}.{nearest(value, CHOICES[key])}"
        )


def check_coach(cfg: DictConfig) -> None:
    """Raises UserError."""
    variant = cfg.variant
    for key in CHOICES:
        if key in variant:
            try:
                check_choice(key, variant[key])
            except ValueError as error:
                raise UserError(str(error)) from error
    if cfg.objective.get("guided_ratio", "clip") != "clip" and variant.get("behaviour") != "guided":
        raise UserError(
            f"objective.guided_ratio={cfg.objective.guided_ratio} is about guided rows, and there are none here: set "
            "variant=core_cr variant.behaviour=guided, or objective.guided_ratio=clip"
        )
    coached = "replaced" in variant or "references" in variant
    intervention = cfg.intervention._target_.split(".")[-2:][0]
    if not coached:
        _check_uncoached(cfg, intervention)
        return
    if intervention == "none":
        raise UserError(
            "intervention=none: this variant has nothing to prime a prompt with; take intervention=true_concept, or "
            "variant=core_base to train without a coach"
        )
    if "replaced" in variant:
        _check_replacement(cfg, intervention)
    if "references" in variant:
        _check_divergence(cfg, intervention)


def _check_uncoached(cfg: DictConfig, intervention: str) -> None:
    """A coach that nobody asks would be a group that nothing reads."""
    if intervention != "none":
        raise UserError(
            f"intervention={intervention}: this variant has no coach and would ignore it; take variant=core_cr, "
            "core_kl or core_hybrid, or intervention=none"
        )
    if cfg.trigger.when != "never":
        raise UserError(
            f"trigger={cfg.trigger.when}: this variant has no coach and would ignore it; take variant=core_cr, core_kl "
            "or core_hybrid, or trigger=never"
        )


def _check_replacement(cfg: DictConfig, intervention: str) -> None:
    variant = cfg.variant
    if not 0 < variant.replaced < cfg.group_size:
        # A group must keep answers of its own beside the replaced ones (CORE, section 3).
        raise UserError(
            f"variant.replaced={variant.replaced} (K) must lie in 1..{cfg.group_size - 1}, "
            f"below group_size={cfg.group_size} (N)"
        )
    if variant.bonus < 0:
        raise UserError(f"variant.bonus={variant.bonus}: must not be negative")
    if variant.bonus_when == "none" and variant.bonus != 0:
        raise UserError(
            f"variant.bonus={variant.bonus} with variant.bonus_when=none is never paid: set variant.bonus=0, or "
            "variant.bonus_when=always"
        )
    if "compat_released_cr" in variant._target_ and (variant.train_prompt, variant.behaviour) != ("plain", "recompute"):
        raise UserError(
            "variant=compat_released_cr trains on the failed answers themselves: it has no use for "
            "variant.train_prompt=primed or variant.behaviour=guided; leave them at plain and recompute"
        )
    if variant.train_prompt == "primed" and variant.behaviour == "guided":
        raise UserError(
            "variant.behaviour=guided with variant.train_prompt=primed: such a row is on-policy and has no ratio to "
            "correct; use variant.behaviour=recompute"
        )
    if intervention == "expert_prefix" and variant.train_prompt != "primed":
        raise UserError(
            "intervention=expert_prefix: what the policy adds makes no sense without the prefix; set "
            "variant.train_prompt=primed"
        )


def _check_divergence(cfg: DictConfig, intervention: str) -> None:
    variant = cfg.variant
    if variant.references < 1:
        raise UserError(f"variant.references={variant.references}: must be at least 1")
    for key in ("kl_lambda", "lambda_right", "lambda_wrong"):
        if variant[key] < 0:
            raise UserError(f"variant.{key}={variant[key]}: must not be negative")
    if "rho" in variant and not 0 <= variant.rho <= 1:
        raise UserError(f"variant.rho={variant.rho}: a share between 0 (all KL) and 1 (all CR)")
    if intervention == "expert_prefix":
        raise UserError(
            "intervention=expert_prefix gives no second distribution over the same answer: use it with variant=core_cr "
            "variant.train_prompt=primed"
        )
