"""What a shell asks for often must answer without torch: help, the composed config, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import run_batch

CONF = Path(__file__).parents[2] / "conf"
DOORS = ("train", "evaluate", "warm_start", "report", "watch")
CASES = [(door, flags) for door in DOORS for flags in (["--help"], ["-h"], ["--cfg", "job"])]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    asked = [*CASES, ("train", ["--cfg", "job", "-p", "variant"]), ("train", ["--info", "defaults-tree"])]
    return run_batch(asked, tmp_path_factory.mktemp("cli"))


def test_none_of_them_imports_torch(answers):
    assert answers["heavy"] == []


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i][0]} {' '.join(CASES[i][1])}")
def test_help_and_config_are_printed(answers, number: int):
    (door, flags), answer = CASES[number], answers["results"][number]
    assert answer["code"] == 0 and answer["err"] == ""
    if flags[0] == "--cfg":
        assert ("group_size: 8" in answer["out"]) == (door == "train")
        # Only what a report is about has no value of its own.
        assert ("???" in answer["out"]) == (door == "report") and answer["out"].count("???") <= 1
    else:
        assert "Configuration groups" in answer["out"]
        for group in ("ablation", "augmentation", "intervention", "trigger", "variant"):
            options = ", ".join(sorted(p.stem for p in (CONF / group).glob("*.yaml")))
            assert f"\n{group}: {options}\n" in answer["out"]


def test_a_part_of_the_config_and_the_tree_of_defaults(answers):
    part, tree = answers["results"][-2:]
    assert part["code"] == 0 and "minibatch_size: null" in part["out"] and "group_size" not in part["out"]
    assert tree["code"] == 0 and "variant: core_base" in tree["out"]


@pytest.mark.slow
def test_the_installed_command_is_the_same_door(tmp_path: Path):
    command = Path(sys.executable).with_name("core-torl-train")
    if not command.exists():
        pytest.skip("core-torl is not installed into this interpreter")
    env = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [command, "variant=core_bse"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "core-torl: variant=core_bse: no such option. Did you mean 'core_base'? Available: " + (
        ", ".join(sorted(p.stem for p in (CONF / "variant").glob("*.yaml"))) + "\n"
    )
    assert not any(tmp_path.iterdir()), "nothing is written for a config that does not compose"
