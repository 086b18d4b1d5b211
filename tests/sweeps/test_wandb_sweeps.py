"""sweeps/wandb/: what W&B's agent would run, made offline by W&B's own code, is a sound run with the values of the sweep.

W&B checks a sweep's file on its server and ships no schema, so the keys that are used here are checked by hand.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from core_torl.config.checks import check_train
from core_torl.tracking.metrics import find
from core_torl.tracking.offline import read_run
from core_torl.tracking.wandb_run import flatten
from tests.config.test_compose import CONF, ROOT, composed
from tests.sweeps.test_sweeps import jobs

FILES = sorted((ROOT / "sweeps/wandb").glob("*.yaml"))
SWEEPS: dict[str, dict[str, Any]] = {p.stem: yaml.safe_load(p.read_text()) for p in FILES}
# Group choices: no key of a run's config has their name.
GROUPS = {d.name for d in CONF.iterdir() if d.is_dir()}
KEYS = {
    "program", "project", "name", "method", "run_cap", "metric", "early_terminate", "parameters", "command",
}  # fmt: skip


def sampled(parameter: dict[str, Any], rng: random.Random) -> list[Any]:
    """All values of a parameter; of a distribution its ends and a few draws."""
    if "value" in parameter:
        return [parameter["value"]]
    if "values" in parameter:
        return parameter["values"]
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "log_uniform_values":
        return [low, high, *(math.exp(rng.uniform(math.log(low), math.log(high))) for _ in range(3))]
    return [low, high, *(rng.uniform(low, high) for _ in range(3))]


def runs(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of every run: the whole grid, or draws."""
    rng = random.Random(0)
    columns = {name: sampled(parameter, rng) for name, parameter in sweep["parameters"].items()}
    if sweep["method"] == "grid":
        return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())]
    longest = max(map(len, columns.values()))
    return [{name: values[i % len(values)] for name, values in columns.items()} for i in range(longest)]


def command_of(sweep: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """The words that an agent hands to the operating system, as wandb.agents and wandb.cli make them."""
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in run.items()}})
    words: list[str] = []
    for word in create_sweep_command(list(sweep["command"])):
        if word == "${env}":
            words.append("/usr/bin/env")
        elif word.startswith("${"):
            words += arguments[word[2:-1]]
        else:
            words.append(word)
    return words


def test_there_is_one_of_each_method():
    assert {s["method"] for s in SWEEPS.values()} == {"grid", "random", "bayes"}
    assert set(SWEEPS) == {"core_variants", "core_k_bonus", "lr", "torl_budget"}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_has_the_keys_that_wandb_knows(name: str):
    sweep = SWEEPS[name]
    assert set(sweep) <= KEYS and {"program", "method", "metric", "parameters", "command"} <= set(sweep)
    assert sweep["program"] == "core-torl-train" and sweep["metric"]["goal"] in ("maximize", "minimize")
    for parameter in sweep["parameters"].values():
        kinds = [set(parameter) == {"value"}, set(parameter) == {"values"}]
        continuous = parameter.get("distribution") in ("uniform", "log_uniform_values")
        kinds.append(continuous and set(parameter) == {"distribution", "min", "max"})
        assert sum(kinds) == 1, parameter
        if continuous:
            assert sweep["method"] != "grid" and parameter["min"] < parameter["max"]
            assert parameter["distribution"] == "uniform" or parameter["min"] > 0
    # Without an end of its own such a sweep would go on for ever.
    assert ("run_cap" in sweep) == (sweep["method"] != "grid")
    if "early_terminate" in sweep:
        assert sweep["early_terminate"]["type"] == "hyperband" and sweep["early_terminate"]["min_iter"] >= 1


