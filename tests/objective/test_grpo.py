"""Guards the GRPO loss: worked out by hand on two rows, and one gradient for every way to cut a batch."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from core_torl.objective.grpo import GRPO
from core_torl.objective.logprobs import answer_logprobs
from core_torl.objective.token_batch import TokenBatch


def two_rows(ratios, advantages=(1.0, -2.0)) -> tuple[torch.Tensor, TokenBatch]:
    """Rows of three and two answer tokens; the policy's log-probs are ``old + log(ratio)``."""
    old = [[-1.0, -0.5, -2.0], [-0.7, -1.1]]
    batch = TokenBatch.build(
        [(5, 6), (7,)], [(8, 9, 10), (11, 12)], old, [(True,) * 3, (True,) * 2], torch.tensor(advantages), pad_id=0
    )
    batch.old_logprobs = batch.sampled_logprobs.clone()
    logprobs = torch.zeros(2, 3)
    logprobs[0] = torch.tensor(old[0]) + torch.tensor(ratios[0]).log()
    logprobs[1, :2] = torch.tensor(old[1]) + torch.tensor(ratios[1]).log()
    return logprobs.requires_grad_(), batch


def run(objective: GRPO, logprobs, batch, entropies=None):
    entropies = torch.zeros_like(logprobs) if entropies is None else entropies
    return objective.loss(logprobs, entropies, batch, objective.denominator(batch.train_mask))


# Below, inside and above the clipping range of 0.2 / 0.3, for an advantage of 1 and one of -2.
RATIOS = ((0.5, 1.1, 1.6), (0.6, 1.5))
TERMS = ((0.5, 1.1, 1.3), (-2 * 0.8, -2 * 1.5))  # min(ratio * A, clipped * A)


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("token", -(sum(TERMS[0]) + sum(TERMS[1])) / 5),
        ("sequence", -(sum(TERMS[0]) / 3 + sum(TERMS[1]) / 2) / 2),
    ],
)
def test_the_loss_of_two_rows_by_hand(normalize, expected):
    logprobs, batch = two_rows(RATIOS)
    loss = run(GRPO(0.2, 0.3, normalize), logprobs, batch)
    assert loss.total.item() == pytest.approx(expected, abs=1e-6)
    assert loss.policy.item() == pytest.approx(expected, abs=1e-6)
    assert loss.clipped.item() == 2 and loss.tokens.item() == 5
    assert loss.ratio_sum.item() == pytest.approx(5.3) and loss.ratio_max.item() == pytest.approx(1.6)
    flat = [*RATIOS[0], *RATIOS[1]]
    # k3 of KL(old || current) on tokens that the old policy sampled.
    assert loss.old_kl.item() == pytest.approx(sum(1 / r - 1 + math.log(r) for r in flat), abs=1e-5)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_the_gradient_of_two_rows_by_hand(normalize):
    """Zero where the clipped branch is the smaller one, minus weight * ratio * advantage elsewhere."""
    logprobs, batch = two_rows(RATIOS)
    run(GRPO(0.2, 0.3, normalize), logprobs, batch).total.backward()
    weight = (1 / 5, 1 / 5) if normalize == "token" else (1 / 6, 1 / 4)
    expected = [[-0.5 * weight[0], -1.1 * weight[0], 0.0], [0.0, 2 * 1.5 * weight[1], 0.0]]
    assert logprobs.grad is not None
    for found, row in zip(logprobs.grad.tolist(), expected, strict=True):
        assert found == pytest.approx(row, abs=1e-6)


def test_each_side_has_its_own_clipping():
    """A token that went up under a positive advantage stops at 1 + high, one that went down under a negative at 1 - low."""
    for low, high, expected in ((0.2, 0.5, (1.5, -2 * 0.8)), (0.4, 0.2, (1.2, -2 * 0.6))):
        logprobs, batch = two_rows(((2.0, 1.0, 1.0), (0.1, 1.0)))
        total = run(GRPO(low, high), logprobs, batch).total.item()
        assert -5 * total == pytest.approx(expected[0] + 1 + 1 + expected[1] - 2, abs=1e-5)


