"""``+reproduce=RUN`` spells out a command line that gives the run's own config again, whatever the files say now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from core_torl.config.errors import UserError
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register
from core_torl.launch.identity import identity
from core_torl.launch.reproduce import replayed
from core_torl.runs.account import compared, comparison_line

ROOT = Path(__file__).parents[2]


def composed(*overrides: str) -> Any:
    register()
    with initialize_config_dir(conf_dir(), version_base=None):
        return compose("train", ["paths.output_dir=somewhere", *overrides])


def run(folder: Path, *overrides: str, changes: dict[str, Any] | None = None, **provenance: Any) -> Any:
    """A run folder with the record of a run of ``overrides``; ``changes``: what the shipped files said then."""
    cfg = composed(*overrides)
    for key, value in (changes or {}).items():
        OmegaConf.update(cfg, key, value, force_add=True)
    said = {
        "app": "train", "state": "completed", "identity": identity(cfg), "overrides": list(overrides),
        "config": OmegaConf.to_container(cfg, resolve=True), "attempts": [{}],
        "provenance": {"config_name": "train", "config_dirs": [], "commit": "c" * 40, "version": "0.1.0"} | provenance,
    }  # fmt: skip
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(said))
    return cfg


def spelled(words: list[str]) -> Any:
    """The config that the words give, Hydra's own options aside."""
    return composed(*(w for w in words if "=" in w and not w.startswith(("-", "hydra."))))


def test_without_it_nothing_changes():
    assert replayed(["-m", "seed=0,1"], "train") == ["-m", "seed=0,1"]


def test_the_config_is_that_of_the_run(tmp_path: Path):
    cfg = run(tmp_path / "r", "variant=core_cr", "variant.lr=2e-3", "experiment=core/cr", "resume=auto")
    words = replayed([f"+reproduce={tmp_path / 'r'}", "hydra.run.dir=again"], "train")
    assert words[:2] == ["--config-name", "train"] and words[-2:] == ["hydra.mode=RUN", "hydra.run.dir=again"]
    assert "variant=core_cr" in words and "resume=auto" not in words
    again = spelled(words)
    assert identity(again) == identity(cfg) and again.reproduces == str((tmp_path / "r").resolve())


def test_what_the_files_have_come_to_say_since_is_set_back(tmp_path: Path):
    then = {"variant.lr": 0.123, "evaluation.permutations": 2, "variant.betas": [0.5, 0.6], "token_budget": 77,
            "data.path": None, "model.prompt.template": "it's {question}, \"so\" \\ it goes"}  # fmt: skip
    then = {k: v for k, v in then.items() if OmegaConf.select(composed(), k) is not None or k == "token_budget"}
    cfg = run(tmp_path / "r", "variant=core_cr", changes=then)
    words = replayed([f"+reproduce={tmp_path / 'r'}"], "train")
    again = spelled(words)
    assert again.variant.lr == 0.123 and again.token_budget == 77
    assert identity(again) == identity(cfg) != identity(composed("variant=core_cr"))


def test_overrides_beside_it_win(tmp_path: Path):
    run(tmp_path / "r", "variant=core_cr", "seed=3", changes={"variant.lr": 0.5})
    again = spelled(replayed([f"+reproduce={tmp_path / 'r'}", "seed=4", "variant.lr=0.25"], "train"))
    assert (again.seed, again.variant.lr) == (4, 0.25)
    # Another option brings its own values.
    again = spelled(replayed([f"+reproduce={tmp_path / 'r'}", "variant=core_kl"], "train"))
    assert again.variant == composed("variant=core_kl").variant


