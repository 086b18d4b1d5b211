"""Guards the KL estimators: their closed forms, their signs, and which of them is right on average."""

from __future__ import annotations

import math

import pytest
import torch

from core_torl.objective.divergences import ESTIMATORS, kl_estimate

POLICY = torch.tensor([0.5, 0.3, 0.15, 0.05])
REFERENCE = torch.tensor([0.3, 0.3, 0.1, 0.3])
KL = float((POLICY * (POLICY / REFERENCE).log()).sum())


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda r: -math.log(r)),
        ("k2", lambda r: math.log(r) ** 2 / 2),
        ("k3", lambda r: r - 1 - math.log(r)),
    ],
)
def test_closed_forms(estimator, formula):
    found = kl_estimate(POLICY.log()[None], REFERENCE.log()[None], estimator)
    assert found.shape == (1, 4)
    ratios = (REFERENCE / POLICY).tolist()
    assert found[0].tolist() == pytest.approx([formula(r) for r in ratios], abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_right_on_average_over_the_policy(estimator):
    mean = (POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), estimator)).sum()
    assert float(mean) == pytest.approx(KL, abs=1e-6)


def test_k2_is_biased():
    assert float((POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), "k2")).sum()) != pytest.approx(KL, rel=0.02)


def test_the_mean_over_draws_comes_near_the_divergence():
    tokens = torch.multinomial(POLICY, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    drawn = {e: kl_estimate(POLICY.log()[tokens], REFERENCE.log()[tokens], e) for e in ESTIMATORS}
    for estimator in ("k1", "k3"):
        error = 4 * float(drawn[estimator].std()) / math.sqrt(len(tokens))
        assert float(drawn[estimator].mean()) == pytest.approx(KL, abs=error)


def test_k3_and_k2_are_never_negative_and_k1_may_be():
    gaps = torch.arange(-300, 301) / 10
    for estimator in ("k2", "k3"):
        found = kl_estimate(torch.zeros_like(gaps), gaps, estimator)
        assert (found >= 0).all() and torch.isfinite(found).all()
        assert found[300] == 0 and (found[:290] > 0).all() and (found[311:] > 0).all()
    assert (kl_estimate(torch.zeros_like(gaps), gaps, "k1") < 0).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_gap_beyond_the_range_of_exp_stays_finite(estimator):
    logprobs = torch.tensor([-500.0, 0.0], requires_grad=True)
    kl_estimate(logprobs, torch.tensor([0.0, -500.0]), estimator).sum().backward()
    assert torch.isfinite(kl_estimate(logprobs, torch.tensor([0.0, -500.0]), estimator)).all()
    assert torch.isfinite(logprobs.grad).all()


def test_k3_is_exact_for_tiny_gaps():
    gap = torch.tensor([1e-4])  # exp(x) - 1 - x would lose all its digits here
    assert kl_estimate(torch.zeros(1), gap, "k3").item() == pytest.approx(0.5e-8, rel=0.05)


def test_equal_policies_are_at_distance_zero():
    for estimator in ESTIMATORS:
        assert kl_estimate(POLICY.log(), POLICY.log(), estimator).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_gradient_pulls_towards_the_reference(estimator):
    logprobs = POLICY.log().requires_grad_()
    kl_estimate(logprobs, REFERENCE.log(), estimator).sum().backward()
    assert logprobs.grad is not None
    assert torch.sign(logprobs.grad).tolist() == torch.sign(POLICY - REFERENCE).tolist()


def test_an_unknown_estimator_names_the_known_ones():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(POLICY, POLICY, "k4")