def test_no_old_logprobs_means_that_the_policy_has_not_moved():
    logprobs, batch = two_rows(((1.0,) * 3, (1.0,) * 2))
    batch.old_logprobs = logprobs.detach().clone()
    run(GRPO(), logprobs, batch).total.backward()
    with_old = logprobs.grad.clone()
    logprobs.grad = None
    batch.old_logprobs = None
    loss = run(GRPO(), logprobs, batch)
    loss.total.backward()
    assert torch.equal(logprobs.grad, with_old) and with_old[:, :2].all()
    assert (loss.ratio_sum.item(), loss.ratio_max.item(), loss.clipped.item(), loss.old_kl.item()) == (5, 1, 0, 0)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_penalty_and_entropy_bonus_are_weighted_like_the_policy_term(normalize):
    logprobs, batch = two_rows(((1.0,) * 3, (1.0,) * 2))
    batch.reference_logprobs = logprobs.detach() + torch.tensor([[0.1, 0.2, 0.3], [0.4, -0.5, 77.0]])
    entropies = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
    k3 = [math.exp(x) - 1 - x for x in (0.1, 0.2, 0.3, 0.4, -0.5)]
    if normalize == "token":
        policy, kl, entropy = -(3 - 4) / 5, sum(k3) / 5, 15 / 5
    else:
        policy, kl, entropy = -(1 - 2) / 2, (sum(k3[:3]) / 3 + sum(k3[3:]) / 2) / 2, (2 + 4.5) / 2
    loss = run(GRPO(normalize=normalize, kl_coef=0.7, entropy_coef=0.1), logprobs, batch, entropies)
    assert loss.reference_kl.item() == pytest.approx(kl, abs=1e-6)
    assert loss.policy.item() == pytest.approx(policy, abs=1e-6)
    assert loss.total.item() == pytest.approx(policy + 0.7 * kl - 0.1 * entropy, abs=1e-5)
    assert run(GRPO(normalize=normalize), logprobs, batch, entropies).total.item() == pytest.approx(policy, abs=1e-6)


def test_what_is_needed_follows_from_the_coefficients():
    assert not GRPO().needs_reference and not GRPO().needs_entropy
    assert GRPO(kl_coef=0.1).needs_reference and GRPO(entropy_coef=-0.1).needs_entropy
    logprobs, batch = two_rows(RATIOS)
    with pytest.raises(ValueError, match="kl_coef > 0 needs reference"):
        run(GRPO(kl_coef=0.1), logprobs, batch)


def test_padding_may_hold_anything():
    logprobs, batch = two_rows(RATIOS)
    batch.reference_logprobs = batch.sampled_logprobs + 0.1
    objective = GRPO(kl_coef=0.5)
    run(objective, logprobs, batch).total.backward()
    clean = logprobs.grad.clone()
    for garbage in (1e30, -1e30, math.inf, math.nan):
        spoilt = logprobs.detach().clone()
        spoilt[1, 2] = garbage
        spoilt.requires_grad_()
        batch.old_logprobs[1, 2] = -garbage
        batch.reference_logprobs[1, 2] = garbage
        loss = run(objective, spoilt, batch)
        loss.total.backward()
        assert torch.equal(spoilt.grad, clean)
        assert all(torch.isfinite(getattr(loss, f.name)).all() for f in fields(loss))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("normalize", "batch"), ("kl_estimator", "k4"), ("clip_low", -0.1), ("clip_high", -0.1), ("clip_low", 1.0),
        ("kl_coef", -1.0), ("advantage_eps", -1e-9), ("guided_ratio", "cap"), ("shaping_gamma", 0.0),
    ],
)  # fmt: skip
def test_impossible_settings_name_their_key(key, value):
    with pytest.raises(ValueError, match=rf"objective\.{key}=") as error:
        GRPO(**{key: value})
    assert "\n" not in str(error.value)


# --- rows that were sampled under another prompt


