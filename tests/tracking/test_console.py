"""What the terminal shows: every number of the table, every leaf of the config."""

import io
import subprocess
import sys
from dataclasses import dataclass

from rich.console import Console

from core_torl.tracking.console import print_config_tree, results_table


@dataclass(frozen=True)
class Measured:
    value: float
    low: float
    high: float
    n: int = 250


def shown(thing) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(thing)
    return console.file.getvalue()


def test_the_table_shows_every_number():
    table = results_table(
        {"math/standard/accuracy": Measured(0.41, 0.352, 0.479)},
        {"math/standard/accuracy": Measured(0.533, 0.47, 0.6), "new/robust/consistency": Measured(0.1, 0.05, 0.2, 40)},
        {"math/standard/accuracy": Measured(0.123, 0.04, 0.2)},
    )
    lines = shown(table).splitlines()
    (line,) = [x for x in lines if "standard/accuracy" in x]
    cells = [c.strip() for c in line.strip("│ ").split("│")]
    assert cells == [
        "math",
        "standard/accuracy",
        "250",
        "41.0 [35.2, 47.9]",
        "53.3 [47.0, 60.0]",
        "+12.3 [+4.0, +20.0]",
    ]
    (line,) = [x for x in lines if "robust/consistency" in x]
    assert [c.strip() for c in line.strip("│ ").split("│")][2:] == ["40", "–", "10.0 [5.0, 20.0]", "–"]


def test_the_config_tree_shows_every_leaf_as_it_is():
    console = Console(file=io.StringIO(), width=80)
    print_config_tree(
        {"trainer": {"devices": [0, 1], "opt": {"lr": 1e-05}}, "seed": 3, "empty": {}, "tag": "[red]"}, console
    )
    text = console.file.getvalue()
    for part in ("trainer", "devices: [0, 1]", "lr: 1e-05", "seed: 3", "empty: {}", "tag: [red]"):
        assert part in text


def test_a_front_door_gets_it_without_torch():
    heavy = {"torch", "pytorch_lightning", "wandb", "matplotlib"}
    code = f"import sys, core_torl.tracking.console; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
