"""Guards the distance between sampler and trainer and its correction: by hand, and by enumerating all answers."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields

import pytest
import torch

from core_torl.objective.grpo import GRPO
from core_torl.objective.mismatch import Correction, measure
from core_torl.objective.token_batch import TokenBatch
from core_torl.sampler.draw import token_logprobs
from core_torl.sampler.protocol import SamplingConfig

LOW, HIGH = 0.5, 2.0
# p_trainer / p_sampler of five tokens in two answers; the second answer has an observation in its middle.
RATIOS = torch.tensor([[0.4, 1.0, 3.0], [1.5, 9.0, 2.0]])
MASK = torch.tensor([[True, True, True], [True, False, True]])
TRAINER = torch.tensor([[-1.0, -0.5, -2.0], [-0.7, -3.0, -1.1]])


def weights_of(kind: str, level: str, low: float = LOW, high: float = HIGH) -> tuple[list, list]:
    weights, bounded = Correction(kind, level, low, high).weights(TRAINER, TRAINER - RATIOS.log(), MASK)
    return weights.flatten().tolist(), bounded.flatten().tolist()


# --- the weights by hand


@pytest.mark.parametrize(
    ("kind", "level", "expected", "bounded"),
    [
        ("truncate", "token", [0.4, 1.0, 2.0, 1.5, 1.0, 2.0], [0, 0, 1, 0, 0, 0]),
        ("mask", "token", [0.0, 1.0, 0.0, 1.5, 1.0, 2.0], [1, 0, 1, 0, 0, 0]),
        # Products 1.2 and 3; the token in the middle of the second answer was not drawn.
        ("truncate", "sequence", [1.2] * 3 + [2.0, 1.0, 2.0], [0, 0, 0, 1, 0, 1]),
        ("mask", "sequence", [1.2] * 3 + [0.0, 1.0, 0.0], [0, 0, 0, 1, 0, 1]),
        ("truncate", "sequence_mean", [1.2 ** (1 / 3)] * 3 + [3**0.5, 1.0, 3**0.5], [0] * 6),
    ],
)
def test_weights_by_hand(kind, level, expected, bounded):
    weights, changed = weights_of(kind, level)
    assert weights == pytest.approx(expected, rel=1e-5)
    assert changed == [bool(b) for b in bounded]


def test_the_mean_of_an_answer_is_bounded_like_any_weight():
    weights, bounded = weights_of("mask", "sequence_mean", 0.9, 1.1)
    assert weights == pytest.approx([1.2 ** (1 / 3)] * 3 + [0.0, 1.0, 0.0], rel=1e-5)
    assert bounded == [False] * 3 + [True, False, True]


def test_weights_on_a_bound_stay_and_an_exact_sampler_weighs_one():
    edges = torch.tensor([[0.5, 2.0, 0.499, 2.001]])
    zero, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    weights, bounded = Correction("mask").weights(edges.log(), zero, mask)
    assert weights[0].tolist() == pytest.approx([0.5, 2.0, 0.0, 0.0]) and bounded[0].tolist() == [
        False,
        False,
        True,
        True,
    ]
    for kind, level in itertools.product(("truncate", "mask"), ("token", "sequence", "sequence_mean")):
        weights, bounded = Correction(kind, level, 1.0, 1.0).weights(TRAINER, TRAINER, MASK)
        assert torch.equal(weights, torch.ones(2, 3)) and not bounded.any()


def test_what_no_probability_and_no_number_make_of_a_weight():
    trainer = torch.tensor([[-math.inf, -1.0, -1.0, -1.0]])
    sampler = torch.tensor([[-1.0, -math.inf, math.nan, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    for kind, at_infinity in (("truncate", 2.0), ("mask", 0.0)):
        weights, bounded = Correction(kind).weights(trainer, sampler, mask)
        assert weights[0, [0, 1, 3]].tolist() == [0.0, at_infinity, 1.0]
        assert weights[0, 2].isnan(), "a broken sampler has to show"
        assert bounded[0].tolist() == [kind == "mask", True, False, False]
    # A whole answer has no probability if one token has none.
    weights, _ = Correction("truncate", "sequence").weights(trainer, torch.full((1, 4), -1.0), mask)
    assert weights.tolist() == [[0.0] * 4]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"correction": "tis"}, r"objective\.correction='tis': use one of none, truncate, mask"),
        ({"correction_level": "answer"}, r"objective\.correction_level='answer'"),
        ({"correction_low": 1.1}, r"objective\.correction_low=1\.1"),
        ({"correction_low": -0.1}, r"objective\.correction_low=-0\.1"),
        ({"correction_high": 0.9}, r"objective\.correction_high=0\.9"),
        ({"correction_high": math.nan}, r"objective\.correction_high=nan"),
    ],
)
def test_impossible_settings_name_their_key(settings, says):
    with pytest.raises(ValueError, match=says) as error:
        GRPO(**settings)
    assert "\n" not in str(error.value)


# --- in the loss


def rows(behaviours=("policy", "policy"), advantages=(1.0, -2.0)) -> tuple[torch.Tensor, TokenBatch]:
    sampled = (TRAINER - RATIOS.log()).tolist()
    batch = TokenBatch.build(
        [(5, 6), (7,)], [(8, 9, 10), (11, 12, 13)], sampled, MASK.tolist(), torch.tensor(advantages), 0,
        behaviours=behaviours,
    )  # fmt: skip
    return TRAINER.clone().requires_grad_(), batch


def run(objective: GRPO, logprobs, batch, entropies=None):
    entropies = torch.zeros_like(logprobs) if entropies is None else entropies
    return objective.loss(logprobs, entropies, batch, objective.denominator(batch.train_mask))


WEIGHTS = {
    ("truncate", "token"): [[0.4, 1.0, 2.0], [1.5, 0.0, 2.0]],
    ("mask", "token"): [[0.0, 1.0, 0.0], [1.5, 0.0, 2.0]],
    ("truncate", "sequence"): [[1.2] * 3, [2.0, 0.0, 2.0]],
    ("mask", "sequence"): [[1.2] * 3, [0.0] * 3],
}


@pytest.mark.parametrize(("kind", "level"), WEIGHTS)
@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("moved", [False, True])
def test_loss_and_gradient_by_hand(kind, level, normalize, moved):
    """Every token's loss times its weight, over the denominator of all trained tokens, dropped ones too."""
    logprobs, batch = rows()
    if moved:  # the weight is that of the step's start, whatever the policy does afterwards
        batch.old_logprobs = TRAINER.clone()
        logprobs = (TRAINER + math.log(1.1)).requires_grad_()
    ratio = 1.1 if moved else 1.0
    loss = run(GRPO(0.2, 0.3, normalize, correction=kind, correction_level=level), logprobs, batch)
    loss.total.backward()
    share = torch.tensor([[1 / 5], [1 / 5]] if normalize == "token" else [[1 / 6], [1 / 4]])
    advantage = torch.tensor([[1.0], [-2.0]])
    weights = torch.tensor(WEIGHTS[kind, level])
    expected = -ratio * advantage * weights * share
    assert torch.allclose(logprobs.grad, expected, atol=1e-6)
    assert loss.total.item() == pytest.approx(expected.sum().item(), abs=1e-6)
    assert loss.weighed_tokens.item() == 5
    assert loss.weight_sum.item() == pytest.approx(weights.sum().item(), rel=1e-5)
    assert loss.ratio_max.item() == pytest.approx(ratio), "the step's own ratio is not the correction"


