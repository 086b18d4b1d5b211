"""Guards group advantages: the worked examples of the published runs, and who takes no part in them."""

from __future__ import annotations

import math

import pytest
import torch

from core_torl.objective.advantages import group_advantages
from core_torl.objective.grpo import GRPO


def advantages(*groups, valid=None, **how) -> list[list[float]]:
    rewards = torch.tensor(groups)
    mask = torch.ones_like(rewards, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return group_advantages(rewards, mask, **how).tolist()


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ((0.0, 0.0, 0.4, 0.4), (-0.866, -0.866, 0.866, 0.866)),
        ((0.0, 0.0, 0.4, 1.4), (-0.681, -0.681, -0.076, 1.438)),
        ((0.0, 0.0, 1.4, 1.4), (-0.866, -0.866, 0.866, 0.866)),
        ((0.0, 0.0, 0.0, 1.0), (-0.5, -0.5, -0.5, 1.5)),
    ],
)
def test_the_published_groups(rewards, expected):
    assert advantages(rewards)[0] == pytest.approx(expected, abs=6e-4)


def test_groups_do_not_mix():
    both = advantages((0.0, 0.0, 0.4, 1.4), (1.0, 0.0, 0.0, 0.0))
    assert both == [advantages((0.0, 0.0, 0.4, 1.4))[0], advantages((1.0, 0.0, 0.0, 0.0))[0]]


def test_the_deviation_is_the_unbiased_one_and_eps_is_added_to_it():
    deviation = math.sqrt(2 * 0.25)  # two values, one degree of freedom
    assert advantages((0.0, 1.0), eps=0.3)[0] == pytest.approx([-0.5 / (deviation + 0.3), 0.5 / (deviation + 0.3)])


def test_dr_grpo_keeps_the_scale_of_the_rewards():
    assert advantages((0.0, 0.0, 0.4, 1.4), normalize_std=False)[0] == pytest.approx([-0.45, -0.45, -0.05, 0.95])


@pytest.mark.parametrize("left_out", [0.0, 100.0, math.nan, math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_excluded_entry_changes_nothing_whatever_it_holds(left_out, normalize):
    three = advantages((0.0, 0.4, 1.4), normalize_std=normalize)[0]
    found = advantages((0.0, left_out, 0.4, 1.4), valid=[[True, False, True, True]], normalize_std=normalize)[0]
    assert found[1] == 0
    assert [found[0], *found[2:]] == pytest.approx(three)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.4, -7.3])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_constant_group_teaches_nothing(value, normalize):
    """The mean of N equal numbers need not be that number in floating point; its rest must not be blown up."""
    for n in (2, 3, 7, 16):
        assert advantages((value,) * n, normalize_std=normalize, eps=0.0)[0] == [0.0] * n
    excluded = advantages((value, 5.0, value), valid=[[True, False, True]], normalize_std=normalize)
    assert excluded == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("valid", [[True, False, False], [False, False, False]])
def test_fewer_than_two_judged_answers_teach_nothing(valid):
    assert advantages((1.0, 0.0, math.nan), valid=[valid]) == [[0.0, 0.0, 0.0]]


def test_advantages_of_a_group_sum_to_zero():
    rewards = torch.rand(20, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(20, 8, generator=torch.Generator().manual_seed(1)) < 0.7
    found = group_advantages(rewards, valid)
    assert found.sum(1).abs().max() < 1e-5 and (found != 0).sum() > 80
    assert (found[~valid] == 0).all() and found.dtype == torch.float32
    spread = torch.stack([found[i][valid[i]].std() for i in range(20) if valid[i].sum() > 1])
    assert torch.allclose(spread, torch.ones_like(spread), atol=1e-4)


def test_the_objective_passes_its_own_settings_on():
    rewards, valid = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert GRPO(normalize_std=False).advantages(rewards, valid).tolist() == [[-0.5, 0.5]]
    assert GRPO(advantage_eps=1.0).advantages(rewards, valid)[0, 1].item() == pytest.approx(0.5 / (math.sqrt(0.5) + 1))