def foreign_rows(behaviour: str, advantages=(1.0, -2.0)):
    """The two rows of above, the first from a primed prompt; neither has moved since the step began."""
    primed, plain = [-0.2, -0.1, -1.5], [-1.0, -0.5, -1.4]  # log-probs of its tokens under both prompts
    batch = TokenBatch.build(
        [(5, 6), (7,)], [(8, 9, 10), (11, 12)], [primed, [-0.7, -1.1]], [(True,) * 3, (True,) * 2],
        torch.tensor(advantages), 0, behaviours=[behaviour, "policy"],
    )  # fmt: skip
    return torch.tensor([plain, [-0.7, -1.1, 0.0]]).requires_grad_(), batch, primed, plain


@pytest.mark.parametrize("moved", [False, True])
def test_a_recomputed_row_starts_at_ratio_one_whatever_its_sampler_said(moved):
    logprobs, batch, primed, plain = foreign_rows("recompute")
    if moved:
        batch.old_logprobs = logprobs.detach().clone()
    loss = run(GRPO(), logprobs, batch)
    loss.total.backward()
    assert (loss.ratio_max.item(), loss.ratio_gap.item(), loss.clipped.item()) == (1, 0, 0)
    assert logprobs.grad.tolist()[0] == pytest.approx([-1 / 5] * 3)
    # The true ratio is reported beside it.
    true = [math.exp(q - c) for q, c in zip(plain, primed, strict=True)]
    assert loss.foreign_tokens.item() == 3
    assert loss.foreign_ratio_sum.item() == pytest.approx(sum(true))
    assert loss.foreign_ratio_max.item() == pytest.approx(max(true))
    assert loss.foreign_gap.item() == pytest.approx(sum(primed) - sum(plain), abs=1e-6)
    assert run(GRPO(), *foreign_rows("policy")[:2]).foreign_tokens.item() == 0


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("advantage", [1.0, -2.0])
def test_a_guided_row_has_the_primed_probability_below_the_bar(moved, advantage):
    """Loss and gradient by hand: ratio p(y|q) / p_old(y|p_c), clipped like any other; the plain row stays at 1."""
    logprobs, batch, primed, plain = foreign_rows("guided", (advantage, -2.0))
    if moved:
        batch.old_logprobs = logprobs.detach().clone()
    loss = run(GRPO(0.2, 0.2), logprobs, batch)
    loss.total.backward()
    ratios = [math.exp(q - c) for q, c in zip(plain, primed, strict=True)]  # 0.45, 0.67, 1.11
    terms = [min(r * advantage, min(max(r, 0.8), 1.2) * advantage) for r in ratios]
    assert loss.total.item() == pytest.approx(-(sum(terms) - 4) / 5, abs=1e-6)
    alive = [r * advantage < min(max(r, 0.8), 1.2) * advantage or 0.8 < r < 1.2 for r in ratios]
    expected = [-r * advantage / 5 if a else 0.0 for r, a in zip(ratios, alive, strict=True)]
    assert logprobs.grad.tolist()[0] == pytest.approx(expected, abs=1e-6)
    assert logprobs.grad.tolist()[1][:2] == pytest.approx([2 / 5] * 2)
    assert loss.ratio_gap.item() == 0, "the first-step check looks at rows that ought to start at 1"
    assert loss.foreign_clipped.item() == sum(not a for a in alive)
    # The step's own ratios, KL and clip fraction are those of the plain row, which has not moved.
    assert loss.own_tokens.item() == loss.ratio_sum.item() == 2 and loss.ratio_max.item() == 1
    assert loss.old_kl.item() == pytest.approx(0, abs=1e-6) and loss.clipped.item() == 0
    recomputed = foreign_rows("recompute", (advantage, -2.0))
    assert loss.total.item() != pytest.approx(run(GRPO(), *recomputed[:2]).total.item(), abs=1e-3)