def test_penalty_and_entropy_bonus_are_weighed_like_the_policy_term():
    logprobs, batch = rows()
    batch.reference_logprobs = TRAINER + 0.3
    entropies = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 5.0]])
    loss = run(GRPO(kl_coef=0.7, entropy_coef=0.1, correction="mask"), logprobs, batch, entropies)
    weights = torch.tensor(WEIGHTS["mask", "token"])
    k3 = math.exp(0.3) - 1.3
    assert loss.reference_kl.item() == pytest.approx(weights.sum().item() * k3 / 5, rel=1e-4)
    policy = -(1.0 - 2 * 3.5) / 5
    entropy = (2.0 + 1.5 * 4 + 2 * 5) / 5
    assert loss.total.item() == pytest.approx(policy + 0.7 * loss.reference_kl.item() - 0.1 * entropy, rel=1e-5)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_an_exact_sampler_is_not_corrected(kind, level):
    found = []
    for objective in (GRPO(), GRPO(correction=kind, correction_level=level)):
        logprobs, batch = rows()
        batch.sampled_logprobs = TRAINER.clone()
        batch.reference_logprobs = TRAINER + 0.1
        loss = run(objective, logprobs, batch)
        loss.total.backward()
        found.append((loss.total.item(), logprobs.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6) and torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_rows_of_another_prompt_are_left_alone():
    """Their sampler read another prompt: the quotient is no mismatch."""
    for behaviour in ("recompute", "guided"):
        found = []
        for objective in (GRPO(), GRPO(correction="mask")):
            logprobs, batch = rows((behaviour, "policy"))
            loss = run(objective, logprobs, batch)
            loss.total.backward()
            found.append(logprobs.grad[0])
        assert torch.equal(*found) and found[0].any()
        assert loss.weighed_tokens.item() == 2 and loss.weight_sum.item() == pytest.approx(3.5)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_where_nothing_is_left_the_loss_is_zero_and_so_is_the_gradient(level):
    logprobs, batch = rows()
    batch.sampled_logprobs = TRAINER - 5.0
    batch.reference_logprobs = TRAINER + 0.1
    objective = GRPO(kl_coef=0.5, entropy_coef=0.1, correction="mask", correction_level=level)
    loss = run(objective, logprobs, batch, torch.ones(2, 3))
    loss.total.backward()
    assert loss.total.item() == 0 and not logprobs.grad.any() and loss.bounded.item() == 5
    batch.train_mask = torch.zeros_like(batch.train_mask)  # an observation, or answers that nobody could judge
    loss = objective.loss(logprobs, torch.ones(2, 3), batch, torch.tensor(1.0))
    assert loss.total.item() == loss.weighed_tokens.item() == loss.bounded.item() == 0


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_token_without_probability_gives_no_gradient_and_a_finite_loss(kind, level, recomputed):
    _, batch = rows()
    start = TRAINER.clone()
    start[0, 1] = -math.inf
    if recomputed:
        batch.old_logprobs = start.clone()
    batch.reference_logprobs = start + 0.1
    batch.sampled_logprobs = TRAINER.clone()
    leaf = start.requires_grad_()
    objective = GRPO(kl_coef=0.1, entropy_coef=0.1, correction=kind, correction_level=level)
    entropies = torch.tensor([[1.0, math.nan, 1.0], [1.0, 1.0, 1.0]])
    loss = run(objective, leaf, batch, entropies)
    loss.total.backward()
    assert all(torch.isfinite(getattr(loss, f.name)).all() for f in fields(loss) if "foreign" not in f.name)
    assert torch.isfinite(leaf.grad).all() and leaf.grad[0, 1] == 0
    dead = leaf.grad[0].eq(0).tolist()
    assert dead == ([False, True, False] if level == "token" else [True] * 3)
    assert leaf.grad[1, 0] != 0
    # The control: uncorrected, the quotient of two zeros reaches the loss.
    assert run(GRPO(), leaf.detach(), batch).total.isnan()


def test_a_sampler_that_reports_nan_makes_the_loss_nan():
    for kind, level in WEIGHTS:
        logprobs, batch = rows()
        batch.sampled_logprobs[0, 1] = math.nan
        assert run(GRPO(correction=kind, correction_level=level), logprobs, batch).total.isnan()
        logprobs, batch = rows()
        batch.sampled_logprobs[1, 1] = math.nan  # of an observation: nobody reads it
        assert run(GRPO(correction=kind, correction_level=level), logprobs, batch).total.isfinite()


# --- every answer of a small world, so that a mean over samples is exact


VOCABULARY, LENGTH = 3, 2
ANSWERS = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [9, 2]
REWARDS = torch.tensor([0.3, -1.0, 2.0, 0.1, 1.4, -0.6, -2.0, 0.9, 0.5], dtype=torch.float64)


@pytest.fixture
def logits() -> torch.Tensor:
    """A policy: logits of the first token, and of the second behind each first one. [1 + vocabulary, vocabulary]"""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(1 + VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()


def answer_logprobs(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probs of the tokens of all answers: [9, 2]."""
    return torch.stack([logprobs[0, ANSWERS[:, 0]], logprobs[1 + ANSWERS[:, 0], ANSWERS[:, 1]]], dim=1)


def mean_gradient(objective: GRPO, logits: torch.Tensor, sampler: torch.Tensor) -> torch.Tensor:
    """The loss's mean gradient over answers that ``sampler`` draws; sampler: [1 + vocabulary, vocabulary] log-probs.

    At the step's start the loss is linear in the advantage, so an answer's probability goes in there.
    """
    drawn = answer_logprobs(sampler)
    rows = drawn.isfinite().all(dim=1).nonzero().flatten()  # the others are never drawn
    count = len(rows)
    batch = TokenBatch.build(
        [(5,)] * count, ANSWERS[rows].tolist(), [[0.0] * LENGTH] * count, [[True] * LENGTH] * count, REWARDS[rows], 0
    )
    batch.advantages, batch.sampled_logprobs = (REWARDS * drawn.sum(dim=1).exp())[rows], drawn[rows]
    logprobs = answer_logprobs(logits.log_softmax(dim=-1))[rows]
    loss = objective.loss(logprobs, torch.zeros_like(logprobs), batch, torch.tensor(1.0)).total
    return torch.autograd.grad(loss, logits)[0]


def policy_gradient(logits: torch.Tensor, drawable: torch.Tensor | None = None) -> torch.Tensor:
    """Minus the gradient of the policy's mean reward, over all answers or over the ``drawable`` ones: [9] bool."""
    probability = answer_logprobs(logits.log_softmax(dim=-1)).sum(dim=1).exp()
    counted = torch.ones(9) if drawable is None else drawable.double()
    return -torch.autograd.grad((probability * REWARDS * counted).sum(), logits)[0]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def biased(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """A sampler that is not the policy: another temperature, or logits of slightly other weights."""
    logits = logits.detach()
    if kind == "temperature":
        return (logits / 0.6).log_softmax(dim=-1)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return (logits + 0.5 * noise).log_softmax(dim=-1)


@pytest.mark.parametrize("kind", ["temperature", "noise"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_the_product_of_weights_gives_the_policys_own_gradient_whatever_the_sampler(logits, kind, correction):
    exact, sampler = policy_gradient(logits), biased(logits, kind)
    unbounded = GRPO(correction=correction, correction_level="sequence", correction_low=0.0, correction_high=math.inf)
    assert apart(mean_gradient(unbounded, logits, sampler), exact) < 1e-9
    uncorrected = apart(mean_gradient(GRPO(), logits, sampler), exact)
    assert uncorrected > 0.1, "the control: without a correction it is another gradient"
    # One weight a token leaves the rest of the answer uncorrected, which may be nearer or not.
    by_token = GRPO(correction=correction, correction_low=0.0, correction_high=math.inf)
    assert apart(mean_gradient(by_token, logits, sampler), exact) > 0.02
    # Bounds are a bias: the price of a bounded variance.
    bounded = GRPO(correction=correction, correction_level="sequence", correction_low=0.9, correction_high=1.1)
    assert apart(mean_gradient(bounded, logits, sampler), exact) > 1e-3


@pytest.mark.parametrize("kind", ["temperature", "noise"])
def test_one_weight_a_token_is_exact_where_answers_have_one_token(logits, kind):
    """And so is the ratio against the sampler, which is what PPO takes for its old policy, until its clip cuts in."""
    sampler, rewards = biased(logits, kind)[0], REWARDS[:VOCABULARY]
    policy = logits[0].log_softmax(dim=-1)
    exact = -torch.autograd.grad((policy.exp() * rewards).sum(), logits, retain_graph=True)[0]
    batch = TokenBatch.build([(5,)] * 3, [(0,), (1,), (2,)], [(0.0,)] * 3, [(True,)] * 3, rewards, 0)
    batch.advantages, batch.sampled_logprobs = rewards * sampler.exp(), sampler[:, None]

    def gradient(objective: GRPO, old: torch.Tensor | None = None) -> torch.Tensor:
        batch.old_logprobs = old
        loss = objective.loss(policy[:, None], torch.zeros(3, 1), batch, torch.tensor(1.0)).total
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    assert apart(gradient(GRPO(correction="truncate", correction_high=math.inf)), exact) < 1e-9
    assert apart(gradient(GRPO(0.99, 1e9), batch.sampled_logprobs), exact) < 1e-9
    assert apart(gradient(GRPO()), exact) > 0.05


def test_with_the_policy_as_its_sampler_every_objective_has_the_policys_gradient(logits):
    exact, sampler = policy_gradient(logits), logits.detach().log_softmax(dim=-1)
    for objective in (GRPO(), GRPO(correction="mask"), GRPO(correction="truncate", correction_level="sequence")):
        assert apart(mean_gradient(objective, logits, sampler), exact) < 1e-9


@pytest.mark.parametrize("sampling", [{"top_k": 2}, {"top_p": 0.75}, {"min_p": 0.3}, {"top_p": 0.8, "min_p": 0.2}])
def test_under_truncated_sampling_the_corrected_gradient_is_the_policys_own_over_what_can_be_drawn(logits, sampling):
    """The sampler's log-probs are those of the tokens that are left; the weight is the probability of all of these."""
    sampler = token_logprobs(logits.detach(), SamplingConfig(max_new_tokens=2, **sampling)).double()
    drawable = answer_logprobs(sampler).isfinite().all(dim=1)
    assert 1 < drawable.sum() < 9
    exact = policy_gradient(logits, drawable)
    corrected = GRPO(correction="truncate", correction_level="sequence")
    assert apart(mean_gradient(corrected, logits, sampler), exact) < 1e-9
    wrong = mean_gradient(GRPO(), logits, sampler)
    assert apart(wrong, exact) > 0.1, "the control: uncorrected it is another gradient"
    scale = (wrong * exact).sum() / wrong.square().sum()
    assert apart(wrong * scale, exact) > 0.02, "and not just a longer one"


# --- the distance that is logged


def test_the_distance_by_hand():
    found = measure(TRAINER, TRAINER - RATIOS.log(), MASK)
    flat = [0.4, 1.0, 3.0, 1.5, 2.0]
    logs = [math.log(r) for r in flat]
    assert found.tokens.item() == 5
    assert found.gap_sum.item() == pytest.approx(sum(map(abs, logs)), rel=1e-5)
    assert found.gap_max.item() == pytest.approx(math.log(3), rel=1e-5)
    assert found.kl_sum.item() == pytest.approx(sum(r - 1 - x for r, x in zip(flat, logs, strict=True)), rel=1e-5)
    assert found.ratio_sum.item() == pytest.approx(7.9, rel=1e-5)
    assert found.ratio_max.item() == pytest.approx(3.0, rel=1e-5)
    assert found.outside.item() == 4
    assert found.sequence_ratio_max.item() == pytest.approx(3**0.5, rel=1e-5)
    assert found.sequence_ratio_min.item() == pytest.approx(1.2 ** (1 / 3), rel=1e-5)


def test_the_kl_is_that_of_the_sampler_from_the_trainer(logits):
    """Over all answers with their probabilities the mean of the estimate is KL(sampler, trainer) itself."""
    sampler, policy = biased(logits, "noise")[:1], logits.detach().log_softmax(dim=-1)[:1]
    exact = (sampler.exp() * (sampler - policy)).sum()
    each = [measure(policy[:, i, None], sampler[:, i, None], torch.ones(1, 1, dtype=torch.bool)) for i in range(3)]
    mean = sum(sampler[0, i].exp() * each[i].kl_sum for i in range(3))
    assert mean.item() == pytest.approx(exact.item(), rel=1e-9)
    assert exact > 0.01 and mean.item() != pytest.approx((policy.exp() * (policy - sampler)).sum().item(), rel=1e-3)


def test_what_is_not_compared_may_hold_anything_and_a_compared_nan_shows():
    clean = measure(TRAINER, TRAINER - RATIOS.log(), MASK)
    sampler = TRAINER - RATIOS.log()
    sampler[1, 1] = math.nan
    other = measure(TRAINER, sampler, MASK)
    assert all(torch.equal(getattr(clean, f.name), getattr(other, f.name)) for f in fields(clean))
    sampler[0, 0] = math.nan
    broken = measure(TRAINER, sampler, MASK)
    assert broken.outside.item() == 4 and broken.tokens.item() == 5
    rest = [f.name for f in fields(broken) if f.name not in ("outside", "tokens")]
    assert all(getattr(broken, name).isnan() for name in rest)


def test_no_probability_is_the_largest_distance_and_nothing_compared_is_none():
    trainer = TRAINER.clone()
    trainer[0, 0] = -math.inf
    found = measure(trainer, TRAINER, MASK)
    assert found.gap_max == math.inf and found.kl_sum > 18 and found.sequence_ratio_min == 0 and found.outside == 1
    none = measure(TRAINER, TRAINER, torch.zeros_like(MASK))
    assert none.tokens == none.gap_sum == none.kl_sum == none.ratio_max == none.sequence_ratio_max == none.outside == 0
    assert none.sequence_ratio_min == math.inf
