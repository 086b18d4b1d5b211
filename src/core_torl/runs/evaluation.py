"""An evaluation from its config to a table: of a policy as it is, or of a checkpoint's weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core_torl.config import UserError
from core_torl.launch.record import add, read_record
from core_torl.runs.account import data_hashes, gpu_names
from core_torl.runs.assemble import assemble, prepare
from core_torl.runs.out_of_memory import advice_on_memory
from core_torl.runs.results import choices, make_tracker, write_results
from core_torl.runs.training import evaluate_now, headline, quiet
from core_torl.tracking.console import estimates_table, make_console, print_config_tree
from core_torl.tracking.metrics import SAMPLES, TOKENS
from core_torl.variant.checkpoint import newest, read

log = logging.getLogger(__name__)


def warn_of_differences(cfg: DictConfig, trained: dict[str, Any]) -> None:
    """Say so where a checkpoint is evaluated in another way than it was trained: with other tools or another reward."""
    for key in ("tool.call_budget", "reward._target_"):
        now = OmegaConf.select(cfg, key)
        if trained.get(key, now) != now:
            log.warning(
                "checkpoint=%s was trained with %s=%s; this evaluation has %s", cfg.checkpoint, key, trained[key], now
            )


def evaluate(cfg: DictConfig) -> float:
    """Print and store all accuracies; returns one number for sweepers, that of ``headline``."""
    quiet()
    console = make_console()
    tree: Any = OmegaConf.to_container(cfg, resolve=True)
    state = None
    if cfg.checkpoint is not None:
        path = Path(cfg.checkpoint)
        file = path if path.is_file() else newest(path) or newest(path / "checkpoints")
        if file is None:
            raise UserError(
                f"checkpoint={cfg.checkpoint}: no such file and no step-*.ckpt in it; give a checkpoint or a run folder"
            )
        state = read(file)
        warn_of_differences(cfg, state["core_torl"]["fingerprint"])
    output = Path(cfg.paths.output_dir)
    tracker = make_tracker(cfg, output, None)  # logs nothing yet
    prepared = prepare(cfg)
    print_config_tree(tree, console)
    with advice_on_memory(cfg, "loading"):
        parts = assemble(cfg, prepared)
    if state is not None:
        try:
            parts.policy.load_state({n.removeprefix("model."): t for n, t in state["state_dict"].items()})
            parts.sampler.sync(parts.policy, str(state["core_torl"]["updates"]))  # it may have weights of its own
        except ValueError as error:
            parts.close()
            raise UserError(f"checkpoint={cfg.checkpoint}: {error}") from error
    failed = True
    try:
        add(output, provenance={"data": data_hashes(parts.problems), "gpus": gpu_names()})
        tracker.log_config({**tree, "choices": choices()})
        with advice_on_memory(cfg, "evaluating"):
            results = evaluate_now(parts)
        at = state["core_torl"] if state else {"rl_step": 0, "samples": 0, "tokens": 0}
        spent = {SAMPLES: at["samples"], TOKENS: at["tokens"]}
        tracker.log_metrics(parts.evaluation.metrics(results) | spent, step=at["rl_step"])
        estimates = parts.evaluation.estimates(results)
        console.print(estimates_table(estimates))
        per_concept = parts.evaluation.per_concept(results)
        columns = list(dict.fromkeys(column for row in per_concept for column in row))  # some sets have more
        tracker.log_table("per_concept", columns, [[row.get(column) for column in columns] for row in per_concept])
        objective = headline(estimates)
        write_results(
            output / "results.json", estimates=estimates, per_concept=per_concept, data=parts.problems.report,
            run={"choices": choices(), "config": tree}, objective=objective,
            provenance=(read_record(output) or {}).get("provenance"),
        )  # fmt: skip
        tracker.log_files(output)
        console.print(f"Wrote results.json in {output}")
        failed = False
        return objective
    finally:
        try:
            parts.close()
        finally:
            tracker.finish(exit_code=1 if failed else 0)
