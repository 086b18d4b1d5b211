"""Combinations that no single key can rule out. They run on the composed config, before torch is imported.

Each check raises UserError with one line that names the key and the fix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from core_torl.config.coach_checks import check_coach
from core_torl.config.errors import UserError, nearest
from core_torl.config.size_checks import check_size, check_trainer
from core_torl.config.tool_checks import check_tool, check_tool_variant
from core_torl.config.vllm_checks import check_vllm_sampler
from core_torl.config.vllm_server_checks import check_vllm_server

# Worlds of a warm start and the kinds of text in their mixtures.
MIXTURES = {
    "concept": ("option_drill", "arithmetic", "nonce", "recite", "defined", "mastered", "gap"),
    "calculation": ("plain", "sound", "mended", "given_up"),
}


def check_train(cfg: DictConfig) -> None:
    """Everything that can be said about a training config without loading anything."""
    check_keys(cfg)
    _positive(cfg, "rl_steps", "group_size", "prompts_per_step", "variant.microbatch_size", "variant.update_epochs")
    _positive(cfg, "trainer.threads", "trainer.devices", "trainer.num_nodes")
    _not_negative(cfg, "evaluate_every", "callbacks.checkpoint_every", "callbacks.samples_every", "model.lora.rank")
    _not_negative(cfg, "variant.warmup_steps", "variant.lr", "variant.weight_decay", "variant.grad_clip")
    if cfg.callbacks.checkpoint_keep < 1:
        raise UserError(f"callbacks.checkpoint_keep={cfg.callbacks.checkpoint_keep}: must be at least 1")
    check_group_size(cfg)
    if cfg.token_budget is not None and cfg.token_budget < 1:
        raise UserError(f"token_budget={cfg.token_budget}: must be at least 1, or null for none")
    if len(cfg.variant.betas) != 2 or not all(0 <= b < 1 for b in cfg.variant.betas):
        raise UserError(f"variant.betas={list(cfg.variant.betas)}: two numbers in [0, 1)")
    if not 0 <= cfg.variant.max_excluded <= 1:
        raise UserError(f"variant.max_excluded={cfg.variant.max_excluded}: a share between 0 and 1")
    check_minibatch(cfg)
    check_precision(cfg)
    check_overlap(cfg)
    check_size(cfg)
    check_truncated_sampling(cfg)
    check_coach(cfg)
    check_tool_variant(cfg)
    _check_shared(cfg)


def check_evaluate(cfg: DictConfig) -> None:
    """The same for an evaluation."""
    check_keys(cfg)
    _check_shared(cfg)
    if cfg.trainer.devices * cfg.trainer.num_nodes > 1:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}: an evaluation runs in one process; use trainer=cpu or gpu"
        )


def check_warm_start(cfg: DictConfig) -> None:
    """The same for a warm start."""
    check_keys(cfg)
    _positive(cfg, "batch_size", "drill_batch_size", "steps", "threads", "lr", "evaluate_per_concept")
    _positive(cfg, "layers", "width", "heads", "mlp")
    _not_negative(cfg, "drill_steps", "drill_until", "warmup_steps", "boxed_weight")
    if cfg.width % cfg.heads or (cfg.width // cfg.heads) % 2:
        raise UserError(f"width={cfg.width}, heads={cfg.heads}: width / heads must be an even number")
    if not 0 <= cfg.gap_epsilon <= 1:
        raise UserError(f"gap_epsilon={cfg.gap_epsilon}: a share between 0 and 1")
    known = MIXTURES[cfg.world]
    for name, share in cfg.mixture.items():
        if name not in known:
            raise UserError(f"mixture: unknown kind of text {name!r}.{nearest(str(name), known)}")
        if share < 0:
            raise UserError(f"mixture.{name}={share}: must not be negative")


def check_report(cfg: DictConfig) -> None:
    """The same for a comparison of runs."""
    check_keys(cfg)
    folders = list(cfg.runs) if isinstance(cfg.runs, ListConfig) else [cfg.runs]
    if not folders or not all(isinstance(folder, str) and folder for folder in folders):
        raise UserError(
            f"runs={cfg.runs}: a folder or wandb://entity/project, or a list of them, to search for training runs"
        )
    _one_of(cfg, "kind", "sweep", "core", "torl", "run")
    _one_of(cfg, "curves_axis", "rl_step", "samples", "sampled_tokens")
    _one_of(cfg, "wandb_report", "none", "json", "draft", "publish")
    if cfg.by is not None and not cfg.by:
        raise UserError("by=[]: name at least one config group or key, e.g. by=[variant]; null chooses them")
    names = list(cfg.by or ())
    if len(set(names)) < len(names):
        raise UserError(f"by={names}: a name stands there twice")
    if cfg.sets is not None and not cfg.sets:
        raise UserError("sets=[]: name at least one test set, e.g. sets=[gap]; null takes all")
    if cfg.decoding not in ("greedy", "sampled", None):
        raise UserError(f"decoding={cfg.decoding!r}: use greedy or sampled, or null to choose")
    parts = (cfg.headline or "set/greedy/accuracy").removesuffix("?").split("/")
    measures = ("accuracy", "robust_accuracy", "retained")
    if len(parts) != 3 or parts[1] not in ("greedy", "sampled") or parts[2] not in measures:
        raise UserError(
            f"headline={cfg.headline}: write set/decoding/measure with greedy or sampled and accuracy, robust_accuracy "
            "or retained, e.g. gap/greedy/robust_accuracy"
        )
    if not 0 < cfg.confidence < 1:
        raise UserError(f"confidence={cfg.confidence}: a share between 0 and 1, such as 0.95")
    _not_negative(cfg, "seed")
    for key in ("curves", "final"):
        if len(set(cfg[key])) < len(cfg[key]):
            raise UserError(f"{key}={list(cfg[key])}: a metric stands there twice")
    _positive(cfg, "curves_window", "final_steps")
    if cfg.curves_window % 2 == 0:
        raise UserError(
            f"curves_window={cfg.curves_window}: an odd number, with as many steps before as after; 1: none"
        )
    if cfg.x is not None and (cfg.x.partition("/")[0] not in ("before", "after", "last", "config") or "/" not in cfg.x):
        raise UserError(f"x={cfg.x}: must start with before/, after/, last/ or config/")


def check_axes(by: Sequence[str], x: str | None, line: str | None) -> None:
    """What ``x`` and ``line`` need of ``by``, which the report may have chosen from the runs."""
    if x is not None and line is None and len(by) > 1:
        raise UserError(f"x={x} needs line: which of by={list(by)} makes one line each?")
    if line is not None and line not in by:
        raise UserError(f"line={line}: must be one of by={list(by)}.{nearest(line, by)}")


def check_watch(cfg: DictConfig) -> None:
    """The same for the live view of a sweep."""
    check_keys(cfg)
    if cfg.runs == "":
        raise UserError("runs='': a folder of a sweep, or null for the newest one below paths.root")
    _positive(cfg, "every_s")


def _check_shared(cfg: DictConfig) -> None:
    check_tool(cfg)
    check_vllm_sampler(cfg)
    check_vllm_server(cfg)
    if cfg.trainer.accelerator not in ("cpu", "cuda"):
        raise UserError(f"trainer.accelerator={cfg.trainer.accelerator!r}: use cpu or cuda")
    check_trainer(cfg)
    if cfg.logger.mode not in ("offline", "online", "disabled"):
        raise UserError(f"logger.mode={cfg.logger.mode!r}: use offline, online or disabled")


def check_group_size(cfg: DictConfig) -> None:
    """Answers are compared within a group; given answers (variant=sft) are not."""
    given = cfg.variant._target_.endswith(".SupervisedFineTuning")
    likelihood = cfg.objective._target_.endswith(".Likelihood")
    if given and not (likelihood and cfg.group_size == 1):
        raise UserError(
            "variant=sft has one given answer for each problem: add objective=likelihood group_size=1, or use "
            "ablation=sft, which does"
        )
    if given and cfg.token_budget is not None:
        raise UserError(
            f"token_budget={cfg.token_budget}: variant=sft samples no tokens, so that it would never end; set "
            "token_budget=null and rl_steps"
        )
    if likelihood and not given:
        raise UserError("objective=likelihood makes every answer likelier, right or wrong: use it with variant=sft")
    if cfg.group_size < 2 and not given:
        raise UserError(f"group_size={cfg.group_size}: a group advantage needs at least 2 answers")


def check_minibatch(cfg: DictConfig) -> None:
    """Optimizer steps must divide the trajectories of an RL step, and ranks must divide both."""
    total, ranks = cfg.group_size * cfg.prompts_per_step, cfg.trainer.devices * cfg.trainer.num_nodes
    if cfg.prompts_per_step % ranks:
        raise UserError(
            f"prompts_per_step={cfg.prompts_per_step} must be a multiple of the {ranks} processes "
            f"(trainer.devices * trainer.num_nodes)"
        )
    size = cfg.variant.minibatch_size
    if size is not None and (size < 1 or total % size or size % ranks):
        fits = [d for d in range(1, total + 1) if total % d == 0 and d % ranks == 0]
        close = min(fits, key=lambda d: abs(d - size))
        raise UserError(
            f"variant.minibatch_size={size} does not divide group_size * prompts_per_step = {cfg.group_size} * "
            f"{cfg.prompts_per_step} = {total} evenly over {ranks} process(es): use {close}, or null for one update "
            f"a step"
        )


def check_overlap(cfg: DictConfig) -> None:
    """Answers are sampled beside training only from weights that training does not move."""
    if not cfg.variant.overlap:
        return
    if cfg.variant._target_.endswith(".SupervisedFineTuning"):
        raise UserError("variant.overlap=true: variant=sft samples nothing; set variant.overlap=false")
    if cfg.sampler.get("copy_weights") is False:
        raise UserError(
            "variant.overlap=true: sampler=transformers works with the trainer's own weights, which move while it "
            "samples; set sampler.copy_weights=true, or use sampler=vllm_server"
        )


def check_precision(cfg: DictConfig) -> None:
    """Trained weights in 16 bits lose updates: at lr 1e-6 they are smaller than the distance to the next number."""
    if cfg.trainer.precision in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision={cfg.trainer.precision}: small updates of 16-bit weights round away; use bf16-mixed"
        )
    if cfg.trainer.precision not in ("32-true", "64-true", "bf16-mixed"):  # 16-mixed scales gradients, which clips them
        raise UserError(f"trainer.precision={cfg.trainer.precision}: use 32-true, 64-true or bf16-mixed")
    if cfg.model.dtype != "float32" and cfg.model.lora.rank == 0:
        raise UserError(
            f"model.dtype={cfg.model.dtype} without LoRA: small updates of 16-bit weights round away; use "
            "model.dtype=float32 with trainer.precision=bf16-mixed, or model.lora.rank=16"
        )


def check_truncated_sampling(cfg: DictConfig) -> None:
    """A truncated distribution is renormalized by the sampler and not by the trainer: importance ratios would lie."""
    sampler = cfg.sampler
    for key, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if key in sampler and sampler[key] != off and cfg.objective.get("correction", "none") == "none":
            raise UserError(
                f"sampler.{key}={sampler[key]} in training: the sampler renormalizes what is left and the trainer does "
                f"not, so importance ratios would be wrong; set sampler.{key}={off} and use sampler.temperature, or "
                f"weigh the difference with objective.correction=truncate"
            )
    if sampler.get("temperature", 1.0) <= 0:
        raise UserError(
            f"sampler.temperature={sampler.temperature}: training needs a positive temperature; the answers of a "
            f"greedy group are all alike"
        )


def check_keys(cfg: DictConfig) -> None:
    """Refuse keys added with ``+`` that no dataclass knows, values left at ``???``, broken interpolations."""
    for path, node in _mappings(cfg, ""):
        kind = OmegaConf.get_type(node)
        if dataclasses.is_dataclass(kind):
            known = {f.name for f in dataclasses.fields(kind)}
            for key in node:
                if key not in known:
                    full = f"{path}{key}"
                    hint = nearest(full, {f"{path}{name}" for name in known})
                    raise UserError(f"unknown key {full!r}: nothing reads it.{hint}")
            for name in sorted(known - {str(key) for key in node}):
                raise UserError(f"{path}{name} was removed, and is needed: give it a value")
        for key in node:
            try:
                node[key]
            except MissingMandatoryValue as error:
                raise UserError(f"{path}{key} has no value: set {path}{key}=...") from error
            except InterpolationResolutionError as error:
                raise UserError(f"{path}{key}: {str(error).splitlines()[0]}") from error


def _mappings(node: Any, path: str) -> list[tuple[str, DictConfig]]:
    found = [(path, node)]
    for key in node:
        if not OmegaConf.is_missing(node, key):
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none():
                found += _mappings(child, f"{path}{key}.")
            elif isinstance(child, ListConfig):
                continue
    return found


def _positive(cfg: DictConfig, *keys: str) -> None:
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if value is not None and value <= 0:
            raise UserError(f"{key}={value}: must be larger than 0")


def _one_of(cfg: DictConfig, key: str, *options: str) -> None:
    if cfg[key] not in options:
        raise UserError(f"{key}={cfg[key]}: use {', '.join(options)}.{nearest(str(cfg[key]), options)}")


def _not_negative(cfg: DictConfig, *keys: str) -> None:
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if value is not None and value < 0:
            raise UserError(f"{key}={value}: must not be negative")
