"""Checkpoints: whole or absent, bit for bit after a kill, refused under another configuration, kept on Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from core_torl.config.errors import UserError
from core_torl.variant.checkpoint import RLCheckpoint, check_fingerprint, found, newest, read, resolve

from .conftest import fit, same, weights

# A real process that trains; it is killed from inside at a chosen moment of a chosen step.
WORKER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import pytorch_lightning as pl, torch
from tests.variant.conftest import TEMPLATE, Evenness, fit, make_policy
from core_torl.data.concept_world.source import ConceptWorld
from core_torl.objective.grpo import GRPO
from core_torl.sampler.transformers import TransformersSampler
from core_torl.variant.checkpoint import RLCheckpoint, newest
from core_torl.variant.core_base import CoreBase

folder, steps, kill_at, when, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])

class Killed(CoreBase):
    def weigh(self, groups):
        if self.rl_step == kill_at and when == "before_update":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.rl_step == kill_at and when == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return super().weigh(groups)
    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        if self.rl_step == kill_at and when == "after_step":
            os.kill(os.getpid(), signal.SIGKILL)

problems = ConceptWorld(train_per_concept=2, test_per_concept=1).load().train[:20]
policy = make_policy(problems)
module = Killed(
    policy=policy, sampler=TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=6), reward_function=Evenness(),
    objective=GRPO(kl_coef=0.01), problems=problems, encode=lambda p, c: TEMPLATE.encode(policy.tokenizer, p, c), rl_steps=steps,
    group_size=4, prompts_per_step=4, seed=0, temperature=1.0, fingerprint={{"a": 1}}, lr=1e-2, minibatch_size=8,
)
saver = RLCheckpoint(folder, every, 3)
fit(module, [saver], newest(folder))
optimizer = module.optimizers().optimizer.state_dict()["state"]
torch.save({{"weights": module.model.state_dict(), "adam": optimizer, "step": module.rl_step, "tokens": module.tokens_seen,
             "interrupted": saver.interrupted,
             "samples": [t.token_ids for g in module.last_groups for t in g.trajectories]}}, folder / "end.pt")
"""


def run(folder: Path, steps: int, kill_at: int = -1, when: str = "never", every: int = 2) -> int:
    folder.mkdir(exist_ok=True)
    code = WORKER.format(root=str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), str(steps), str(kill_at), when, str(every)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, env=environment, timeout=240).returncode


def end(folder: Path) -> dict:
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder, 7) == 0
    return end(folder)


# 20 problems, 4 a step: step 5 ends the first pass over the data, so a kill there tests the boundary.
@pytest.mark.slow
@pytest.mark.parametrize(("kill_at", "when"), [(3, "before_update"), (5, "after_step")])
def test_a_run_killed_and_resumed_equals_one_that_was_not(tmp_path, undisturbed, kill_at, when):
    assert run(tmp_path, 7, kill_at, when) == -signal.SIGKILL
    assert newest(tmp_path) is not None and not (tmp_path / "end.pt").exists()
    assert run(tmp_path, 7) == 0
    resumed = end(tmp_path)
    assert resumed["step"] == undisturbed["step"] == 7
    assert same(resumed["weights"], undisturbed["weights"])
    assert resumed["samples"] == undisturbed["samples"] and resumed["tokens"] == undisturbed["tokens"]
    for key, state in undisturbed["adam"].items():
        assert all(torch.equal(torch.as_tensor(state[n]), torch.as_tensor(resumed["adam"][key][n])) for n in state)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_saves_and_the_run_goes_on_from_there(tmp_path, undisturbed):
    # The signal comes while step 4 is under way (three are done); that step is finished and saved.
    assert run(tmp_path, 7, kill_at=3, when="interrupt", every=100) == 0
    assert end(tmp_path)["interrupted"] and found(tmp_path).keys() == {4}
    assert run(tmp_path, 7, every=100) == 0
    assert same(end(tmp_path)["weights"], undisturbed["weights"])


def test_a_finished_run_can_be_made_longer(make, tmp_path):
    """The end of an epoch in Lightning's books must not end training for ever."""
    fit(make(rl_steps=2), [RLCheckpoint(tmp_path, 0, 1)])
    longer = fit(make(rl_steps=4), ckpt=newest(tmp_path))
    assert longer.rl_step == 4
    assert same(weights(longer), weights(fit(make(rl_steps=4))))


