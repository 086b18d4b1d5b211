"""The spine: what is trained, with which gradient, and what stops a run that would lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from core_torl.config.errors import UserError
from core_torl.model.load import load_policy
from core_torl.objective.grpo import GRPO
from core_torl.trajectory import Group
from core_torl.variant.core_base import CoreBase
from core_torl.variant.policy_gradient import PolicyGradient

from .conftest import Evenness, fit, make_policy, same, weights


def test_training_changes_the_weights_and_counts_what_it_did(make):
    module = make()
    before = weights(module)
    fit(module)
    assert not same(before, weights(module))
    assert module.rl_step == 4 and module.updates == 4
    assert module.samples_seen == 4 * 16
    assert module.last_metrics["train/sampled_tokens"] == module.tokens_seen > 0


def test_the_reward_rises_where_it_can(make):
    rewards = []

    class Note(PolicyGradient):
        def weigh(self, groups):
            rewards.append(
                sum(t.score.value for g in groups for t in g.trajectories) / sum(len(g.trajectories) for g in groups)
            )
            return super().weigh(groups)

    fit(make(Note, rl_steps=30, prompts_per_step=8, group_size=8))
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_two_runs_with_one_seed_are_equal_bit_for_bit_and_another_seed_differs(make):
    one, two, other = fit(make()), fit(make()), fit(make(seed=1))
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(other))


@pytest.mark.parametrize(
    "change", [{"microbatch_size": 1}, {"microbatch_size": 5}, {"skip_zero_advantage": False}, {"share_prompts": False}]
)
def test_how_memory_is_cut_does_not_change_what_is_learned(make, change):
    one, two = weights(fit(make(rl_steps=2))), weights(fit(make(rl_steps=2, **change)))
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-5


def test_minibatches_do_change_it_and_are_counted(make):
    one, two = fit(make(rl_steps=2)), fit(make(rl_steps=2, minibatch_size=4))
    assert two.updates == 8
    assert max((weights(one)[k] - weights(two)[k]).abs().max() for k in weights(one)) > 1e-3


def test_on_policy_steps_have_ratio_one_and_later_minibatches_do_not(make):
    one = fit(make(rl_steps=1))
    assert one.last_metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert one.last_metrics["policy/old_kl"] == pytest.approx(0.0, abs=1e-6)
    two = fit(make(rl_steps=1, update_epochs=3, lr=5e-2))
    assert two.last_metrics["policy/old_kl"] > 1e-4
    assert two.last_metrics["policy/clip_fraction"] > 0


def test_the_sampler_gap_is_measured_and_a_stale_sampler_stops_the_run(make, problems):
    module = fit(make(rl_steps=1))
    assert 0 < module.last_metrics["policy/sampler_logprob_gap_max"] < 1e-4
    stale = make(rl_steps=1)
    stale.sampler.model = make_policy(problems, seed=5).model  # another policy's weights
    with pytest.raises(UserError, match="first-step check: sampler and trainer disagree"):
        fit(stale)
    fit(make(rl_steps=1, first_step_gap=None))


def test_a_temperature_that_is_not_mirrored_is_caught(make):
    module = make(rl_steps=1, temperature=1.0)
    module.sampler.sampling = replace(module.sampler.sampling, temperature=0.7)
    with pytest.raises(UserError, match="first-step check"):
        fit(module)
    mirrored = make(rl_steps=1, temperature=0.7)
    mirrored.sampler.sampling = replace(mirrored.sampler.sampling, temperature=0.7)
    assert fit(mirrored).last_metrics["policy/sampler_logprob_gap_max"] < 1e-4


def test_unjudged_trajectories_leave_the_loss_and_too_many_stop_the_run(make):
    module = make(reward=Evenness(lambda t: t.token_ids[0] % 3 == 0), max_excluded=1.0)
    masks = []

    class Look(type(module)):  # type: ignore[misc]
        def learn(self, batch):
            masks.append(batch.train_mask.any(dim=1))
            super().learn(batch)

    module.__class__ = Look
    fit(module)
    excluded = [t.score.value is None for g in module.last_groups for t in g.trajectories]
    assert any(excluded) and masks[-1].tolist() == [not e for e in excluded]
    with pytest.raises(RuntimeError, match=r"100% of the trajectories .*variant\.max_excluded=0\.5"):
        fit(make(reward=Evenness(lambda t: True)))


def test_kl_to_the_reference_starts_at_zero_grows_and_holds_the_policy_back(make):
    class Note(PolicyGradient):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            self.seen = [*getattr(self, "seen", []), self.last_metrics["loss/reference_kl"]]

    free, held = (
        fit(make(Note, objective=GRPO(kl_coef=1e-8), rl_steps=25)),
        fit(make(Note, objective=GRPO(kl_coef=5.0), rl_steps=25)),
    )
    assert free.seen[0] == pytest.approx(0.0, abs=1e-6)
    assert free.seen[-1] > 5 * held.seen[-1] > 0
    assert not any("_frozen" in name for name in free.state_dict())


def test_core_base_refuses_problems_without_a_concept_and_plain_grpo_takes_them(make, problems):
    bare = [replace(p, concept=None) for p in problems]
    with pytest.raises(UserError, match="has no concept"):
        make(CoreBase, problems=bare)
    make(PolicyGradient, problems=bare)


def test_the_concept_is_never_in_a_sampled_prompt(make):
    prompts = []

    class Look(CoreBase):
        def weigh(self, groups: list[Group]):
            prompts.extend(
                (self.policy.tokenizer.decode(list(t.prompt_ids)), t.problem) for g in groups for t in g.trajectories
            )
            return super().weigh(groups)

    fit(make(Look, rl_steps=2))
    assert prompts and not any(problem.concept.text in text for text, problem in prompts)


class Pull(PolicyGradient):
    """A pull of the head towards zero, in ``parts`` equal parts."""

    parts = 1

    def auxiliary_losses(self, rows):
        self.calls = [*getattr(self, "calls", []), len(rows)]
        for _ in range(self.parts):
            yield 0.5 / self.parts * self.model.lm_head.weight.square().sum()


class PullInParts(Pull):
    parts = 4


def test_an_auxiliary_loss_reaches_the_weights_once_per_optimizer_step_whatever_its_parts(make):
    none, one, four = (fit(make(k, rl_steps=1, minibatch_size=8)) for k in (PolicyGradient, Pull, PullInParts))
    assert one.calls == four.calls == [8, 8]
    assert not same(weights(none), weights(one))
    assert max((weights(one)[k] - weights(four)[k]).abs().max() for k in weights(one)) < 1e-5
    assert one.last_metrics["loss/auxiliary"] == pytest.approx(four.last_metrics["loss/auxiliary"], rel=1e-5)
    assert none.last_metrics["loss/auxiliary"] == 0


def test_each_part_of_an_auxiliary_loss_is_backpropagated_before_the_next_is_asked_for(make):
    class Lazy(PolicyGradient):
        def auxiliary_losses(self, rows):
            head = self.model.lm_head.weight
            for part in range(1, 4):
                yield head.sum()
                assert torch.allclose(head.grad, torch.full_like(head, float(part)))

    fit(make(Lazy, rl_steps=1))


def test_the_auxiliary_gradient_is_measured_by_itself_before_clipping(make):
    class Coached(Pull):
        coached = True

        def auxiliary_losses(self, rows):
            self.expected = self.model.lm_head.weight.norm().item()  # the gradient of half the squared norm
            yield from super().auxiliary_losses(rows)

    pulled = fit(make(Coached, rl_steps=1, grad_clip=1e-3))
    found = pulled.last_metrics
    assert found["core/auxiliary_grad_norm"] == pytest.approx(pulled.expected, rel=1e-4)
    own = fit(make(rl_steps=1)).last_metrics["policy/grad_norm"]
    expected = pulled.expected / (pulled.expected + own)
    assert found["core/auxiliary_grad_share"] == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < 1
    # Where there is no such loss there is no such number, and without a coach there are no core metrics at all.
    assert not any(name.startswith("core/") for name in fit(make(rl_steps=1)).last_metrics)


def test_every_variant_may_change_groups_and_only_a_coach_is_timed(make):
    class Silencer(CoreBase):
        def intervene(self, groups):
            for t in (t for g in groups for t in g.trajectories):
                t.train_mask = (False,) * len(t.train_mask)
            return groups

    module = make(Silencer, rl_steps=1)
    before = weights(module)
    fit(module)
    assert all(torch.allclose(tensor, before[name], atol=1e-3) for name, tensor in weights(module).items())
    assert module.last_metrics["policy/grad_norm"] == 0 and "time/intervene_s" not in module.last_metrics
    Silencer.coached = True
    assert "time/intervene_s" in fit(make(Silencer, rl_steps=1)).last_metrics


def test_lora_trains_and_stores_only_its_adapters(make, problems, tmp_path):
    plain = make_policy(problems)
    plain.export(tmp_path / "base")
    policy = load_policy(
        path=str(tmp_path / "base"), lora={"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
    )
    module = make(policy=policy, objective=GRPO(kl_coef=0.01))
    before = weights(module)
    fit(module)
    moved = {name for name, tensor in weights(module).items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert set(module.state_dict()) == {f"model.{n}" for n in policy.trainable_state()} and all(
        "lora_" in n for n in module.state_dict()
    )
    policy.export(tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, module.model.eval()(ids).logits, atol=1e-5)
        assert not torch.allclose(merged(ids).logits, plain.model.eval()(ids).logits, atol=1e-5)


def test_a_reference_that_is_not_the_starting_policy_is_caught(make, problems):
    module = make(rl_steps=1, objective=GRPO(kl_coef=0.1))
    object.__setattr__(module, "_frozen", make_policy(problems, seed=9).model.eval())
    with pytest.raises(UserError, match="first-step check: the KL to the reference is off 0"):
        fit(module)


def test_a_first_ratio_that_is_not_one_is_caught(make):
    class Shifted(PolicyGradient):
        def _forward_only(self, model, batch):
            return super()._forward_only(model, batch) - 0.01

        def _compare_with_sampler(self, logprobs, part):
            """Silent here: the ratio's own check has to speak."""

    with pytest.raises(UserError, match="first-step check: an importance ratio is off 1"):
        fit(make(Shifted, rl_steps=1, minibatch_size=8))


def test_a_gap_that_is_not_a_number_is_no_small_gap(make):
    class Broken(PolicyGradient):
        def _compare_with_sampler(self, logprobs, part):
            super()._compare_with_sampler(logprobs * float("nan"), part)

    with pytest.raises(UserError, match="first-step check: sampler and trainer disagree"):
        fit(make(Broken, rl_steps=1))