@pytest.mark.parametrize("name", SWEEPS)
def test_the_metric_is_one_that_its_runs_log(name: str):
    sweep = SWEEPS[name]
    metric = sweep["metric"]["name"]
    assert find(metric) is not None
    _, _, decoding, measure = metric.split("/")
    cfg = composed("train", *command_of(sweep, runs(sweep)[0])[2:])
    assert cfg.evaluation.greedy if decoding == "greedy" else cfg.evaluation.samples > 0
    assert measure != "robust_accuracy" or cfg.evaluation.permutations > 0
    assert cfg.data._target_.endswith(".CalculationWorld") == metric.startswith("eval/two_stage/")
    if "early_terminate" in sweep:  # it counts how often the metric was logged, the first time before training
        assert 1 + cfg.rl_steps // cfg.evaluate_every > sweep["early_terminate"]["min_iter"]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_of_a_sweep_composes_to_the_values_of_the_sweep(name: str):
    """Each value in a run at least once. A grid is that of a sweep, which composes them all: here some and its ends."""
    sweep, seen, count = SWEEPS[name], set(), 0
    every = runs(sweep)
    for number, run in enumerate(every):
        new = {(k, v) for k, v in run.items() if k != "seed"} - seen
        rare = {(k, v) for k, v in new if k not in GROUPS}
        if not rare and number not in (0, len(every) - 1) and (not new or number % 5):
            continue
        seen |= new
        count += 1
        words = command_of(sweep, run)
        assert words[:2] == ["/usr/bin/env", "core-torl-train"] and not any("${" in word for word in words)
        cfg = composed("train", *words[2:])
        check_train(cfg)
        assert cfg.logger.mode == "online" and (cfg.logger.group, cfg.logger.job_type) == (name, "sweep")
        for key, value in run.items():
            if key in GROUPS:
                continue
            # What is written as text, "null" or "true", must arrive as what it means.
            assert OmegaConf.select(cfg, key) == yaml.safe_load(str(value)) or value == OmegaConf.select(cfg, key), key
    assert count > 1


@pytest.mark.parametrize("name", [n for n, s in SWEEPS.items() if s["method"] == "grid"])
def test_a_grid_is_that_of_the_sweep_of_the_same_name(name: str):
    wanted = jobs(ROOT / f"sweeps/{name}.yaml")
    found = [[f"{key}={value}" for key, value in run.items()] for run in runs(SWEEPS[name])]
    assert sorted(map(sorted, found)) == sorted(map(sorted, wanted))


@pytest.mark.parametrize("name", SWEEPS)
def test_no_value_is_one_that_python_would_spell_differently(name: str):
    """None and True reach the command line as Python writes them: for Hydra the first is a text."""
    for run in runs(SWEEPS[name]):
        assert all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in run.values())


def test_text_for_null_and_true_is_really_among_them():
    texts = {v for s in SWEEPS.values() for run in runs(s) for v in run.values() if isinstance(v, str)}
    assert {"null", "true", "false"} <= texts


@pytest.mark.parametrize("name", SWEEPS)
def test_parameters_are_leaves_of_the_config_or_choices_of_a_group(name: str):
    """A parameter that is called like a branch of what is logged would lock that branch as a whole."""
    sweep = SWEEPS[name]
    tree: Any = OmegaConf.to_container(composed("train", *command_of(sweep, runs(sweep)[0])[2:]), resolve=True)
    leaves = flatten(tree)
    for parameter in sweep["parameters"]:
        assert parameter in leaves or parameter in GROUPS, parameter
        assert not (parameter in GROUPS and parameter in leaves)


def test_a_real_run_of_an_agent_keeps_its_whole_config(tmp_path: Path):
    """W&B locks a sweep's parameters. `variant` as a choice of a group must not hide the keys below it."""
    file = tmp_path / "parameters.yaml"
    given = {"variant": "core_cr", "variant.lr": 0.0003, "seed": 3}
    file.write_text(yaml.safe_dump({"wandb_version": 1} | {k: {"value": v} for k, v in given.items()}))
    program = (
        "import json, sys\n"
        "from core_torl.tracking.wandb_run import Tracker\n"
        "tracker = Tracker(dir=sys.argv[1], system_metrics=False)\n"
        "tracker.log_config(json.loads(sys.argv[2]))\n"
        "tracker.log_metrics({'train/rl_step': 1, 'reward/accuracy': 0.5})\n"
        "tracker.finish()\n"
    )
    config = {"seed": 3, "variant": {"_target_": "core_torl.variant.core_cr.CoreCR", "lr": 0.0003, "replaced": 2}}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), json.dumps(config)],
        env={**os.environ, "WANDB_SWEEP_PARAM_PATH": str(file), "WANDB_SWEEP_ID": "abc123"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    logged = read_run(folder).config
    assert {k: logged[k] for k in given} == given
    assert {k: logged[k] for k in flatten(config)} == flatten(config)
