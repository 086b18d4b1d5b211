"""Every file of sweeps/ says what it is, what it costs and how it is run, and each of its jobs is a sound run of its own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from core_torl.config.checks import check_report
from core_torl.config.schema import register
from tests.config.conftest import keys_without_comment
from tests.config.test_compose import CHECKS, CONF, ROOT, composed

FILES = sorted((ROOT / "sweeps").rglob("*.yaml"))
SWEEPS = [p for p in FILES if p.parent.name == "sweeps"]
# Sweeps whose values Optuna proposes: composed where its plugin is installed.
SEARCHES = ("lr",)
# The tables and figures of both papers, and ours.
EXPECTED = {
    "core_variants", "core_gap", "core_updates", "core_ablations", "core_k_bonus", "core_lambda", "distractors",
    "torl_budget", "torl_penalty", "gap_policies", "seeds", "lr", "demo", "smoke",
}  # fmt: skip


def raw(path: Path) -> dict[str, Any]:
    found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def door(path: Path) -> str:
    return raw(path)["defaults"][0]


def header(path: Path) -> str:
    """The comment that a file opens with, as one text; a backslash goes on with the next line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines).replace("\\\n", "")


def arguments(path: Path) -> list[str]:
    return [f"{key}={value}" for key, value in raw(path)["hydra"]["sweeper"]["params"].items()]


def jobs(path: Path) -> list[list[str]]:
    """The overrides of each job, as Hydra makes them; of a search, draws from its space and the space's ends."""
    parsed = OverridesParser.create().parse_overrides(arguments(path))
    if path.stem not in SEARCHES:
        return BasicSweeper.split_arguments(parsed, None)[0]
    plugin = pytest.importorskip("hydra_plugins.hydra_optuna_sweeper._impl", reason="needs core-torl[sweeps]")
    import optuna

    space, fixed = plugin.create_params_from_overrides(arguments(path))
    assert not fixed
    trials = [optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=i)).ask(space).params for i in range(3)]
    ends = [{name: getattr(d, end) for name, d in space.items()} for end in ("low", "high")]
    return [[f"{name}={value}" for name, value in trial.items()] for trial in [*trials, *ends]]


def compose_sweep(path: Path, *overrides: str) -> DictConfig:
    """The sweep as a primary config, Hydra's own part included."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(path.parent), version_base=None):
        return compose(path.stem, [f"hydra.searchpath=[file://{CONF}]", *overrides], return_hydra_config=True)


def test_there_is_a_file_for_every_table_and_figure():
    assert {p.stem for p in SWEEPS} == EXPECTED


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_is_a_primary_config_with_a_folder_a_group_and_a_launcher_of_its_own(path: Path):
    if path.stem in SEARCHES:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs core-torl[sweeps]")
    cfg = compose_sweep(path)
    assert cfg.hydra.mode.name == "MULTIRUN"
    # Fixed, so that the same command again finds what is done.
    assert cfg.hydra.sweep.dir == f"outputs/{path.stem}"
    assert cfg.hydra.launcher._target_.endswith(".SubprocessLauncher")
    if door(path) == "train":
        assert (cfg.logger.group, cfg.logger.job_type) == (path.stem, "sweep")
    # Two jobs in one folder would be one run: a folder is a number, or names all that is swept.
    subdir = raw(path)["hydra"]["sweep"]["subdir"]
    swept = raw(path)["hydra"]["sweeper"]["params"]
    assert subdir == "${hydra.job.num}" or all(
        f"${{{key}}}" in subdir or f"${{hydra.runtime.choices.{key}}}" in subdir for key in swept
    )


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_job_of_a_sweep_composes_and_passes_the_checks(path: Path):
    """Each value but a seed in a job at least once, and the first and the last job; all of them would take minutes."""
    every, seen, chosen = jobs(path), set(), []
    for number, job in enumerate(every):
        values = {override for override in job if not override.startswith("seed=")}
        if number in (0, len(every) - 1) or not seen >= values:
            chosen.append(job)
            seen |= values
    trees = set()
    for job in chosen:
        cfg = composed(path.stem, f"hydra.searchpath=[file://{CONF}]", *job, folder=path.parent)
        CHECKS[door(path)](cfg)
        trees.add(OmegaConf.to_yaml(cfg))
        for override in job:
            key, _, value = override.partition("=")
            if key not in ("experiment", "variant"):
                assert str(OmegaConf.select(cfg, key)) == str(value), override
    assert len(trees) == len(chosen), "two options with different names are the same run"


@pytest.mark.parametrize("path", [p for p in SWEEPS if p.stem not in SEARCHES], ids=lambda p: p.stem)
def test_no_two_jobs_are_the_same_and_their_number_is_that_of_the_header(path: Path):
    every = jobs(path)
    assert len({tuple(sorted(job)) for job in every}) == len(every)
    said = re.search(r"^(\d+) jobs\b", header(path), re.M)
    assert said and int(said[1]) == len(every)


def test_a_search_says_how_many_trials_one_command_makes():
    path = ROOT / "sweeps/lr.yaml"
    sweeper = raw(path)["hydra"]["sweeper"]
    assert re.search(rf"^{sweeper['n_trials']} jobs\b", header(path), re.M)
    # What else would make the same command go on with the study.
    assert sweeper["storage"] == "sqlite:///${hydra.sweep.dir}/study.db" and sweeper["study_name"]
    assert sweeper["direction"] == "maximize" and isinstance(sweeper["sampler"]["seed"], int)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_the_header_has_the_command_and_a_report_that_composes(path: Path):
    text = header(path)
    command = {"train": "core-torl-train", "warm_start": "core-torl-warm-start"}[door(path)]
    assert f"{command} -cd sweeps -cn {path.stem}" in text.replace("\n", " ")
    report = re.search(r"core-torl-report (.*)", text)
    if door(path) != "train":
        assert report is None
        return
    assert report
    words = shlex.split(report[1])
    assert words[0].split("=")[1].split("/")[:2] == ["outputs", path.stem]
    cfg = composed("report", *words)
    check_report(cfg)
    swept = set(raw(path)["hydra"]["sweeper"]["params"]) - {"seed"}
    fixed = words[0].count("/") > 1  # a part of the sweep: what its folder names is the same in all of it
    assert cfg.by is None or swept <= set(cfg.by) or fixed, "cells that differ in what is not in `by` are refused"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_key_has_a_comment_above_it(path: Path):
    assert keys_without_comment(path) == []


def test_without_optuna_a_search_is_refused_in_one_line_that_says_what_to_install(tmp_path: Path):
    """The plugin is hidden from Hydra's search for plugins, as if it were not installed."""
    program = (
        "import pkgutil, sys\n"
        "every = pkgutil.walk_packages\n"
        "pkgutil.walk_packages = lambda *a, **k: (m for m in every(*a, **k) if 'optuna' not in m.name)\n"
        f"sys.argv = ['core-torl-train', '-cd', {str(ROOT / 'sweeps')!r}, '-cn', 'lr']\n"
        "from core_torl.train import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install 'core-torl[sweeps]'" in done.stderr