def test_shaping_puts_a_bounded_function_of_the_probability_in_the_ratios_place():
    """f = p / (p + gamma), df/dlogp = p * gamma / (p + gamma)^2: largest at p = gamma, never clipped away."""
    logprobs, batch, _, plain = foreign_rows("guided")
    loss = run(GRPO(guided_ratio="shaping", shaping_gamma=0.1), logprobs, batch)
    loss.total.backward()
    p = [math.exp(x) for x in plain]
    assert loss.total.item() == pytest.approx(-(sum(x / (x + 0.1) for x in p) - 4) / 5, abs=1e-6)
    assert logprobs.grad.tolist()[0] == pytest.approx([-x * 0.1 / (x + 0.1) ** 2 / 5 for x in p], abs=1e-6)
    assert logprobs.grad.tolist()[1][:2] == pytest.approx([2 / 5] * 2), "other rows keep their ratio"
    for behaviour in ("recompute", "policy"):
        rows = foreign_rows(behaviour)[:2]
        assert run(GRPO(guided_ratio="shaping"), *rows).total.item() == run(GRPO(), *rows).total.item()


def test_padding_of_a_guided_row_may_hold_anything():
    for objective in (GRPO(), GRPO(guided_ratio="shaping")):
        grads = []
        for garbage in (0.0, 1e30, -1e30, math.inf, math.nan):
            logprobs, batch, _, _ = foreign_rows("guided")
            batch.guided = batch.foreign = torch.tensor([True, True])
            spoilt = logprobs.detach().clone()
            spoilt[1, 2] = garbage
            loss = run(objective, spoilt.requires_grad_(), batch)
            loss.total.backward()
            grads.append(spoilt.grad)
            assert all(torch.isfinite(getattr(loss, f.name)).all() for f in fields(loss))
        assert all(torch.equal(g, grads[0]) for g in grads)


# --- one gradient for every way to cut the batch, through a real model


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny(seed=12, scale=4.0)


@pytest.fixture
def batch(model, make_batch) -> TokenBatch:
    """Old log-probs near the current ones, so that some tokens are clipped and most are not."""
    batch = make_batch()
    with torch.no_grad():
        now, _ = answer_logprobs(model, batch)
    noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(2)) * 0.2
    batch.old_logprobs, batch.reference_logprobs = now + noise, now - 0.3
    batch.sampled_logprobs = now - 3 * noise  # what a correction weighs
    return batch


def gradient(model, objective: GRPO, parts, denominators) -> torch.Tensor:
    """All gradients in one vector, added up over the parts."""
    model.zero_grad()
    for part, denominator in zip(parts, denominators, strict=True):
        logprobs, entropies = answer_logprobs(model, part, entropy=objective.needs_entropy)
        objective.loss(logprobs, entropies, part, denominator).total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def padded(batch: TokenBatch, left: int, right: int) -> TokenBatch:
    """The same rows with more padding on both sides, filled with ids that would matter if they were seen."""

    def pad(t, before, after, value):
        return torch.nn.functional.pad(t, (before, after), value=value)

    return TokenBatch(
        pad(batch.ids, left, right, 17), pad(batch.attention_mask, left, right, 0), pad(batch.positions, left, right, 0),
        pad(batch.train_mask, 0, right, False), batch.advantages,
        pad(batch.sampled_logprobs, 0, right, 0.0), batch.foreign, batch.guided,
        *(pad(t, 0, right, 0.0) for t in (batch.old_logprobs, batch.reference_logprobs)),
    )  # fmt: skip


