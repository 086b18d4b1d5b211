"""Every shipped YAML file composes, alone and as an option of its group, and every key in it says what it means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from core_torl.config.checks import check_evaluate, check_train, check_warm_start
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
FILES = sorted(p.relative_to(CONF) for p in CONF.rglob("*.yaml"))
OPTIONS = [(str(f.parent), f.stem) for f in FILES if f.parent != Path() and f.parts[0] != "local"]
# Groups whose files change keys of any group.
GLOBAL = ("ablation", "debug", "experiment")
# Values that only the user can give.
MANDATORY = {("data", "core_quizzes"): ["data.path=quizzes.jsonl"], ("model", "hf"): ["model.path=some/model"]}
CHECKS = {"train": check_train, "evaluate": check_evaluate, "warm_start": check_warm_start}


def composed(name: str, *overrides: str, folder: Path = CONF) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base=None):
        cfg = compose(name, overrides=["paths.output_dir=somewhere", *overrides])
    return cfg


def test_a_checkout_uses_the_files_beside_its_source():
    assert conf_dir() == str(CONF)


@pytest.mark.parametrize("name", CHECKS)
def test_a_front_door_composes_and_passes_its_checks_as_shipped(name: str):
    CHECKS[name](composed(name))


def test_every_file_at_the_top_belongs_to_a_front_door():
    assert {f.stem for f in FILES if f.parent == Path()} == set(CHECKS)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda x: str(x))
def test_an_option_composes_and_passes_the_checks(group: str, option: str):
    cfg = composed("train", f"{group}={option}", *MANDATORY.get((group, option), []))
    check_train(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    # An evaluation runs in one process and says so: see test_checks.py.
    if group in ("reward", "sampler", "model", "data", "evaluation", "trainer", "logger", "paths") and option != "ddp":
        check_evaluate(composed("evaluate", f"{group}={option}", *MANDATORY.get((group, option), [])))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_global_files_say_so_and_others_do_not(file: Path):
    lines = (CONF / file).read_text().splitlines()
    assert (lines[0] == "# @package _global_") == (file.parts[0] in GLOBAL)
    described = lines[1] if file.parts[0] in GLOBAL else lines[0]
    assert re.match(r"# \w", described), "a file opens with a comment that says what it is"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_key_has_a_comment_above_it(file: Path):
    """Except ``defaults``, ``_target_`` and headings, whose keys have comments of their own."""
    lines = (CONF / file).read_text().splitlines()
    bare, in_defaults = [], False
    for number, line in enumerate(lines):
        found = re.match(r"( *)([\w.]+):(\s.*|)$", line)
        if not found:
            continue
        indent, key, value = found[1], found[2], found[3].strip()
        in_defaults = key == "defaults" or (in_defaults and bool(indent))
        following = next((x for x in lines[number + 1 :] if x.strip() and not x.lstrip().startswith("#")), "")
        heading = not value and following.startswith(indent + "  ")
        above = lines[number - 1].strip() if number else ""
        commented = above.startswith("#") and not above.startswith("# @")
        if not in_defaults and key != "_target_" and not heading and not commented:
            bare.append(f"{file}:{number + 1} {key}")
    assert not bare


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] in GLOBAL], ids=str)
def test_a_global_file_only_overrides_keys_that_exist(file: Path):
    """A file for the whole config could add keys that nothing reads; each of its keys must be in the plain config."""
    raw = OmegaConf.to_container(OmegaConf.load(CONF / file)) or {}
    assert isinstance(raw, dict)
    changed = [str(d) for d in raw.pop("defaults", []) if isinstance(d, str)]
    assert "_self_" not in changed, "what a file says comes after its defaults anyway"
    cfg = composed("train", f"{file.parts[0]}={file.stem}")

    def missing(node: dict, path: str) -> list[str]:
        found = []
        for key, value in node.items():
            at = f"{path}{key}"
            if OmegaConf.select(cfg, at, throw_on_missing=False, default="absent") == "absent":
                found.append(at)
            elif isinstance(value, dict):
                found += missing(value, f"{at}.")
        return found

    assert not missing({str(k): v for k, v in raw.items()}, "")


def test_every_sweep_composes():
    for path in sorted((ROOT / "sweeps").glob("*.yaml")):
        check_train(composed(path.stem, f"hydra.searchpath=[file://{CONF}]", folder=path.parent))


def test_the_order_of_overrides_is_experiment_then_debug():
    """An experiment changes groups' values, and a debug option changes those of an experiment."""
    plain, demo = composed("train"), composed("train", "experiment=demo")
    assert plain.rl_steps != demo.rl_steps and demo.logger.group == "demo"
    limited = composed("train", "experiment=demo", "debug=limit")
    assert limited.rl_steps < demo.rl_steps and limited.logger.group == "demo"
    assert composed("train", "experiment=demo", "debug=limit", "rl_steps=7").rl_steps == 7


def test_types_come_from_the_schema():
    cfg = composed("train", "variant.lr=1", "variant.minibatch_size=null")
    assert cfg.variant.lr == 1.0 and isinstance(cfg.variant.lr, float)
    assert cfg.variant.minibatch_size is None
    assert cfg.sampler.max_new_tokens == cfg.model.max_new_tokens
