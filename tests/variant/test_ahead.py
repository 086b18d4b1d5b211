"""Sampling a step ahead: who answered, against what the ratio is taken, what a checkpoint keeps, what goes wrong."""

from __future__ import annotations

import threading

import pytest
import pytorch_lightning as pl
import torch

from core_torl.sampler.transformers import TransformersSampler
from core_torl.trajectory import Sample, ToolCall
from core_torl.variant.ahead import Ahead
from core_torl.variant.checkpoint import RLCheckpoint
from core_torl.variant.core_base import CoreBase
from core_torl.variant.core_cr import CoreCR

from .conftest import RIGHT, Rule, fit, make_policy, same, watched, weights

TWIN = {"copy_weights": True}


def ids_of(answers) -> list[list[tuple[int, ...]]]:
    return [[s.token_ids for s in samples] for samples in answers]


def noting(kind):
    """``kind`` that keeps every step's answers, batch, metrics and weights (as they were when it began)."""

    class Noting(watched(kind)):
        def __init__(self, **settings):
            self.before, self.metrics = [], []
            super().__init__(**settings)

        def training_step(self, batch, batch_idx):
            self.before.append(weights(self))
            super().training_step(batch, batch_idx)
            self.metrics.append(self.last_metrics)

    return Noting


def test_the_next_step_s_answers_come_from_the_policy_before_this_step_s_update(make, problems):
    module = fit(make(noting(CoreBase), sampling=TWIN, overlap=True))
    assert [m["rollout/staleness"] for m in module.metrics] == [0, 1, 1, 1]
    versions = [{t.sample.weight_version for g in groups for t in g} for groups in module.sampled]
    assert versions == [{"0"}, {"0"}, {"1"}, {"2"}]
    for step in (1, 2, 3):
        policy = make_policy(problems)
        policy.model.load_state_dict(module.before[step - 1])
        twin = make(policy=policy)
        twin.trainer = module.trainer
        expected = twin.answers(twin._problems_of(step), step)
        assert [[t.token_ids for t in g] for g in module.sampled[step]] == ids_of(expected)
    assert module.samples_seen == 4 * 16, "answers count in the step that learns from them"


def test_it_changes_nothing_before_the_second_step_and_something_afterwards(make):
    overlapped, plain = fit(make(noting(CoreBase), sampling=TWIN, overlap=True)), fit(make(noting(CoreBase)))
    assert same(overlapped.before[1], plain.before[1])
    assert not same(overlapped.before[2], plain.before[2])


def test_ratios_are_taken_against_the_policy_that_answered(make):
    module = fit(make(noting(CoreBase), sampling=TWIN, overlap=True))
    first, *later = module.batches
    assert first.old_logprobs is None
    for batch, metrics in zip(later, module.metrics[1:], strict=True):
        mask = batch.train_mask
        assert torch.equal(batch.old_logprobs[mask], batch.sampled_logprobs[mask])
        assert metrics["policy/ratio_max"] > 1.001
        assert metrics["policy/sampler_logprob_gap_max"] > 1e-3
    assert module.metrics[0]["policy/ratio_max"] == pytest.approx(1)


def test_replaced_answers_keep_the_ratio_of_the_prompt_that_is_trained(make):
    """CORE-CR's rows were sampled under another prompt: what that one gave is not the old policy's log-prob here."""
    reward = Rule(lambda t, i: RIGHT)
    module = fit(make(noting(CoreCR), reward=reward, sampling=TWIN, overlap=True, rl_steps=2, behaviour="recompute"))
    batch = module.batches[1]
    rows = batch.foreign
    assert rows.any() and not rows.all()
    mask = batch.train_mask & rows[:, None]
    assert (batch.old_logprobs[mask] - batch.sampled_logprobs[mask]).abs().max() > 1e-2
    assert module.metrics[1]["core/trigger_rate"] == 1


def test_sampling_and_training_go_on_at_the_same_time(make):
    """The next answers are only made while the policy learns; one after the other, they would wait for each other."""
    learning, sampled = threading.Event(), threading.Event()

    class Waiting(TransformersSampler):
        def generate(self, requests, sampling=None):
            if threading.current_thread() is not threading.main_thread():
                assert learning.wait(20)
            found = super().generate(requests, sampling)
            sampled.set()
            return found

    class Learner(CoreBase):
        def learn(self, batch):
            if self.rl_step == 0:
                sampled.clear()
                learning.set()
                assert sampled.wait(20)
            super().learn(batch)

    module = fit(make(Learner, sampler=Waiting, sampling=TWIN, overlap=True, rl_steps=2))
    assert module.rl_step == 2 and module.last_metrics["time/wait_s"] >= 0


