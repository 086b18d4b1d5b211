"""What a step measured: extremes and sums over ranks, and numbers that are none and have to show."""

from __future__ import annotations

import math

import pytest
import torch

from core_torl.objective.mismatch import measure
from core_torl.variant.step_metrics import StepMetrics

MASK = torch.ones(2, 2, dtype=torch.bool)
RATIOS = torch.tensor([[0.5, 1.0], [2.0, 1.05]])


def compared(metrics: StepMetrics, ratios: torch.Tensor) -> StepMetrics:
    metrics.add_mismatch(measure(ratios.log(), torch.zeros_like(ratios), torch.ones_like(ratios, dtype=torch.bool)))
    return metrics


def finish(metrics: StepMetrics, ranks: int = 1) -> dict[str, float]:
    return metrics.finish(ranks, torch.device("cpu"), entropy=False)


def over_two_ranks(one: StepMetrics, two: StepMetrics, monkeypatch) -> dict[str, float]:
    """The first rank's numbers, its sums and maxima taken with those that the second one would send."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, op=None: sent.append(t.clone()))
    finish(two, 2)

    def reduce(tensor, op=torch.distributed.ReduceOp.SUM):
        other = sent.pop(0)
        largest = op == torch.distributed.ReduceOp.MAX
        # As a collective may: of a number and no number, the number.
        tensor.copy_(torch.fmax(tensor, other) if largest else tensor + other)

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    result = finish(one, 2)
    assert not sent
    return result


def test_the_mismatch_of_several_parts_by_hand():
    metrics = compared(compared(StepMetrics(), RATIOS[:1]), RATIOS[1:])
    found = finish(metrics)
    flat = RATIOS.flatten().tolist()
    assert found["mismatch/ratio_mean"] == pytest.approx(sum(flat) / 4)
    assert found["mismatch/ratio_max"] == pytest.approx(2.0)
    assert found["mismatch/outside"] == pytest.approx(0.5)
    assert found["mismatch/kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in flat) / 4, rel=1e-5)
    assert found["mismatch/sequence_ratio_max"] == pytest.approx(2.1**0.5)
    assert found["mismatch/sequence_ratio_min"] == pytest.approx(0.5**0.5)
    assert found["policy/sampler_logprob_gap_max"] == pytest.approx(math.log(2))
    assert found["policy/sampler_logprob_gap_mean"] == pytest.approx(sum(abs(math.log(r)) for r in flat) / 4, rel=1e-5)


def test_ranks_share_sums_and_extremes(monkeypatch):
    apart = [compared(StepMetrics(), RATIOS[:1]), compared(StepMetrics(), RATIOS[1:])]
    whole = finish(compared(StepMetrics(), RATIOS))
    found = over_two_ranks(*apart, monkeypatch)
    names = [n for n in whole if n.startswith(("mismatch/", "policy/sampler"))]
    assert len(names) == 8 and all(found[n] == pytest.approx(whole[n]) for n in names)
    # A rank that compared nothing has no say, in the smallest value neither.
    found = over_two_ranks(compared(StepMetrics(), RATIOS), StepMetrics(), monkeypatch)
    assert all(found[n] == pytest.approx(whole[n]) for n in names)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_of_any_rank_shows(monkeypatch, rank):
    broken = torch.tensor([[1.0, math.nan]])
    ranks = [compared(StepMetrics(), RATIOS), compared(StepMetrics(), RATIOS)]
    compared(ranks[rank], broken)
    found = over_two_ranks(*ranks, monkeypatch)
    for name in ("kl", "ratio_mean", "ratio_max", "sequence_ratio_max", "sequence_ratio_min"):
        assert math.isnan(found[f"mismatch/{name}"]), name
    assert math.isnan(found["policy/sampler_logprob_gap_max"])


def test_a_later_number_does_not_hide_a_nan_and_the_first_step_check_gets_infinity_for_it():
    metrics = compared(compared(StepMetrics(), torch.tensor([[math.nan]])), RATIOS)
    assert metrics.deviations()[0] == math.inf  # a maximum over ranks may lose a NaN
    found = finish(metrics)
    assert math.isnan(found["mismatch/ratio_max"]) and math.isnan(found["mismatch/sequence_ratio_min"])


def test_a_step_that_compared_nothing_has_no_mismatch():
    assert not any(name.startswith("mismatch/") for name in finish(StepMetrics()))


def test_a_sampler_that_is_meant_to_differ_is_measured_and_not_refused():
    metrics = compared(StepMetrics(), RATIOS)
    assert metrics.deviations()[0] == pytest.approx(math.log(2))
    metrics.exact_sampler = False
    assert metrics.deviations()[0] == 0
    assert finish(metrics)["policy/sampler_logprob_gap_max"] == pytest.approx(math.log(2))
