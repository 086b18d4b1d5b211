"""Coached variants in real processes: bit for bit after a kill, and the same on two ranks as on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core_torl.variant.checkpoint import RLCheckpoint, newest

from .conftest import same, weights
from .worker import module_of, train


def start(case: str, folder: Path, ranks: int = 1, kill_at: int = -1) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.variant.worker", case, str(folder), str(ranks), str(kill_at)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240,
        # As many threads as here: sums of another order are other sums.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", ["core_cr", "core_kl_old", "core_kl_reference", "core_hybrid"])
def test_a_run_killed_and_resumed_equals_one_that_was_not(tmp_path, case):
    done = start(case, tmp_path, kill_at=3)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert newest(tmp_path).name == "step-000002.ckpt"
    resumed, undisturbed = train(module_of(case, 5), ckpt=newest(tmp_path)), train(module_of(case, 5))
    assert resumed.rl_step == undisturbed.rl_step == 5
    assert same(weights(resumed), weights(undisturbed)) and resumed.tokens_seen == undisturbed.tokens_seen
    assert resumed.last_metrics["core/trigger_rate"] > 0, "the last step was coached"
    adam = [m.optimizers().optimizer.state_dict()["state"] for m in (undisturbed, resumed)]
    for key, state in adam[0].items():
        assert all(torch.equal(torch.as_tensor(state[n]), torch.as_tensor(adam[1][key][n])) for n in state)


def test_a_reference_teacher_made_of_the_resumed_weights_would_show(tmp_path):
    """The control of the test above: the teacher has to be the starting policy, not that of the checkpoint."""
    undisturbed = train(module_of("core_kl_reference", 4), callbacks=[RLCheckpoint(tmp_path, 2, 3)])
    for right in (True, False):
        resumed = module_of("core_kl_reference", 4)
        load = resumed.load_state_dict

        def wrong(state, *rest, module=resumed, load=load, **settings):
            load(state, *rest, **settings)
            object.__setattr__(module, "_shadow", module.policy.shadow())

        resumed.load_state_dict = load if right else wrong
        train(resumed, ckpt=tmp_path / "step-000002.ckpt")
        assert same(weights(resumed), weights(undisturbed)) is right


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("case", ["core_cr", "core_kl_current"])
def test_two_ranks_end_with_the_weights_and_the_metrics_of_one(tmp_path, case):
    done = start(case, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(tmp_path / "2.pt", weights_only=True)
    one = train(module_of(case, 3))
    assert done.stderr.count("GLOBAL_RANK") == 2
    for name, tensor in weights(one).items():
        assert (tensor - two["weights"][name]).abs().max() < 2e-5, name
    names = [n for n in one.last_metrics if not n.startswith(("time/", "rollout/"))]
    assert names and set(names) <= two["metrics"].keys() and any(n.startswith("core/") for n in names)
    for name in names:
        assert two["metrics"][name] == pytest.approx(one.last_metrics[name], abs=1e-4, rel=1e-3), name
