"""A training run in numbers, without its weights: what it reads, what it samples, what it learns from, what it takes.

Everything that a run checks before it loads weights is checked; prompts are measured and one is shown where the
tokenizer is on this machine; memory is arithmetic (``model/memory.py``). Nothing is fetched: what only the network
could tell is named at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core_torl.config import UserError, build
from core_torl.config.vllm_checks import check_vllm
from core_torl.data.base import ProblemSets
from core_torl.model.files import ModelFiles, read_model_files
from core_torl.model.memory import (
    BYTES,
    GIB,
    Architecture,
    Memory,
    Plan,
    estimate,
    gib,
    wanted_cache,
    whole_logits_bytes,
)
from core_torl.runs.assemble import Prepared, check_sampler_servers, drop_long, prepare
from core_torl.runs.training import augmenter, check_enough, coach_of, quiet
from core_torl.tracking.console import make_console, print_config_tree

console = make_console()
# Memory of common cards in GiB, as their drivers report it, less _CONTEXT for the CUDA context.
_CONTEXT = 1.0
CARDS = {"24 GB": 23.0, "40 GB": 38.4, "80 GB": 78.2, "141 GB": 138.8}
_RANKS = (1, 2, 4, 8)
# vLLM works with any cache that holds an answer, and lets the others wait; below this it would be slow.
_ENOUGH_CACHE = 4 * GIB


def dry_run(cfg: DictConfig) -> None:
    """Check data, prompts and budgets and print the run's arithmetic. Raises UserError for what would end the run."""
    quiet()
    prepared = prepare(cfg, with_device=False)
    prepared.close()
    build(cfg.objective)
    check_enough(cfg, prepared)
    augmenter(cfg, prepared.problems)
    coach_of(cfg, prepared.problems)
    try:
        files = read_model_files(cfg.model.path, cfg.model.revision)
    except ValueError as error:
        raise UserError(str(error)) from error
    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    print_config_tree(tree, console)
    _say(*data_lines(prepared.problems))
    longest = _prompts(cfg, prepared, files)
    check_positions(cfg, files.architecture, longest)
    _say(*step_lines(cfg, prepared.problems, files.architecture))
    if files.architecture is not None:
        _say(*memory_lines(cfg, files.architecture, files.source))
    _say(*device_lines(cfg))
    if files.missing:
        _say(f"not checked, as this machine does not tell it of {cfg.model.path}: {'; '.join(files.missing)}")
    _say("dry run: nothing was loaded or trained")


