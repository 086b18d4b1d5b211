"""What is newly solved, from step to step and over a resume; and that a real loop hands over what the tables need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from core_torl.problem import Problem
from core_torl.runs.callbacks import RolloutTables, origin, solves
from core_torl.trajectory import Group, Sample, Score, Trajectory
from core_torl.variant.policy_gradient import PolicyGradient


class Tracker:
    def __init__(self) -> None:
        self.logged: dict[int, dict] = {}

    def log_rollouts(self, step, tables) -> None:
        self.logged[step] = tables


class Module(PolicyGradient):
    """Nothing but what the callback reads."""

    def __init__(self, uids: str) -> None:
        self.__dict__.update(problems=[Problem(u, "?", "1") for u in uids], rl_step=0, last_sampled=[])
        self.__dict__.update(rl_steps=100, token_budget=None)


def group(uid: str, *right: bool | None) -> Group:
    scores = [Score(None if r is None else float(r), bool(r), "x") for r in right]
    return Group(Problem(uid, "?", "1"), [Trajectory(Problem(uid, "?", "1"), (1,), Sample((5,), (0.0,), "eos"), "", (True,), s) for s in scores])  # fmt: skip


def step(callback: RolloutTables, module: Module, *groups: Group) -> list[str]:
    """One RL step; the uids in its table of newly solved problems."""
    module.rl_step += 1
    module.last_sampled = list(groups)
    callback.on_train_start(SimpleNamespace(), module)
    callback.on_train_batch_end(SimpleNamespace(), module, None, None, 0)
    rows = callback.tracker.logged.get(module.rl_step, {}).get("newly_solved", [])
    return [row["problem"].partition("]")[0][1:] for row in rows]


def test_newly_solved_are_those_that_were_all_wrong_each_time_before():
    callback, module = RolloutTables(Tracker(), 1, 8), Module("abcd")
    assert step(callback, module, group("a", False, False), group("b", True), group("c", None)) == []
    assert step(callback, module, group("a", False), group("b", False), group("c", True)) == []  # c: never seen wrong
    assert step(callback, module, group("a", None, True), group("b", True), group("d", False)) == ["a"]
    assert step(callback, module, group("a", False), group("d", None)) == []
    assert step(callback, module, group("a", True), group("d", True)) == ["d"]


def test_steps_between_the_tables_are_followed_too():
    callback, module = RolloutTables(Tracker(), 3, 8), Module("ab")
    steps = [("a", True), ("b", False), ("b", True)]
    assert [step(callback, module, group(uid, right)) for uid, right in steps] == [[], [], ["b"]]
    assert list(callback.tracker.logged) == [1, 3]


@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_run_knows_what_came_before(kept):
    """The control without the state calls a problem newly solved that was solved long ago."""
    first, module = RolloutTables(Tracker(), 1, 8), Module("ab")
    step(first, module, group("a", False), group("b", True))
    second = RolloutTables(Tracker(), 1, 8)
    if kept:
        second.load_state_dict(first.state_dict())
    step(second, module, group("b", False))
    assert step(second, module, group("a", True), group("b", True)) == (["a"] if kept else ["b"])


def test_the_state_can_stand_in_a_checkpoint_that_is_read_without_pickles(tmp_path):
    import torch

    callback, module = RolloutTables(Tracker(), 1, 8), Module("ab")
    step(callback, module, group("a", False), group("b", True))
    torch.save(callback.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True) == {"solved": ["b"], "unsolved": ["a"]}


def test_a_varied_problem_counts_as_the_one_that_it_came_from():
    known = {"q", "x#1"}
    assert [origin(u, known) for u in ("q", "q~5#2130", "x#1#02", "other#1")] == ["q", "q", "x#1", "other#1"]
    callback, module = RolloutTables(Tracker(), 1, 8), Module("a")
    assert step(callback, module, group("a#10", False)) == []
    assert step(callback, module, group("a~7#01", True)) == ["a~7#01"]


def test_a_group_nobody_could_judge_is_neither_solved_nor_unsolved():
    assert [solves(group("a", *r)) for r in ((None, None), (None, False), (False, True))] == [None, False, True]


RANKS = """
import json, sys
sys.path.insert(0, sys.argv[3])
from core_torl.runs.callbacks import RolloutTables
from tests.variant.worker import module_of, train

class Tracker:
    logged = {}
    def log_rollouts(self, step, tables):
        self.logged[step] = tables

folder, ranks = sys.argv[1], int(sys.argv[2])
tables = RolloutTables(Tracker(), 1, 100)
module = train(module_of("core_kl_current", 12, lr=0.0), ranks, [tables])
if module.trainer.is_global_zero:
    with open(f"{folder}/{ranks}.json", "w") as file:
        json.dump([Tracker.logged, tables.state_dict()], file)
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_ranks_show_what_one_would(tmp_path):
    """Nothing is learned, so that the answers are the same; a rank by itself has seen half of what came before."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    for ranks in (1, 2):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), str(ranks), str(Path(__file__).parents[2])],
            capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    (one, state), (two, other) = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert state == other and state["solved"]
    assert one.keys() == two.keys() and any(tables["newly_solved"] for tables in one.values())
    assert any(tables["triggered"] for tables in one.values())
    for step, tables in one.items():
        for kind, rows in tables.items():
            assert sorted(map(json.dumps, rows)) == sorted(map(json.dumps, two[step][kind])), (step, kind)