def test_keys_that_are_taken_from_others_follow_them(tmp_path: Path):
    run(tmp_path / "r", "experiment=torl/world", "variant.tool_call_budget=0", "sampler.temperature=0.8")
    again = spelled(
        replayed([f"+reproduce={tmp_path / 'r'}", "variant.tool_call_budget=2", "sampler.temperature=0.6"], "train")
    )
    assert (again.variant.tool_call_budget, again.tool.call_budget) == (2, 2)
    assert again.evaluation.temperature == again.sampler.temperature == 0.6
    # One that the run had set by itself stays set.
    run(tmp_path / "s", "experiment=torl/world", changes={"evaluation.temperature": 0.3})
    assert spelled(replayed([f"+reproduce={tmp_path / 's'}"], "train")).evaluation.temperature == 0.3


def test_a_run_of_a_sweep_file_brings_its_folder(tmp_path: Path):
    run(tmp_path / "r", "seed=1", config_name="smoke", config_dirs=[str(ROOT / "sweeps")])
    words = replayed([f"+reproduce={tmp_path / 'r'}"], "train")
    assert words[:4] == ["--config-dir", str(ROOT / "sweeps"), "--config-name", "smoke"]
    assert "rl_steps=120" in words  # the run had the default, the sweep's file says 3


@pytest.mark.parametrize(
    ("prepare", "arguments", "app", "says"),
    [
        (None, ["+reproduce={r}"], "train", "no run.json of core-torl-train there"),
        ({}, ["+reproduce={r}", "reproduce={r}"], "train", "stands there 2 times"),
        ({}, ["+reproduce={r}", "-m", "seed=0,1"], "train", "leave -m out"),
        ({}, ["+reproduce={r}"], "evaluate", "only core-torl-train repeats runs"),
        ({"config_dirs": ["/nowhere"]}, ["+reproduce={r}"], "train", "config folder /nowhere is not there"),
        ({"changes": {"variant.gone": 1}}, ["+reproduce={r}"], "train",
         "there is no key variant.gone any more; check out commit cccccccccccc"),
        ({"changes": {"variant.gone": 1}, "commit": None}, ["+reproduce={r}"], "train", "install version 0.1.0"),
    ],
)  # fmt: skip
def test_mistakes_read_as_one_line(tmp_path: Path, prepare, arguments, app, says):
    if prepare is not None:
        run(tmp_path / "r", "variant=core_cr", **prepare)
    with pytest.raises(UserError) as error:
        replayed([a.format(r=tmp_path / "r") for a in arguments], app)
    assert says in str(error.value) and "\n" not in str(error.value)


# ---- the comparison at the end -----------------------------------------------------------------------------------


class Value:
    def __init__(self, value: float) -> None:
        self.value = value


FIRST = {
    "after": {"gap/greedy/accuracy": {"value": 0.5}},
    "last": {"loss/policy": 0.25, "time/step_s": 1.0, "rollout/tokens_per_s": 9.0, "x": float("nan")},
    "provenance": {"commit": "a", "packages": {"torch": "1"}, "data": {"train": {"sha256": "h"}}},
}  # fmt: skip


def test_equal_numbers_are_counted_and_clocks_left_out():
    last = {"loss/policy": 0.25, "time/step_s": 5.0, "rollout/tokens_per_s": 1.0, "x": float("nan")}
    found = compared(FIRST, {"gap/greedy/accuracy": Value(0.5)}, last, FIRST["provenance"], "runs/a")
    assert found == {"folder": "runs/a", "equal": 3, "differ": {}, "other": {}}
    assert comparison_line(found) == "Repeats runs/a: all 3 numbers are equal"


def test_what_differs_is_named_with_the_circumstances():
    last = {"loss/policy": 0.5, "more": 1.0}
    other = {"commit": "b", "packages": {"torch": "2"}, "data": {"train": {"sha256": "i"}}}
    found = compared(FIRST, {"gap/greedy/accuracy": Value(0.5)}, last, other, "runs/a")
    assert set(found["differ"]) == {"last/loss/policy", "last/more", "last/x"} and found["equal"] == 1
    line = comparison_line(found)
    assert line.startswith("Does NOT repeat runs/a: 3 of 4 numbers differ: last/loss/policy was 0.25 and is 0.5")
    assert "commit a -> b" in line and "torch 1 -> 2" in line and "data train" in line