def test_only_the_newest_are_kept_and_no_part_file_is_left(make, tmp_path):
    fit(make(rl_steps=4), [RLCheckpoint(tmp_path, 1, 2)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003.ckpt", "step-000004.ckpt"]


def test_a_half_written_file_is_never_taken_for_a_checkpoint(tmp_path):
    (tmp_path / "step-000009.part").write_bytes(b"half")
    assert newest(tmp_path) is None
    (tmp_path / "step-000002.ckpt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read(tmp_path / "step-000002.ckpt")


def test_a_full_disk_names_the_file_and_the_last_whole_checkpoint(make, tmp_path, monkeypatch):
    saver = RLCheckpoint(tmp_path, 1, 2)
    import pytorch_lightning as pl

    real = pl.Trainer.save_checkpoint

    def full(self, path, *args, **kwargs):
        if "step-000002" in str(path):
            Path(path).write_bytes(b"some")
            raise OSError(28, "No space left on device")
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    with pytest.raises(
        UserError, match=r"step-000002\.ckpt .*No space left on device.*last whole one is .*step-000001"
    ):
        fit(make(rl_steps=3), [saver])
    assert found(tmp_path).keys() == {1} and not list(tmp_path.glob("*.part"))


class Dies:
    """A sampler whose engine is gone from its ``at``-th call on, counted from 0."""

    def __init__(self, sampler, at: int) -> None:
        self.sampler, self.left = sampler, at

    def __getattr__(self, name: str):
        return getattr(self.sampler, name)

    def generate(self, *arguments):
        self.left -= 1
        if self.left < 0:
            raise UserError("sampler: no vLLM server is left")
        return self.sampler.generate(*arguments)


def test_a_step_that_fails_before_it_trains_costs_nothing(make, tmp_path):
    """The state after the last whole step is saved, and the run that goes on from there equals an undisturbed one."""
    dies = make(rl_steps=5)
    dies._parts["sampler"] = Dies(dies.sampler, 3)
    with pytest.raises(UserError, match="no vLLM server is left"):
        fit(dies, [RLCheckpoint(tmp_path, 2, 9)])
    assert found(tmp_path).keys() == {2, 3}
    resumed = fit(make(rl_steps=5), ckpt=newest(tmp_path))
    assert resumed.rl_step == 5 and same(weights(resumed), weights(fit(make(rl_steps=5))))


def test_a_step_that_fails_after_it_has_trained_is_not_saved(make, tmp_path, monkeypatch):
    module = make(rl_steps=5)
    train, steps = type(module).learn, []

    def learn(self, batch):
        train(self, batch)
        steps.append(1)
        if len(steps) == 2:
            raise RuntimeError("made by the test")

    monkeypatch.setattr(type(module), "learn", learn)
    with pytest.raises(RuntimeError, match="made by the test"):
        fit(module, [RLCheckpoint(tmp_path, 3, 9)])
    assert not found(tmp_path)


@pytest.mark.parametrize("every", [0, 9])
def test_a_step_whose_weights_cannot_be_handed_over_is_done_and_saved(make, tmp_path, every):
    class Gone(Dies):
        def sync(self, weights, version):
            if version == "2":
                raise UserError("sampler: no vLLM server is left")
            self.sampler.sync(weights, version)

    gone = make(rl_steps=5)
    gone._parts["sampler"] = Gone(gone.sampler, 99)
    with pytest.raises(UserError, match="no vLLM server is left"):
        fit(gone, [RLCheckpoint(tmp_path, every, 9)])
    assert found(tmp_path).keys() == {2} and gone.last_metrics["train/rl_step"] == 2
    resumed = fit(make(rl_steps=5), ckpt=newest(tmp_path))
    assert same(weights(resumed), weights(fit(make(rl_steps=5))))


def test_memory_that_runs_out_before_the_weights_move_costs_nothing(make, tmp_path, monkeypatch):
    module = make(rl_steps=5)
    forward = type(module)._forward

    def full(self, *arguments):
        if self.rl_step == 3:
            raise torch.OutOfMemoryError("made by the test")
        return forward(self, *arguments)

    monkeypatch.setattr(type(module), "_forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        fit(module, [RLCheckpoint(tmp_path, 0, 9)])
    assert found(tmp_path).keys() == {3}
    monkeypatch.undo()
    whole, resumed = fit(make(rl_steps=5)), fit(make(rl_steps=5), ckpt=newest(tmp_path))
    assert same(weights(resumed), weights(whole)) and resumed.tokens_seen == whole.tokens_seen


def test_a_failed_step_and_a_full_disk_are_told_in_that_order(make, tmp_path, monkeypatch, caplog):
    import pytorch_lightning as pl

    def full(self, path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    dies = make(rl_steps=5)
    dies._parts["sampler"] = Dies(dies.sampler, 1)
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    with pytest.raises(UserError, match="no vLLM server is left"):
        fit(dies, [RLCheckpoint(tmp_path, 0, 9)])
    assert "No space left on device" in caplog.text and not list(tmp_path.iterdir())


def test_resume_is_resolved_or_refused_with_a_reason(tmp_path):
    assert resolve(None, tmp_path) is None and resolve("auto", tmp_path) is None
    with pytest.raises(UserError, match=r"resume=.*no step-\*\.ckpt there"):
        resolve(str(tmp_path), tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (2, 10):
        (folder / f"step-{step:06d}.ckpt").touch()
    assert resolve("auto", tmp_path) == resolve(str(tmp_path), Path("x")) == folder / "step-000010.ckpt"


def test_another_configuration_is_named_key_by_key():
    check_fingerprint(Path("c"), {"a": 1}, {"a": 1})
    with pytest.raises(
        UserError, match=r"another configuration: a was 1 and is 2, b was None and is 3; repeat those settings"
    ):
        check_fingerprint(Path("c"), {"a": 1}, {"a": 2, "b": 3})
