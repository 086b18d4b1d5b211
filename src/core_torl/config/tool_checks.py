"""Combinations of tool, sandbox and variant that no single key can rule out; see core_torl.config.checks."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from core_torl.config.errors import UserError, nearest

CHOICES: dict[str, tuple[str, ...]] = {
    "tool.block_policy": ("last", "all", "first"),
    "tool.budget_notice": ("none", "message", "forbid_output"),
    "variant.void_turns": ("keep", "mask"),
}


def check_choice(key: str, value: str) -> None:
    """Raises UserError, naming the nearest one that exists, for a value that ``key`` cannot have."""
    if value not in CHOICES[key]:
        raise UserError(f"{key}={value!r}: use one of {', '.join(CHOICES[key])}.{nearest(value, CHOICES[key])}")


def check_choices(cfg: DictConfig) -> None:
    """The same for every key of ``CHOICES`` that ``cfg`` has."""
    for key in CHOICES:
        value = OmegaConf.select(cfg, key)
        if value is not None:
            check_choice(key, value)


def check_tool(cfg: DictConfig) -> None:
    """A call budget needs a sandbox. Raises UserError."""
    budget = cfg.tool.call_budget
    if budget < 0:
        raise UserError(f"tool.call_budget={budget}: must be 0 (no tools) or larger")
    check_choices(cfg)
    if budget and cfg.sandbox._target_.endswith(".NoSandbox"):
        raise UserError(
            f"sandbox=none with a call budget of {budget}: programs need a sandbox; use sandbox=bubblewrap, or set "
            f"{'variant.tool_call_budget' if 'variant' in cfg else 'tool.call_budget'}=0"
        )


def check_tool_variant(cfg: DictConfig) -> None:
    """Only variant=torl learns with tools, and its budget is the tool's. Raises UserError."""
    budget = OmegaConf.select(cfg, "variant.tool_call_budget")
    if budget is not None and budget < 0:
        raise UserError(f"variant.tool_call_budget={budget}: must be 0 (no tools) or larger")
    if cfg.tool.call_budget != (budget or 0):
        fix = "set variant.tool_call_budget instead" if budget is not None else "use variant=torl"
        raise UserError(f"tool.call_budget={cfg.tool.call_budget} in training: the variant decides; {fix}")
    if not 0 <= cfg.variant.max_aborted <= 1:
        raise UserError(f"variant.max_aborted={cfg.variant.max_aborted}: a share between 0 and 1")
