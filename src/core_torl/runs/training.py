"""A training run from its config to its results: evaluate, train, evaluate again, write down what was gained."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from core_torl.config import UserError, build
from core_torl.data.base import ProblemSets
from core_torl.evaluation.protocol import Evaluation, SetResult
from core_torl.runs.assemble import Parts, Prepared, assemble, prepare
from core_torl.runs.callbacks import EvaluateEvery, SampleTables
from core_torl.runs.results import is_main_process, make_tracker, write_results
from core_torl.tracking.console import make_console, print_config_tree, results_table
from core_torl.tracking.figures import learning_curves_and_bars
from core_torl.tracking.mirror import read_jsonl
from core_torl.tracking.progress import StepProgress
from core_torl.variant.checkpoint import RLCheckpoint, check_fingerprint, read, resolve
from core_torl.variant.policy_gradient import PolicyGradient

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
    "model",
    "data",
    "trainer",
)
_FREE = (
    "microbatch_size",
    "share_prompts",
    "skip_zero_advantage",
    "engine",
    "max_rows",
    "workers",
    "wall_timeout_s",
    "first_step_gap",
    "gradient_checkpointing",
    "max_excluded",
    "path",
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "threads",
)


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
    walk({k: tree[k] for k in _FINGERPRINT}, "")
    flat["training problems"] = hashlib.sha256(repr(problems.train).encode()).hexdigest()[:16]
    return flat


def train(cfg: DictConfig) -> float:
    """Run everything; returns the mean of the after-training headline accuracies, for sweepers."""
    quiet()
    main = is_main_process()
    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    output = Path(cfg.paths.output_dir)
    checkpoint = resolve(cfg.resume, output)
    saved = read(checkpoint)["core_torl"] if checkpoint else None
    prepared = prepare(cfg)
    check_enough(cfg, prepared)
    marks = fingerprint(cfg, prepared.problems)
    if checkpoint and saved:
        check_fingerprint(checkpoint, saved["fingerprint"], marks)
        # With all steps done but no results the run goes on to write them: it was stopped in between.
        if saved["rl_step"] > cfg.rl_steps or (saved["rl_step"] == cfg.rl_steps and (output / "results.json").exists()):
            raise UserError(f"{checkpoint} has all {saved['rl_step']} RL steps already: raise rl_steps to go on")
    if main:
        print_config_tree(tree, console)
    parts = assemble(cfg, prepared)
    module: PolicyGradient = build(
        cfg.variant, policy=parts.policy, sampler=parts.sampler, reward_function=parts.reward,
        objective=build(cfg.objective), problems=parts.problems.train, encode=parts.encode, rl_steps=cfg.rl_steps,
        group_size=cfg.group_size, prompts_per_step=cfg.prompts_per_step, seed=cfg.seed,
        temperature=cfg.sampler.temperature, fingerprint=marks,
    )  # fmt: skip
    tracker = make_tracker(cfg, output, saved["run_id"] if saved else None)
    failed = True
    try:
        tracker.log_config(tree)
        tracker.rewind(saved["rl_step"] if saved else -1)
        before = evaluate_now(parts) if main else []
        if main and not saved:
            tracker.log_metrics(parts.evaluation.metrics(before), step=0)
        saver = RLCheckpoint(output / "checkpoints", cfg.callbacks.checkpoint_every, cfg.callbacks.checkpoint_keep)
        callbacks: list[pl.Callback] = [SampleTables(tracker, cfg.callbacks.samples_every)]
        if cfg.evaluate_every:
            callbacks.append(
                EvaluateEvery(cfg.evaluate_every, lambda: evaluate_now(parts), parts.evaluation.metrics, tracker)
            )
        if cfg.callbacks.progress:
            callbacks.append(StepProgress(console=console))
        trainer = pl.Trainer(
            accelerator="gpu" if cfg.trainer.accelerator == "cuda" else "cpu", devices=cfg.trainer.devices,
            num_nodes=cfg.trainer.num_nodes, strategy=cfg.trainer.strategy, precision=cfg.trainer.precision,
            max_epochs=1, logger=tracker, callbacks=[*callbacks, saver], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            default_root_dir=str(output), log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(
            module, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True if checkpoint else None
        )
        if not main:
            failed = False
            return 0.0
        if saver.interrupted:
            console.print(
                f"Interrupted after RL step {module.rl_step}. "
                f"Go on with the same command and hydra.run.dir={output} resume=auto"
            )
            raise SystemExit(130)
        headline = finish(cfg, parts, module, tracker, before, output)
        failed = False
        return headline
    finally:
        parts.reward.close()
        parts.sampler.close()
        tracker.finish(exit_code=1 if failed else 0)


def finish(
    cfg: DictConfig, parts: Parts, module: PolicyGradient, tracker: Any, before: list[SetResult], output: Path
) -> float:
    """Evaluate the trained policy, then write tables, picture, results and the exported policy."""
    evaluation: Evaluation = parts.evaluation
    after = evaluate_now(parts)
    tracker.log_metrics(evaluation.metrics(after), step=module.rl_step)
    estimates = evaluation.estimates(before), evaluation.estimates(after)
    gains = evaluation.differences(before, after)
    console.print(results_table(*estimates, gains))
    picture = output / "results.png"
    title = f"{cfg.variant._target_.rsplit('.', 1)[-1]}, {module.rl_step} RL steps, seed {cfg.seed}"
    learning_curves_and_bars(read_jsonl(output / "metrics.jsonl"), *estimates, picture, title)
    tracker.log_picture("results", picture, rl_step=module.rl_step)
    write_results(
        output / "results.json", before=estimates[0], after=estimates[1], gains=gains,
        per_concept=evaluation.per_concept(after), data=parts.problems.report, last=module.last_metrics,
    )  # fmt: skip
    written = ["results.json", "results.png", "metrics.jsonl", "checkpoints/"]
    if cfg.export:
        parts.policy.export(output / "policy")
        written.append("policy/ (save_pretrained)")
    console.print(f"Wrote {', '.join(written)} in {output}")
    measure = "robust_accuracy" if any(label.endswith("robust_accuracy") for label in estimates[1]) else "accuracy"
    values = [e.value for label, e in estimates[1].items() if label.endswith(f"/{measure}")]
    return sum(values) / len(values)


def evaluate_now(parts: Parts) -> list[SetResult]:
    """All test sets under the current weights, the concept never in the prompt."""
    return parts.evaluation.run(parts.problems.test, parts.sampler, parts.encode, parts.reward, parts.policy.tokenizer)


def check_enough(cfg: DictConfig, parts: Prepared) -> None:
    if len(parts.problems.train) < cfg.prompts_per_step:
        raise UserError(
            f"prompts_per_step={cfg.prompts_per_step} is more than the {len(parts.problems.train)} training problems: "
            "lower it"
        )


def dry_run(cfg: DictConfig) -> None:
    """Check data and prompts and print the run's arithmetic, without loading weights."""
    quiet()
    prepared = prepare(cfg)
    prepared.reward.close()
    build(cfg.objective)
    check_enough(cfg, prepared)
    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    print_config_tree(tree, console)
    problems = prepared.problems
    rows = cfg.group_size * cfg.prompts_per_step
    updates = rows // (cfg.variant.minibatch_size or rows) * cfg.variant.update_epochs
    sizes = ", ".join(f"{name} {len(part)}" for name, part in problems.test.items())
    tokens = cfg.rl_steps * rows * cfg.sampler.max_new_tokens
    passes = cfg.rl_steps * cfg.prompts_per_step / max(1, len(problems.train))
    console.print(f"data: {len(problems.train)} training problems; test sets: {sizes}")
    console.print(
        f"RL step: {cfg.prompts_per_step} problems x {cfg.group_size} answers = {rows} trajectories, "
        f"{updates} optimizer step(s)"
    )
    console.print(
        f"run: {cfg.rl_steps} RL steps, {cfg.rl_steps * rows:,} trajectories, at most {tokens:,} sampled tokens, "
        f"{passes:.2f} passes over the data"
    )
    console.print("dry run: nothing was loaded or trained; prompt lengths and memory were not checked")


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