def test_a_resumed_run_goes_on_with_the_answers_in_hand(make, tmp_path):
    settings = {"sampling": TWIN, "overlap": True, "rl_steps": 5}
    whole = fit(make(watched(CoreBase), **settings), [RLCheckpoint(tmp_path, 2, 9)])
    resumed = fit(make(watched(CoreBase), **settings), ckpt=tmp_path / "step-000002.ckpt")
    assert same(weights(resumed), weights(whole))
    assert [t.sample.weight_version for t in resumed.sampled[0][0]] == ["1"] * 4, "not those of the policy of now"
    assert resumed.samples_seen == whole.samples_seen and resumed.tokens_seen == whole.tokens_seen


def test_a_step_that_fails_takes_the_answers_in_hand_along(make, tmp_path):
    """Their reward failed: the checkpoint has them, and the run that goes on is the one that was meant."""
    settings = {"sampling": TWIN, "overlap": True, "rl_steps": 4}
    broken = make(**settings)
    score = broken._parts["reward"].score
    calls = iter(range(99))

    def fails(trajectories):
        if next(calls) == 2:
            raise RuntimeError("the grader is gone")
        return score(trajectories)

    broken._parts["reward"].score = fails
    with pytest.raises(RuntimeError, match="the grader is gone"):
        fit(broken, [RLCheckpoint(tmp_path, 0, 9)])
    resumed = fit(make(**settings), ckpt=tmp_path / "step-000002.ckpt")
    assert same(weights(resumed), weights(fit(make(**settings))))


def test_the_thread_computes_in_the_precision_of_the_steps(make):
    """Autocast is a thread's own: without care, answers sampled ahead would be those of another precision."""
    seen = set()

    class Noting(TransformersSampler):
        def generate(self, requests, sampling=None):
            seen.add((threading.current_thread() is threading.main_thread(), torch.is_autocast_enabled("cpu")))
            return super().generate(requests, sampling)

    settings = {"sampling": TWIN, "overlap": True, "rl_steps": 2, "sync_gap": None, "first_step_gap": None}
    module = make(sampler=Noting, **settings)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, precision="bf16-mixed",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)
    assert seen == {(True, True), (False, True)}


def test_no_step_is_sampled_that_will_not_be_trained(make):
    module = make(noting(CoreBase), sampling=TWIN, overlap=True, rl_steps=9, token_budget=2 * 16 * 6)
    starts = []
    module._ahead.start = lambda step, work, start=module._ahead.start: (starts.append(step), start(step, work))
    fit(module)
    assert module.rl_step == 1 + starts[-1] and starts == list(range(1, module.rl_step))


def test_what_goes_wrong_in_sampling_stops_the_run(make):
    class Broken(TransformersSampler):
        def generate(self, requests, sampling=None):
            if threading.current_thread() is not threading.main_thread():
                raise ConnectionError("the server is gone")
            return super().generate(requests, sampling)

    with pytest.raises(ConnectionError, match="the server is gone"):
        fit(make(sampler=Broken, sampling=TWIN, overlap=True))


def test_a_sampler_on_the_trainer_s_own_weights_is_refused(make):
    with pytest.raises(ValueError, match=r"variant\.overlap=true.*sampler\.copy_weights=true") as error:
        make(overlap=True)
    assert "\n" not in str(error.value)


def test_samples_come_back_from_a_checkpoint_as_they_were(tmp_path):
    call = ToolCall("print(1)", "ok", "1", 1, 3, 0.25)
    made = [
        [Sample((4, 5, 6, 2), (-0.1, 0.0, 0.0, -1 / 3), "eos", 2, "7", (call,)), Sample((9,), (-2.5,), "length")],
        [Sample((8, 8), (-0.5, -0.25), "stop", "```output", "7")] * 2,
    ]
    ahead = Ahead()
    ahead.start(3, lambda: made)
    torch.save(ahead.state(1), tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    again = Ahead()
    again.restore(state, 0, 1)
    assert again.take(2) is None
    again.restore(state, 0, 1)
    assert again.take(3) == made == again.take(3), "a step that fails has them again"
    again.forget(3)
    assert again.take(3) is None
    for rank in (0, 1):  # one process wrote it, two go on
        again.restore(state, rank, 2)
        assert again.take(3) == [made[rank]]
