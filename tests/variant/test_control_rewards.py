"""Whole runs under the control rewards: they repeat, evaluations in between do not matter, and metrics stay true."""

from __future__ import annotations

import pytest
import torch

from core_torl.reward.random import RandomReward
from core_torl.reward.shuffled import ShuffledReward
from core_torl.variant.policy_gradient import PolicyGradient

from .conftest import Evenness, fit, same, weights


class Note(PolicyGradient):
    """Keeps what every trajectory was paid; ``evaluated`` scores answers after each step, as an evaluation does."""

    evaluated = False

    def weigh(self, groups):
        self.paid = [*getattr(self, "paid", []), [t.score.value for g in groups for t in g.trajectories]]
        return super().weigh(groups)

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        if self.evaluated:
            self._parts["reward"].score([t for g in self.last_groups for t in g.trajectories])


class Evaluated(Note):
    evaluated = True


@pytest.fixture(params=[RandomReward, ShuffledReward])
def control(request, monkeypatch):
    """A control reward whose truth is Evenness, which an untrained policy meets about half the time."""
    truth = Evenness()

    def score(self, trajectories):
        return truth.score(trajectories)

    # What the controls call as super().score is Correctness.
    monkeypatch.setattr("core_torl.reward.correctness.Correctness.score", score)
    return request.param


def test_an_evaluation_between_steps_changes_nothing_and_another_seed_does(make, control):
    plain, evaluated = fit(make(Note, reward=control())), fit(make(Evaluated, reward=control()))
    assert plain.paid == evaluated.paid and same(weights(plain), weights(evaluated))
    assert plain.paid != fit(make(Note, reward=control(), seed=1)).paid


def test_accuracy_is_reported_truly_and_the_mean_reward_is_what_was_paid(make, control):
    module = fit(make(Note, reward=control()))
    flat = [t for g in module.last_groups for t in g.trajectories]
    true = [s.correct for s in Evenness().score(flat)]
    assert module.last_metrics["reward/accuracy"] == pytest.approx(sum(true) / len(true))
    paid = torch.tensor(module.paid[-1])
    assert module.last_metrics["reward/mean"] == pytest.approx(float(paid.mean()))
    assert paid.tolist() != [s.value for s in Evenness().score(flat)]
