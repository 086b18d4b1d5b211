"""A training run from its config to its results: evaluate, train, evaluate again, write down what was gained."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from core_torl.augmentation.variations import Augmentation
from core_torl.config import UserError, build
from core_torl.config.build import class_of
from core_torl.data.base import ProblemSets
from core_torl.evaluation.distractors import is_distracted, with_distractors
from core_torl.evaluation.protocol import Evaluation, SetResult
from core_torl.evaluation.statistics import Estimate
from core_torl.launch.identity import SERVERS, SPEED
from core_torl.launch.record import add, is_main_process, read_record
from core_torl.problem import Problem
from core_torl.runs.account import (
    compared,
    comparison_line,
    compute_used,
    data_hashes,
    first_results,
    gpu_names,
    problems_hash,
)
from core_torl.runs.assemble import Parts, Prepared, assemble, device_of, prepare
from core_torl.runs.callbacks import EvaluateEvery, RolloutTables
from core_torl.runs.out_of_memory import advice_on_memory
from core_torl.runs.results import choices, make_tracker, write_results
from core_torl.runs.transcripts import write_transcripts
from core_torl.tracking.comparison_table import PRIMED
from core_torl.tracking.console import make_console, print_config_tree, results_table
from core_torl.tracking.figures import learning_curves_and_bars
from core_torl.tracking.mirror import read_jsonl
from core_torl.tracking.progress import StepProgress
from core_torl.variant.checkpoint import RLCheckpoint, check_fingerprint, read, resolve
from core_torl.variant.policy_gradient import PolicyGradient
from core_torl.variant.strategy import strategy_of

console = make_console()
# What a resumed run must share with the run that wrote the checkpoint; the rest is about speed, places and length.
_FINGERPRINT = (
    "seed",
    "group_size",
    "prompts_per_step",
    "variant",
    "objective",
    "reward",
    "sampler",
    "tool",
    "sandbox",
    "model",
    "trigger",
    "intervention",
    "data",
    "augmentation",
    "trainer",
)
_FREE = (*SPEED, "first_step_gap", "sync_gap", "max_excluded", "max_aborted", "path")


def fingerprint(cfg: DictConfig, problems: ProblemSets) -> dict[str, Any]:
    """Flat, plain settings that decide what a run computes, and a hash of what it trains on."""
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            elif key not in _FREE or f"{path}{key}" == "model.path":
                flat[f"{path}{key}"] = value

    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    tree["sampler"] = {k: v for k, v in tree["sampler"].items() if k not in SERVERS}
    unused = () if tree["tool"]["call_budget"] else ("tool", "sandbox")
    walk({k: tree[k] for k in _FINGERPRINT if k not in unused}, "")
    flat["tool.call_budget"] = tree["tool"]["call_budget"]
    flat["training problems"] = problems_hash(problems.train)
    return flat


def train(cfg: DictConfig) -> float:
    """Run everything; returns the mean of the after-training headline accuracies, for sweepers."""
    quiet()
    started, main = time.monotonic(), is_main_process()
    first = first_results(cfg.reproduces)
    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    output = Path(cfg.paths.output_dir)
    checkpoint = resolve(cfg.resume, output)
    saved = read(checkpoint)["core_torl"] if checkpoint else None
    tracker = make_tracker(cfg, output, saved["run_id"] if saved else tracked_before(cfg, output))  # logs nothing yet
    prepared = prepare(cfg)
    check_enough(cfg, prepared)
    augment = augmenter(cfg, prepared.problems)
    coach = coach_of(cfg, prepared.problems)
    marks = fingerprint(cfg, prepared.problems)
    if checkpoint and saved:
        check_fingerprint(checkpoint, saved["fingerprint"], marks)
        # With all steps done but no results the run goes on to write them: it was stopped in between.
        spent = cfg.token_budget is not None and saved["tokens"] >= cfg.token_budget
        done = saved["rl_step"] == cfg.rl_steps or spent
        if saved["rl_step"] > cfg.rl_steps or (done and (output / "results.json").exists()):
            raise UserError(
                f"{checkpoint} has all {saved['rl_step']} RL steps already: raise "
                f"{'token_budget' if spent else 'rl_steps'} to go on"
            )
    if main:
        print_config_tree(tree, console)
        if saved is None:  # what an earlier run left in this folder is not this run's result
            (output / "results.json").unlink(missing_ok=True)
    with advice_on_memory(cfg, "loading"):
        parts = assemble(cfg, prepared)
        try:
            parts.sampler.sleep()  # room for the copies of the policy that some objectives and teachers need
            module = make_module(cfg, parts, coach, marks, augment)
        except BaseException:
            parts.close()
            raise
    failed = True
    try:
        add(output, wandb_id=tracker.run_id, provenance={"data": data_hashes(parts.problems), "gpus": gpu_names()})
        tracker.log_config({**tree, "choices": choices()})
        if saved:
            tracker.rewind(saved["rl_step"], saved["samples"], saved["tokens"])
        else:
            tracker.rewind(-1)
        with advice_on_memory(cfg, "evaluating"):
            before = evaluate_now(parts) if main else []
        if main and not saved:
            tracker.log_metrics(parts.evaluation.metrics(before), step=0)
        saver = RLCheckpoint(output / "checkpoints", cfg.callbacks.checkpoint_every, cfg.callbacks.checkpoint_keep)
        callbacks: list[pl.Callback] = []
        if cfg.callbacks.samples_every:
            callbacks.append(RolloutTables(tracker, cfg.callbacks.samples_every, cfg.logger.sample_rows))
        if cfg.evaluate_every:
            callbacks.append(
                EvaluateEvery(cfg.evaluate_every, lambda: evaluate_now(parts), parts.evaluation.metrics, tracker)
            )
        if cfg.callbacks.progress:
            callbacks.append(StepProgress(console=console))
        trainer = pl.Trainer(
            accelerator="gpu" if cfg.trainer.accelerator == "cuda" else "cpu", devices=cfg.trainer.devices,
            num_nodes=cfg.trainer.num_nodes,
            strategy=strategy_of(cfg.trainer.strategy, cfg.trainer.devices * cfg.trainer.num_nodes),
            precision=cfg.trainer.precision,
            max_epochs=1, logger=tracker, callbacks=[*callbacks, saver], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            default_root_dir=str(output), log_every_n_steps=1,
        )  # fmt: skip
        with advice_on_memory(cfg, "training"):
            trainer.fit(
                module, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True if checkpoint else None
            )
        if cfg.trainer.strategy != "fsdp":  # Lightning takes what it trained to the CPU
            parts.policy.model.to(device_of(cfg))
        if cfg.export and not saver.interrupted:
            parts.policy.export(output / "policy", write=main)  # of all ranks, where each has a shard
        if not main:
            failed = False
            return 0.0
        if saver.interrupted:
            console.print(
                f"Interrupted after RL step {module.rl_step}. "
                f"Go on with the same command and hydra.run.dir={output} resume=auto"
            )
            raise SystemExit(130)
        with advice_on_memory(cfg, "evaluating"):
            headline = finish(cfg, parts, module, tracker, before, output, started, first)
        failed = False
        return headline
    finally:
        try:
            parts.close()
        finally:
            tracker.finish(exit_code=1 if failed else 0)


def tracked_before(cfg: DictConfig, output: Path) -> str | None:
    """The W&B id of an earlier attempt at this run that left no checkpoint, where the run is to go on; else None."""
    record = read_record(output) if cfg.resume == "auto" else None
    return record.get("wandb_id") if record else None


def make_module(
    cfg: DictConfig, parts: Parts, coach: dict[str, Any], marks: dict[str, Any], augment: Any
) -> PolicyGradient:
    """The variant with everything that it needs."""
    return build(
        cfg.variant, policy=parts.policy, sampler=parts.sampler, reward_function=parts.reward,
        objective=build(cfg.objective), problems=parts.problems.train, encode=parts.encode, rl_steps=cfg.rl_steps,
        group_size=cfg.group_size, prompts_per_step=cfg.prompts_per_step, seed=cfg.seed,
        temperature=cfg.sampler.temperature, fingerprint=marks, augment=augment, token_budget=cfg.token_budget,
        encode_answer=parts.encode_answer, **coach,
    )  # fmt: skip


def finish(
    cfg: DictConfig, parts: Parts, module: PolicyGradient, tracker: Any, before: list[SetResult], output: Path,
    started: float, first: dict[str, Any] | None,
) -> float:  # fmt: skip
    """Evaluate the trained policy, then write tables, picture, the exported policy and, last of all, the results.

    ``first`` are the results of the run that this one repeats.
    """
    evaluation: Evaluation = parts.evaluation
    after = evaluate_now(parts)
    tracker.log_metrics(evaluation.metrics(after), step=module.rl_step)
    estimates = evaluation.estimates(before), evaluation.estimates(after)
    gains = evaluation.differences(before, after)
    console.print(results_table(*estimates, gains))
    history = read_jsonl(output / "metrics.jsonl")
    # A run that was stopped after its last step has no step of its own; the metrics of that one stand in the file.
    last = module.last_metrics or next((r for r in reversed(history) if "train/optimizer_steps" in r), {})
    picture = output / "results.png"
    title = f"{cfg.variant._target_.rsplit('.', 1)[-1]}, {module.rl_step} RL steps, seed {cfg.seed}"
    run = {"choices": choices(), "config": OmegaConf.to_container(cfg, resolve=True), "seed": cfg.seed,
           "rl_steps": module.rl_step, "sandbox": getattr(parts.sandbox, "isolation", None)}  # fmt: skip
    learning_curves_and_bars(history, *estimates, picture, title)
    tracker.log_picture("results", picture, rl_step=module.rl_step)
    write_transcripts(output / "transcripts.md", before, after, parts.problems.test)
    written = ["results.json", "results.png", "transcripts.md", "metrics.jsonl", "rollouts.jsonl", "checkpoints/"]
    if cfg.export:
        written.append("policy/ (save_pretrained)")
    objective = headline(estimates[1])
    record = read_record(output) or {}
    provenance = record.get("provenance") or {}
    repeated = compared(first, estimates[1], last, provenance, cfg.reproduces) if first else None
    write_results(
        output / "results.json", before=estimates[0], after=estimates[1], gains=gains,
        per_concept=evaluation.per_concept(after), per_concept_before=evaluation.per_concept(before),
        data=parts.problems.report, last=last, run=run, objective=objective,
        provenance=provenance, compute=compute_used(started, history, last, output, gpu_names()),
        reproduces=repeated,
    )  # fmt: skip
    tracker.log_files(output)
    console.print(f"Wrote {', '.join(written)} in {output}")
    if repeated:
        console.print(comparison_line(repeated), style="red" if repeated["differ"] else None, soft_wrap=True)
    return objective


def headline(after: Mapping[str, Estimate]) -> float:
    """One number for sweepers: the mean over test sets of robust accuracy, or of accuracy where nothing is permuted.

    Diagnoses, which put a text before the question, are left out.
    """
    names = {label: label.split("/")[0] for label in after}
    plain = {label: after[label] for label, name in names.items() if not (name.endswith(PRIMED) or is_distracted(name))}
    measure = "robust_accuracy" if any(label.endswith("robust_accuracy") for label in plain) else "accuracy"
    values = [e.value for label, e in plain.items() if label.endswith(f"/{measure}")]
    return sum(values) / len(values)


def evaluate_now(parts: Parts) -> list[SetResult]:
    """All test sets under the current weights, the concept never in the prompt.

    Two diagnoses may come beside: ``evaluation.primed`` adds the same problems once more, under the name NAME_primed,
    with the concept, and ``evaluation.distractors`` with concepts of other problems, as NAME_distractorsK.
    """
    tools = parts.sampler, parts.encode, parts.reward, parts.policy.tokenizer
    results = plain = parts.evaluation.run(parts.problems.test, *tools)
    if parts.evaluation.primed:
        chosen = {name: parts.evaluation.choose(part, name) for name, part in parts.problems.test.items()}
        sets = {f"{name}{PRIMED}": [p for p in part if p.concept] for name, part in chosen.items()}
        primed = parts.sampler, lambda p, _: parts.encode(p, p.concept), parts.reward, parts.policy.tokenizer
        results = results + parts.evaluation.run({name: part for name, part in sets.items() if part}, *primed)
    if parts.evaluation.distractors:
        rest = parts.template, parts.sampler, parts.reward, parts.policy.tokenizer
        results = results + with_distractors(parts.evaluation, parts.problems.test, plain, *rest)
    return results


def check_enough(cfg: DictConfig, parts: Prepared) -> None:
    if len(parts.problems.train) < cfg.prompts_per_step:
        raise UserError(
            f"prompts_per_step={cfg.prompts_per_step} is more than the {len(parts.problems.train)} training problems: "
            "lower it"
        )


def augmenter(cfg: DictConfig, problems: ProblemSets) -> Callable[[Problem, int], Problem] | None:
    """What varies a training problem each time it is drawn, None if nothing does. Raises UserError."""
    augmentation: Augmentation = build(cfg.augmentation)
    augmentation.check(problems.train, problems.redraw)
    if not augmentation.active:
        return None
    return lambda problem, seed: augmentation.apply(problem, seed, problems.redraw)


def coach_of(cfg: DictConfig, problems: ProblemSets) -> dict[str, Any]:
    """Trigger and intervention for a variant that has a coach, {} for others. Raises UserError for unfit problems."""
    kind: type[PolicyGradient] = class_of(cfg.variant)
    try:
        kind.check_problems(problems.train)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not kind.coached:
        return {}
    intervention = build(cfg.intervention, problems.train)
    if intervention.needs_primed_training and cfg.variant.get("train_prompt") != "primed":
        raise UserError(
            f"{cfg.intervention._target_}: answers to its prompts make no sense under the plain prompt; use it with "
            "variant=core_cr variant.train_prompt=primed"
        )
    return {
        "trigger": build(cfg.trigger), "intervention": intervention, "max_prompt_tokens": cfg.model.max_prompt_tokens,
    }  # fmt: skip


def quiet() -> None:
    """Lightning's advice about loaders and workers does not apply to a loop that samples its own data."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*iterable.*__len__.*",
        ".*log_every_n_steps.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
        ".*dataloader is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=text)
