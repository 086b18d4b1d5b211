"""Guards supervised fine-tuning's loss: torch's cross-entropy on the trained tokens, whatever the answers earned."""

from __future__ import annotations

import pytest
import torch

from core_torl.objective.grpo import GRPO
from core_torl.objective.likelihood import Likelihood
from core_torl.objective.logprobs import answer_logprobs


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny(seed=14, scale=4.0)


def loss_of(objective, model, batch):
    logprobs, entropies = answer_logprobs(model, batch)
    return objective.loss(logprobs, entropies, batch, objective.denominator(batch.train_mask))


def logits_of(model, batch) -> torch.Tensor:
    logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.positions).logits
    return logits[:, -batch.answer_length - 1 : -1]


def test_it_is_torchs_cross_entropy_with_its_gradient(model, make_batch):
    batch = make_batch()
    logits, mask = logits_of(model, batch), batch.train_mask
    right = torch.nn.functional.cross_entropy(logits[mask], batch.answer_ids[mask])
    model.zero_grad()
    right.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = loss_of(Likelihood(), model, batch)
    loss.total.backward()
    assert loss.total.item() == loss.policy.item() == pytest.approx(right.item(), rel=1e-5)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-6 * max(1.0, float(grad.abs().max())))
    assert max(g.abs().max() for g in expected) > 1e-3


def test_by_sequence_every_answer_weighs_the_same(model, make_batch):
    batch = make_batch()
    logits = logits_of(model, batch)
    means = [
        torch.nn.functional.cross_entropy(logits[i][batch.train_mask[i]], batch.answer_ids[i][batch.train_mask[i]])
        for i in range(batch.rows)
    ]
    found = loss_of(Likelihood("sequence"), model, batch).total.item()
    assert found == pytest.approx(sum(x.item() for x in means) / 7, rel=1e-5)
    assert found != pytest.approx(loss_of(Likelihood(), model, batch).total.item(), rel=1e-3)


def test_what_an_answer_earned_does_not_matter():
    objective = Likelihood()
    rewards = torch.tensor([[0.0], [1.0], [-3.0]])
    assert objective.advantages(rewards, torch.ones(3, 1, dtype=torch.bool)).tolist() == [[1.0]] * 3
    assert not objective.needs_reference and not objective.needs_entropy and not objective.corrects


def test_advantages_and_old_logprobs_have_no_say(model, make_batch):
    batch, other = make_batch(), make_batch()
    other.advantages, other.old_logprobs = -7 * batch.advantages, batch.sampled_logprobs - 3
    other.sampled_logprobs = batch.sampled_logprobs * 2
    assert loss_of(Likelihood(), model, batch).total.item() == loss_of(Likelihood(), model, other).total.item()


def test_the_gradient_is_that_of_the_likelihood_also_after_the_policy_has_moved(model, make_batch):
    """A clipped ratio would stop learning, in the second minibatch, what the first has just begun to teach."""
    batch = make_batch()
    for moved in (-1.0, 0.0, 1.0):
        logprobs, entropies = answer_logprobs(model, batch)
        leaf = logprobs.detach().requires_grad_()
        batch.old_logprobs = leaf.detach() - moved
        loss = Likelihood().loss(leaf, entropies, batch, torch.tensor(31.0))
        loss.total.backward()
        assert torch.allclose(leaf.grad, -batch.train_mask.float() / 31)
        assert loss.clipped.item() == 0


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_the_penalty_is_grpos_and_comes_on_top(model, make_batch, normalize):
    batch, objective = make_batch(), Likelihood(normalize, kl_coef=0.7)
    assert objective.needs_reference
    logprobs, entropies = answer_logprobs(model, batch)
    batch.reference_logprobs = logprobs.detach() + 0.4
    found, grads = [], []
    for each in (objective, Likelihood(normalize), GRPO(normalize=normalize, kl_coef=0.7), GRPO(normalize=normalize)):
        leaf = logprobs.detach().requires_grad_()
        loss = each.loss(leaf, entropies, batch, objective.denominator(batch.train_mask))
        loss.total.backward()
        found.append(loss)
        grads.append(leaf.grad)
    assert found[0].total.item() == pytest.approx(found[1].total.item() + 0.7 * found[0].reference_kl.item(), rel=1e-6)
    assert found[0].policy.item() == found[1].total.item() and found[0].reference_kl.item() > 0.01
    assert torch.allclose(grads[0] - grads[1], grads[2] - grads[3], atol=1e-7)
    assert (grads[0] - grads[1]).abs().max() > 1e-3


def test_padding_may_hold_anything(model, make_batch):
    batch = make_batch()
    logprobs, entropies = answer_logprobs(model, batch)
    spoilt = torch.where(batch.train_mask, logprobs.detach(), torch.nan).requires_grad_()
    loss = Likelihood().loss(spoilt, entropies, batch, torch.tensor(31.0))
    loss.total.backward()
    assert torch.isfinite(loss.total) and torch.allclose(spoilt.grad, -batch.train_mask.float() / 31)


def test_an_unknown_normalizer_names_its_key():
    with pytest.raises(ValueError, match=r"objective\.normalize='batch'"):
        Likelihood("batch")
