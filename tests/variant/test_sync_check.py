"""A sampler that was not given the trainer's weights is caught by numbers, one that was is not."""

from __future__ import annotations

import pytest
import torch

from core_torl.config.errors import UserError
from core_torl.sampler.protocol import SamplingConfig
from core_torl.sampler.transformers import TransformersSampler
from core_torl.variant.policy_gradient import PolicyGradient
from core_torl.variant.sync_check import PROBE_TOKENS, check_sync, has_own_weights, probe_of

from .conftest import fit, make_policy


class Forgetful(TransformersSampler):
    """Takes the weights of the first ``takes`` hand-overs and only says so of later ones."""

    takes = 1

    def sync(self, weights, version):
        if self.takes:
            self.takes -= 1
            super().sync(weights, version)
        self.version = version


class Honest(Forgetful):
    """The same, and keeps its old version."""

    def sync(self, weights, version):
        before = self.version
        self.takes -= 1
        TransformersSampler.sync(self, weights, version)
        if self.takes < 0:
            self.version = before


def test_old_weights_stop_the_run_at_the_first_hand_over(make):
    module = make(sampler=Forgetful, sampling={"copy_weights": True})
    with pytest.raises(UserError, match=r"sync check: after the weights of update 1 .*variant\.sync_gap=0\.0001"):
        fit(module)
    assert module.updates == 1


def test_a_version_that_does_not_move_stops_it_too(make):
    with pytest.raises(UserError, match="answers with weights 0, the trainer has 1"):
        fit(make(sampler=Honest, sampling={"copy_weights": True}, sync_gap=None))


def test_weights_that_were_handed_over_pass_and_the_gap_is_logged(make):
    module = fit(make(sampling={"copy_weights": True}))
    assert 0 < module.last_metrics["policy/sync_gap"] < 1e-5
    assert module.last_metrics["time/sync_s"] > 0


def test_the_trainer_s_own_weights_cannot_be_old_and_are_not_asked(make, monkeypatch):
    module = fit(make())
    assert not has_own_weights(module.sampler) and "policy/sync_gap" not in module.last_metrics
    assert has_own_weights(object()), "one that does not say so is asked"


def test_no_bound_measures_only(make):
    module = fit(make(sampler=Forgetful, sampling={"copy_weights": True}, sync_gap=None))
    assert module.last_metrics["policy/sync_gap"] > 1e-3


def test_numbers_that_are_none_do_not_pass(problems):
    policy = make_policy(problems)
    sampler = TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=6, copy_weights=True)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="disagree by nan"):
        check_sync(sampler, policy.model, [3] * 40, "0", 1e9)


def test_modes_and_generators_stay_as_they_were(problems):
    policy = make_policy(problems)
    policy.model.train()
    policy.model.model.layers[0].eval()
    sampler = TransformersSampler(policy.model, policy.tokenizer, max_new_tokens=6, copy_weights=True)
    state = torch.get_rng_state()
    assert check_sync(sampler, policy.model, [3] * 40, "0", 1e-4) < 1e-4
    assert policy.model.training and not policy.model.model.layers[0].training
    assert torch.equal(state, torch.get_rng_state())


def test_the_probe_is_longer_than_a_block_of_an_engine_s_cache_where_the_model_allows():
    assert len(probe_of([(1, 2, 3)], None)) == PROBE_TOKENS > 128
    assert probe_of([(1, 2, 3), (4,)], 18) == (1, 2, 3, 4, 1, 2, 3, 4, 1, 2)
    assert len(probe_of([tuple(range(500))], 4096)) == PROBE_TOKENS


def test_the_sampler_sleeps_while_the_policy_learns(make):
    order = []

    class Sleepy(TransformersSampler):
        def sleep(self):
            order.append("sleep")

        def sync(self, weights, version):
            order.append(f"sync {version}")
            super().sync(weights, version)

        def generate(self, requests, sampling: SamplingConfig | None = None):
            order.append("sample")
            return super().generate(requests, sampling)

    class Note(PolicyGradient):
        def learn(self, batch):
            order.append("learn")
            super().learn(batch)

    fit(make(Note, sampler=Sleepy, sampling={"copy_weights": True}, rl_steps=2, minibatch_size=8))
    step = ["sample", "sleep", "learn"]
    # One hand-over a step, however many optimizer steps it has; each is followed by the probe.
    assert order == ["sync 0", "sample", *step, "sync 2", "sample", *step, "sync 4", "sample"]