def _say(*lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


# ---- data and prompts ------------------------------------------------------------------------------------------------


def data_lines(problems: ProblemSets) -> list[str]:
    """Sizes, and what the source's report says about rows that were left out, doubled or leaked."""
    report = problems.report
    sizes = ", ".join(f"{name} {len(part)}" for name, part in problems.test.items())
    lines = [f"data: {len(problems.train)} training problems; test sets: {sizes or 'none'}"]
    held: Any = report.get("held_out")
    if held:
        none = "" if held["questions"] else "; raise data.test_fraction, change data.seed or give data.test_path"
        lines.append(
            f"data: {held['questions']} of {held['of']} questions are held out, each by a hash of its text and "
            f"data.seed{none}"
        )
    dropped: Any = report.get("dropped")
    if dropped:
        first = dropped[0]
        lines.append(f"data: {len(dropped)} rows left out; the first: row {first['row']}: {first['reason']}")
    if report.get("repeated_in_train"):
        folded = report.get("folded_in_train")
        then = "folded" if folded else "kept; data.deduplicate_train=true folds them"
        lines.append(f"data: {report['repeated_in_train']} training rows ask what another one asks ({then})")
    if report.get("asked_in_test"):
        leakage: Any = report.get("leakage") or {}
        sets = ", ".join(f"{name} {count}" for name, count in leakage.items())
        policy = report.get("on_leakage")
        then = "left out" if policy == "drop" else f"KEPT{': data.on_leakage=drop leaves them out' if policy else ''}"
        lines.append(f"data: {report['asked_in_test']} training rows are asked in a test set too ({sets}), {then}")
    elif "asked_in_test" in report:
        lines.append("data: no training question is asked in a test set")
    return lines


def _prompts(cfg: DictConfig, prepared: Prepared, files: ModelFiles) -> int | None:
    """Say how long prompts are and show one; returns the longest that is kept, None without a tokenizer."""
    template, problems, limit = prepared.template, prepared.problems, cfg.model.max_prompt_tokens
    example = problems.train[0]
    if files.tokenizer is None:
        how = " (before the chat template)" if template.style == "chat" else ""
        _say(f"prompt: style {template.style}; the first one{how}:", *_quoted(template.user_text(example)))
        return None
    kept = drop_long(problems, lambda p, _: template.encode(files.tokenizer, p, None), limit)
    everything = [*kept.train, *(p for part in kept.test.values() for p in part)]
    lengths = [len(template.encode(files.tokenizer, p)) for p in everything]
    _say(
        f"prompt: style {template.style}, {_spread(lengths)} tokens; {kept.report['dropped_long_prompts']} longer than "
        f"model.max_prompt_tokens={limit} left out; an answer ends with {_ends(cfg, prepared, files)}"
    )
    coached = [p for p in kept.train if p.concept] if cfg.trigger.when != "never" else []
    if coached:
        primed = [len(template.encode(files.tokenizer, p, p.concept)) for p in coached]
        over = sum(n > limit for n in primed)
        _say(f"prompt: with the concept {_spread(primed)} tokens; {over} longer than the limit are never coached")
    _say("prompt: the first one:", *_quoted(files.tokenizer.decode(template.encode(files.tokenizer, example))))
    return max(lengths)


def _ends(cfg: DictConfig, prepared: Prepared, files: ModelFiles) -> str:
    tokenizer: Any = files.tokenizer
    ends = (prepared.template.end_of_turn(tokenizer), tokenizer.eos_token, *cfg.sampler.stop)
    return " or ".join(dict.fromkeys(end for end in ends if end)) or "nothing"


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"


def _quoted(text: str) -> list[str]:
    return [f"  | {line}" for line in text.split("\n")]


def check_positions(cfg: DictConfig, model: Architecture | None, longest: int | None) -> None:
    """Prompt and answer must fit into the positions that the model was made for. Raises UserError."""
    if model is None or model.positions is None:
        return
    prompt, answer = longest or cfg.model.max_prompt_tokens, cfg.sampler.max_new_tokens
    if prompt + answer > model.positions:
        what = "the longest prompt has" if longest else "model.max_prompt_tokens allows"
        raise UserError(
            f"model.max_new_tokens={answer}: {what} {prompt} tokens, together {prompt + answer}, and the model has "
            f"{model.positions} positions; lower model.max_new_tokens or model.max_prompt_tokens"
        )


# ---- steps -----------------------------------------------------------------------------------------------------------


def ranks_of(cfg: DictConfig) -> int:
    return int(cfg.trainer.devices) * int(cfg.trainer.num_nodes)


def rows_at_once(cfg: DictConfig) -> int:
    """Rows of the longest kind in one microbatch."""
    text = cfg.model.max_prompt_tokens + cfg.sampler.max_new_tokens
    budget = cfg.variant.get("microbatch_tokens")
    return max(1, budget // text) if budget else int(cfg.variant.microbatch_size)


def microbatch_tokens(cfg: DictConfig) -> int:
    """Tokens of the largest microbatch: a row that is longer than the budget goes alone."""
    text = cfg.model.max_prompt_tokens + cfg.sampler.max_new_tokens
    budget = cfg.variant.get("microbatch_tokens")
    return max(budget, text) if budget else cfg.variant.microbatch_size * text


def step_lines(cfg: DictConfig, problems: ProblemSets, model: Architecture | None) -> list[str]:
    """Samples, optimizer steps and tokens of an RL step and of the run. Token counts are upper bounds."""
    rows, ranks, variant = cfg.group_size * cfg.prompts_per_step, ranks_of(cfg), cfg.variant
    minibatch = variant.minibatch_size or rows
    updates = rows // minibatch * variant.update_epochs
    given = variant._target_.endswith(".SupervisedFineTuning")
    text = cfg.model.max_prompt_tokens + cfg.sampler.max_new_tokens
    at_once = rows_at_once(cfg)
    parts = math.ceil(minibatch / ranks / at_once)
    sampled = 0 if given else cfg.rl_steps * rows * cfg.sampler.max_new_tokens
    passes = cfg.rl_steps * cfg.prompts_per_step / max(1, len(problems.train))
    lines = [
        f"RL step: {cfg.prompts_per_step} problems x {cfg.group_size} answers = {rows} trajectories, "
        f"{updates} optimizer step(s) of {minibatch}",
        f"microbatch: {at_once} rows of at most {text:,} tokens, {microbatch_tokens(cfg):,} together; at most {parts} "
        f"of them in an optimizer step on each of {ranks} rank(s)",
        f"run: {cfg.rl_steps} RL steps, {cfg.rl_steps * updates:,} optimizer steps, {cfg.rl_steps * rows:,} "
        f"trajectories, at most {sampled:,} sampled tokens, {passes:.2f} passes over the data",
    ]
    if cfg.token_budget is not None:
        lines.append(f"end: after the RL step that reaches {cfg.token_budget:,} sampled tokens, if that comes first")
    if model is not None:
        # 2 operations for each weight and token forwards, twice that backwards, and forwards again with checkpointing.
        forward = 2 * model.parameters * cfg.rl_steps * rows * text
        learned = forward * (4 if cfg.model.gradient_checkpointing else 3) * variant.update_epochs
        lines.append(
            f"arithmetic: at most {2 * model.parameters * sampled:.1e} operations to sample and {learned:.1e} to learn "
            "(attention, a reference and evaluations aside)"
        )
    return lines


# ---- memory ----------------------------------------------------------------------------------------------------------


def plan_of(cfg: DictConfig) -> Plan:
    """What of the config decides about memory."""
    model, variant, sampler, ranks = cfg.model, cfg.variant, cfg.sampler, ranks_of(cfg)
    lora = int(model.lora.rank)
    targets: Any = model.lora.target_modules
    kind = sampler._target_.rsplit(".", 1)[-1].lower()
    served, engine = "server" in kind, "vllm" in kind
    given = variant._target_.endswith(".SupervisedFineTuning")
    groups = math.ceil(cfg.prompts_per_step / ranks)
    rows = groups * cfg.group_size
    at_once = min(rows, sampler.get("max_rows") or rows)
    prompts = math.ceil(at_once / cfg.group_size)  # the answers of a group share their prompt's keys and values
    cache = at_once * sampler.max_new_tokens + prompts * model.max_prompt_tokens
    fixed = sampler.get("kv_cache_mb")
    copied = BYTES[model.dtype] if sampler.get("copy_weights") else 0
    own = _sampler_element(cfg)
    text, tokens = model.max_prompt_tokens + sampler.max_new_tokens, microbatch_tokens(cfg)
    return Plan(
        dtype=model.dtype, mixed="mixed" in str(cfg.trainer.precision), checkpointing=model.gradient_checkpointing,
        rank=lora, targets=targets if isinstance(targets, str) else list(targets),
        quantization=model.get("quantization"), copies=_copies(cfg) if not lora else 0,
        offload_copies=bool(model.get("offload_reference", False)), shadows=_shadows(cfg),
        copy_teaches=variant.get("teacher", "current") == "reference", tokens=tokens,
        answer_tokens=tokens * sampler.max_new_tokens // text, ranks=ranks,
        sharded="fsdp" in str(cfg.trainer.strategy), sampler_weights=0 if served else own if engine else copied,
        cache_tokens=0 if served or given else cache, cache_bytes=fixed * 2**20 if fixed and not served else None,
        cache_element=own if engine else 0, cache_enough=_ENOUGH_CACHE if engine and not fixed else None,
        sampler_sleeps=bool(sampler.get("sleep_level", 0)) and cfg.trainer.accelerator == "cuda",
    )  # fmt: skip


def _copies(cfg: DictConfig) -> int:
    """Frozen copies of all weights; with LoRA there are none, for the base weights are the reference."""
    return int(cfg.objective.kl_coef > 0 or cfg.variant.get("teacher", "current") == "reference")


def _shadows(cfg: DictConfig) -> int:
    """Copies of the weights as they stood before the step's first update, for a teacher that stands there."""
    variant, rows = cfg.variant, cfg.group_size * cfg.prompts_per_step
    moves = (variant.minibatch_size or rows) < rows or variant.update_epochs > 1
    return int(variant.get("teacher", "current") == "old" and moves)


def _sampler_element(cfg: DictConfig) -> int:
    """Bytes of a number in a sampler's own weights. Raises UserError for a format that is not known."""
    name = cfg.sampler.get("dtype") or cfg.model.dtype
    if name not in BYTES:
        raise UserError(
            f"sampler.dtype={name}: use {', '.join(BYTES)}, or null for the format of the trainer's weights"
        )
    return BYTES[name]


def memory_lines(cfg: DictConfig, model: Architecture, source: str) -> list[str]:
    """Memory of this run on each device, item by item, and how other ways to spread it would do."""
    plan = plan_of(cfg)
    found = estimate(model, plan)
    trained = model.lora_parameters(plan.rank, plan.targets) if plan.rank else model.parameters
    lines = [
        f"model: {model.parameters:,} weights ({source}), {trained:,} trained; {model.layers} layers of "
        f"{model.hidden}, {model.heads} heads, {model.kv_heads} of keys and values, {model.vocabulary:,} tokens",
        f"memory on each of {plan.ranks} device(s), by arithmetic:",
        *(_starting(found) if plan.sharded else []), *_items("always", found.always),
        *_items("learning", found.training), *_items("sampling", found.sampling),
        *_items("on the host", found.host),
        f"  peak {gib(found.peak)} ({f'starting {gib(found.while_starting)}, ' if plan.sharded else ''}"
        f"learning {gib(found.while_training)}, sampling {gib(found.while_sampling)}); {_fits(cfg, found)}",
        f"  a microbatch's logits, which are never held whole, would be {gib(whole_logits_bytes(model, plan))}; keys "
        f"and values of a step's answers are {gib(wanted_cache(model, plan))} at their longest, all side by side",
    ]  # fmt: skip
    if plan.cache_element == 4 and plan.mixed:
        lines.append("  sampler.dtype=bfloat16 halves what the sampler takes; its log-probs then differ by about 0.01")
    lines += _handed_over(cfg, model, plan)
    return [*lines, *table_lines(cfg, model)] if cfg.trainer.accelerator == "cuda" else lines


def _items(when: str, parts: dict[str, float]) -> list[str]:
    return [f"  {when}: {', '.join(f'{name} {gib(size)}' for name, size in parts.items())}"] if parts else []


def _starting(found: Memory) -> list[str]:
    """What each rank holds before the weights are spread, in the larger of the two phases of that."""
    return _items("starting, not yet sharded", max(found.loading, found.starting, key=lambda part: sum(part.values())))


def _handed_over(cfg: DictConfig, model: Architecture, plan: Plan) -> list[str]:
    """What servers get through the file system."""
    if "server" not in cfg.sampler._target_.lower():
        return []
    merged = cfg.sampler.weights == "merged"
    size = model.parameters * _sampler_element(cfg) if merged else 4 * model.lora_parameters(plan.rank, plan.targets)
    return [
        f"  sampler.sync_dir ({cfg.sampler.sync_dir or 'a temporary folder'}) gets {gib(size)} after each RL step "
        f"(sampler.weights={cfg.sampler.weights}) and needs {gib(2 * size)}: the old ones go when servers have the new"
    ]


def _fits(cfg: DictConfig, found: Memory) -> str:
    """The smallest card that holds it, and whether the share of it that vLLM is to take there is free."""
    card = next((name for name, size in CARDS.items() if found.peak <= size * GIB), None)
    if card is None:
        return f"fits on no GPU of up to {list(CARDS)[-1]}: spread it (trainer=fsdp), or adapt it (model.lora.rank)"
    share = cfg.sampler.get("gpu_memory_utilization")
    if share is None or "server" in cfg.sampler._target_.lower() or cfg.sampler.kv_cache_mb:
        return f"fits on a GPU of {card}"
    # The share is one of all memory, the CUDA context included.
    rooms = {
        name: math.floor(100 * (size - found.beside_sampler / GIB) / (size + _CONTEXT)) / 100
        for name, size in CARDS.items()
    }
    if share <= rooms[card]:
        return (
            f"fits on a GPU of {card} with sampler.gpu_memory_utilization={share} (there is room up to {rooms[card]})"
        )
    larger = next((name for name, room in rooms.items() if share <= room), None)
    return (
        f"does not fit on a GPU of {card} as configured: set sampler.gpu_memory_utilization={rooms[card]} "
        f"(it is {share}{f', which fits on one of {larger}' if larger else ''})"
    )


def table_lines(cfg: DictConfig, model: Architecture) -> list[str]:
    """Peaks in GiB for 1, 2, 4 and 8 devices, whole or sharded, all weights or adapters."""
    rank = cfg.model.lora.rank or 16
    whole = {"rank": 0, "dtype": "float32", "copies": _copies(cfg)}
    ways: dict[str, dict[str, Any]] = {
        "all weights on each (ddp)": {**whole, "sharded": False},
        "all weights sharded (fsdp)": {**whole, "sharded": True},
        f"LoRA {rank} on bfloat16 (ddp)": {"rank": rank, "dtype": "bfloat16", "sharded": False, "copies": 0},
    }
    lines = ["  peak in GiB with devices:" + " " * 8 + "".join(f"{n:>8}" for n in _RANKS)]
    for name, changes in ways.items():
        row = []
        for ranks in _RANKS:
            at = cfg.copy()
            at.trainer.devices, at.trainer.num_nodes = ranks, 1
            peak = estimate(model, replace(plan_of(at), **changes)).peak / GIB
            row.append(f"{peak:8.1f}" if cfg.prompts_per_step % ranks == 0 else " " * 7 + "-")
        lines.append(f"    {name:<30}{''.join(row)}")
    return lines


def device_lines(cfg: DictConfig) -> list[str]:
    """What this machine has of what the run needs."""
    lines = []
    if "vllm" in cfg.sampler._target_ and not cfg.sampler.get("urls"):
        try:
            lines.append(f"sampler: vLLM {check_vllm()}")
        except UserError as error:
            lines.append(f"not here: {error}")
    try:
        check_sampler_servers(cfg)
    except UserError as error:
        lines.append(f"not here: {error}")
    if cfg.trainer.accelerator != "cuda":
        return lines
    import torch

    if not torch.cuda.is_available():
        return [*lines, "not here: a GPU, which the run needs; everything else was checked"]
    card = torch.cuda.get_device_properties(0)
    return [*lines, f"device: {torch.cuda.device_count()} x {card.name}, {card.total_memory / GIB:.1f} GiB each"]