CUTS = {
    "row by row": [[i] for i in range(7)],
    "two parts": [[0, 1, 2], [3, 4, 5, 6]],
    "another order": [[6, 2, 4, 0, 5, 3, 1]],
    "uneven parts in another order": [[5], [6, 1, 0, 3, 2], [4]],
}
OBJECTIVES = {
    "token": GRPO(),
    "sequence": GRPO(normalize="sequence"),
    "token with penalty and entropy": GRPO(kl_coef=0.3, entropy_coef=0.05),
    "sequence with penalty and entropy": GRPO(normalize="sequence", kl_coef=0.3, entropy_coef=0.05),
    "weights of tokens": GRPO(kl_coef=0.3, correction="truncate"),
    "weights of answers": GRPO(
        normalize="sequence", correction="mask", correction_level="sequence_mean", correction_high=9
    ),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_gradient_does_not_depend_on_the_cut(model, batch, objective):
    denominator = objective.denominator(batch.train_mask)
    whole = gradient(model, objective, [batch], [denominator])
    assert whole.abs().max() > 0
    for name, cut in CUTS.items():
        parts = [batch.select(torch.tensor(rows)) for rows in cut]
        assert distance(whole, gradient(model, objective, parts, [denominator] * len(parts))) < 2e-5, name
    wide = gradient(model, objective, [padded(batch, 9, 5)], [denominator])
    assert distance(whole, wide) < 2e-5


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_averaging_each_part_by_itself_would_give_another_gradient(model, batch, normalize):
    """The control of the test above: it can tell the common mistake from the right sum."""
    objective = GRPO(normalize=normalize)
    whole = gradient(model, objective, [batch], [objective.denominator(batch.train_mask)])
    parts = [batch.select(torch.tensor(rows)) for rows in CUTS["uneven parts in another order"]]
    averaged = gradient(model, objective, parts, [objective.denominator(p.train_mask) * len(parts) for p in parts])
    assert distance(whole, averaged) > 0.05


def test_denominators_count_tokens_or_rows_that_have_any(batch):
    assert GRPO().denominator(batch.train_mask).item() == 5 + 2 + 3 + 7 + 1 + 9 + 4
    mask = batch.train_mask.clone()
    mask[4] = False
    assert GRPO(normalize="sequence").denominator(mask).item() == 6
    parts = [GRPO().denominator(batch.select(torch.tensor(rows)).train_mask) for rows in CUTS["two parts"]]
    assert sum(parts).item() == GRPO().denominator(batch.train_mask).item()


def test_rows_without_advantage_may_be_skipped_unless_something_else_trains_on_them(model, batch):
    used = batch.select(batch.advantages != 0)
    assert used.rows == 5
    for objective, same in ((GRPO(), True), (GRPO(normalize="sequence"), True), (GRPO(kl_coef=0.3), False)):
        denominator = objective.denominator(batch.train_mask)
        whole = gradient(model, objective, [batch], [denominator])
        skipped = gradient(model, objective, [used], [denominator])
        assert (distance(whole, skipped) < 2e-5) is same


def test_tokens_outside_the_mask_are_context_and_nothing_more(model, batch):
    """They get no gradient of their own; the trained tokens all do, unless clipped away or without advantage."""
    objective = GRPO(clip_low=0.99, clip_high=100.0)
    logprobs, entropies = answer_logprobs(model, batch)
    logprobs.retain_grad()
    objective.loss(logprobs, entropies, batch, objective.denominator(batch.train_mask)).total.backward()
    trained = batch.train_mask & (batch.advantages != 0)[:, None]
    assert torch.equal(logprobs.grad != 0, trained)
    before = gradient(model, objective, [batch], [torch.tensor(1.0)])
    changed = batch.select(slice(0, 7))
    # What the sampler or the reference said about tokens that the policy did not write has no effect at all.
    for values in (changed.old_logprobs, changed.reference_logprobs, changed.sampled_logprobs):
        values[~changed.train_mask] += 3.0
    assert torch.equal(gradient(model, objective, [changed], [torch.tensor(1.0)]), before)
    changed.train_mask = torch.ones_like(changed.train_mask)
    assert distance(before, gradient(model, objective, [changed], [torch.tensor(1.0)])) > 0.05


def test_a_step_down_the_gradient_makes_good_answers_likelier(make_tiny, make_batch):
    model, batch = make_tiny(seed=13, scale=4.0), make_batch()
    objective = GRPO(normalize="sequence")
    before, _ = answer_logprobs(model, batch)
    model.zero_grad()
    objective.loss(before, before * 0, batch, objective.denominator(batch.train_mask)).total.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad / max(1.0, float(parameter.grad.norm()))
        after, _ = answer_logprobs(model, batch)
    weights = batch.train_mask / batch.train_mask.sum(1, keepdim=True)
    assert float((((after - before.detach()) * weights).sum(1) * batch.advantages).sum()) > 0
