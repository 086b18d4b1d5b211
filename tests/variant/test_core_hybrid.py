"""CORE-Hybrid: its ends are CR and KL bit for bit, and between them the failed groups are shared out."""

from __future__ import annotations

import pytest

from core_torl.objective.grpo import GRPO
from core_torl.trajectory import Group
from core_torl.variant.core_cr import CoreCR
from core_torl.variant.core_hybrid import CoreHybrid
from core_torl.variant.core_kl import CoreKL

from .conftest import RIGHT, WRONG, Rule, fit, same, watched, weights


def some_right(t, i):
    return RIGHT if t.token_ids[0] % 2 else WRONG


def settings(**changes):
    reward = Rule(some_right, lambda t, i: RIGHT if t.token_ids[0] % 9 == 0 else WRONG)
    return {"rl_steps": 3, "reward": reward, "objective": GRPO(kl_coef=0.01), "minibatch_size": 8, **changes}


@pytest.mark.parametrize(("rho", "kind"), [(0.0, CoreKL), (1.0, CoreCR)])
def test_the_ends_are_the_other_variants_bit_for_bit(make, rho, kind):
    pure, hybrid = fit(make(kind, **settings())), fit(make(CoreHybrid, **settings(rho=rho)))
    assert same(weights(pure), weights(hybrid)) and pure.tokens_seen == hybrid.tokens_seen
    for name, value in pure.last_metrics.items():
        if not name.startswith(("time/", "rollout/tokens_per_s")):
            assert hybrid.last_metrics[name] == value, name
    assert not same(weights(hybrid), weights(fit(make(CoreHybrid, **settings(rho=1 - rho)))))


def test_half_of_the_failed_groups_go_each_way_and_one_call_serves_both(make):
    module = make(watched(CoreHybrid), rl_steps=4, rho=0.5, replaced=3, references=1)
    calls, generate = [], module.sampler.generate
    module.sampler.generate = lambda requests, *rest: (calls.append(len(requests)), generate(requests, *rest))[1]
    kept = []
    keep = module.keep
    module.keep = lambda groups, primed: (keep(groups, primed), kept.append([x.row // 4 for x in module._lessons]))
    fit(module)
    assert calls == [4, 4] * 4, "plain prompts, then all primed ones"
    chosen = set()
    for groups, taught in zip(module.weighed, kept, strict=True):
        counts = [sum(t.behaviour != "policy" for t in g.trajectories) for g in groups]
        assert set(counts) <= {0, 3}
        replaced = {i for i, n in enumerate(counts) if n}
        assert set(taught) == {0, 1, 2, 3} - replaced
        chosen.add(frozenset(replaced))
    assert len(chosen) > 1, "which ones changes from step to step"


def test_each_group_is_tossed_for_by_itself_and_the_share_holds_on_average(make, problems):
    module = make(CoreHybrid, rho=0.3)
    module._trainer = None
    module.place = lambda group: group
    groups = [Group(p, []) for p in problems[:8]]
    tosses = []
    for step in range(200):
        module.rl_step = step
        tosses += [module.replaces(i, g) for i, g in enumerate(groups)]
        assert tosses[-8:] == [module.replaces(i, g) for i, g in enumerate(groups)]
    assert sum(tosses) / len(tosses) == pytest.approx(0.3, abs=0.04)


def test_a_share_is_a_share(make):
    for rho in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"variant\.rho={rho}: a share"):
            make(CoreHybrid, rho=rho)
