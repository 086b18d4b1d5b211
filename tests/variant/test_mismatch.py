"""Sampler and trainer in the real loop: what is logged of their distance, and what a correction makes of it."""

from __future__ import annotations

import pytest

from core_torl.config.errors import UserError
from core_torl.objective.grpo import GRPO
from core_torl.variant.core_cr import CoreCR
from core_torl.variant.policy_gradient import PolicyGradient

from .conftest import RIGHT, Rule, fit, same, weights

ONE = {"rl_steps": 1, "skip_zero_advantage": False}


def mismatch(module: PolicyGradient) -> dict[str, float]:
    return {k.split("/")[1]: v for k, v in module.last_metrics.items() if k.startswith("mismatch/")}


def test_an_exact_sampler_has_no_mismatch_and_it_is_logged_all_the_same(make):
    for settings in (ONE, {**ONE, "minibatch_size": 8}):
        found = mismatch(fit(make(**settings)))
        assert found.pop("kl") == pytest.approx(0, abs=1e-9) and found.pop("outside") == 0
        assert set(found) == {"ratio_mean", "ratio_max", "sequence_ratio_max", "sequence_ratio_min"}
        assert all(value == pytest.approx(1, abs=1e-4) for value in found.values())


def test_another_temperature_shows_in_every_number(make):
    found = mismatch(fit(make(**ONE, sampling={"temperature": 0.5}, first_step_gap=None)))
    assert found["kl"] > 1e-3 and found["outside"] > 0 and found["ratio_mean"] < 0.999 < found["ratio_max"]
    assert found["sequence_ratio_min"] < found["sequence_ratio_max"]
    assert "weight_mean" not in found and "bounded" not in found


def test_with_an_exact_sampler_a_correction_changes_nothing(make):
    plain, corrected = (
        weights(fit(make(rl_steps=2, objective=objective)))
        for objective in (GRPO(), GRPO(correction="truncate", correction_level="sequence"))
    )
    assert max((plain[k] - corrected[k]).abs().max() for k in plain) < 1e-5


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_truncated_sampling_is_weighed_at_the_policy_before_the_steps_first_update(make, level):
    """However the step is cut into updates: the weights are of its start. The first-step check stays on."""
    objective = GRPO(correction="truncate", correction_level=level)
    settings = {**ONE, "sampling": {"top_k": 300}, "objective": objective, "lr": 5e-2}
    one, many = fit(make(**settings)), fit(make(**settings, minibatch_size=4, update_epochs=2))
    found = mismatch(one)
    assert 0.01 < found["weight_mean"] < 0.95 and found["bounded"] == 0
    assert found["outside"] > 0.5 and found["ratio_max"] < 1
    assert mismatch(many) == pytest.approx(found, rel=1e-4)
    assert many.last_metrics["policy/old_kl"] > 1e-4, "the policy has moved"
    if level == "token":
        assert found["weight_mean"] == pytest.approx(found["ratio_mean"], rel=1e-5)
    uncorrected = fit(make(**(settings | {"objective": GRPO(), "first_step_gap": None})))
    assert not same(weights(one), weights(uncorrected))


def test_a_mask_drops_what_lies_outside_its_bounds(make):
    settings = {**ONE, "sampling": {"temperature": 0.5}, "first_step_gap": None}
    dropped = GRPO(correction="mask", correction_low=1.0, correction_high=1.0)
    module = make(**settings, objective=dropped)
    before = weights(module)
    fit(module)
    assert mismatch(module)["bounded"] > 0.99 and mismatch(module)["weight_mean"] < 0.01
    assert module.last_metrics["policy/grad_norm"] < 1e-3 and max(
        (weights(module)[k] - before[k]).abs().max() for k in before
    )


def test_primed_rows_are_neither_compared_nor_weighed(make):
    """Their sampler read another prompt. The plain answers of the same step are."""
    rule = Rule(primed=lambda t, i: RIGHT)
    for objective in (GRPO(), GRPO(correction="mask", correction_low=0.9, correction_high=1.1)):
        module = fit(make(CoreCR, **ONE, reward=rule, objective=objective, group_size=4, replaced=2))
        found = mismatch(module)
        assert module.last_metrics["core/replaced_ratio_max"] > 1.1, "they are far from what was sampled"
        assert found["ratio_max"] < 1.01 and found["outside"] == 0 and found.get("bounded", 0) == 0


def test_a_sampler_that_reports_no_numbers_stops_the_run(make):
    class Broken(PolicyGradient):
        def weigh(self, groups):
            batch = super().weigh(groups)
            batch.sampled_logprobs[0, 0] = float("nan")
            return batch

    with pytest.raises(UserError, match="first-step check: sampler and trainer disagree"):
        fit(make(Broken, **ONE))
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        fit(make(Broken, **ONE, objective=GRPO(correction="mask"), first_step_gap=None))


def test_with_overlap_a_correction_weighs_the_step_between_the_policies_and_the_ratio_starts_at_one(make):
    """Decoupled PPO. Without a correction the ratio itself is against the policy that answered, as in PPO."""
    settings = {
        "rl_steps": 2,
        "sampling": {"copy_weights": True},
        "overlap": True,
        "lr": 5e-2,
        "skip_zero_advantage": False,
    }
    coupled = fit(make(**settings)).last_metrics
    corrected = fit(make(**settings, objective=GRPO(correction="truncate", correction_high=1e6))).last_metrics
    for found in (coupled, corrected):
        assert found["mismatch/kl"] > 1e-3 and found["mismatch/outside"] > 0
    assert coupled["policy/ratio_max"] == pytest.approx(coupled["mismatch/ratio_max"], rel=1e-4)
    assert corrected["policy/ratio_max"] == pytest.approx(1, abs=1e-5) and corrected["policy/old_kl"] < 1e-9
    assert corrected["mismatch/weight_mean"] == pytest.approx(corrected["mismatch/ratio_mean"], rel=1e-5)
    assert corrected["policy/clip_fraction"] == 0 < coupled["policy/clip_fraction"]
