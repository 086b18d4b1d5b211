"""Guards answer log-probs: those of a plain forward pass over the unpadded text, however they are computed."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from core_torl.objective import logprobs as logprobs_module
from core_torl.objective.logprobs import answer_logprobs


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny(seed=11, scale=4.0)


def plain(model, batch, temperature: float):
    """Row by row, without padding: log-probs and entropies of every answer token, in lists."""
    logprobs, entropies = [], []
    for i in range(batch.rows):
        ids = batch.ids[i][batch.attention_mask[i].bool()]
        count = int(batch.attention_mask[i, batch.ids.shape[1] - batch.answer_length :].sum())
        rows = torch.log_softmax(model(input_ids=ids[None]).logits[0].double() / temperature, dim=-1)
        rows = rows[len(ids) - count - 1 : -1]
        logprobs.append(rows.gather(1, ids[-count:, None])[:, 0])
        entropies.append(-(rows.exp() * rows).sum(1))
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_they_equal_a_plain_forward(model, make_batch, temperature):
    batch = make_batch()
    with torch.no_grad():
        found, entropies = answer_logprobs(model, batch, temperature, entropy=True)
        right, right_entropies = plain(model, batch, temperature)
    assert found.shape == entropies.shape == (7, 12)
    for i in range(batch.rows):
        assert torch.allclose(found[i, : len(right[i])].double(), right[i], atol=1e-5)
        assert torch.allclose(entropies[i, : len(right[i])].double(), right_entropies[i], atol=1e-5)


def test_positions_count_from_the_first_real_token(make_batch):
    """With learned absolute positions, left padding would shift every token; rotary ones would not show it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        absolute = GPT2LMHeadModel(GPT2Config(vocab_size=700, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3))
    batch = make_batch()
    with torch.no_grad():
        found, _ = answer_logprobs(absolute.eval(), batch)
        right, _ = plain(absolute, batch, 1.0)
    for i in range(batch.rows):
        assert torch.allclose(found[i, : len(right[i])].double(), right[i], atol=1e-5)


def test_entropy_costs_nothing_unless_it_is_asked_for(model, make_batch):
    with torch.no_grad():
        _, entropies = answer_logprobs(model, make_batch())
    assert not entropies.any()


@pytest.mark.parametrize("tokens", [0, 10, 83])
@pytest.mark.parametrize("entropy", [False, True])
def test_slices_change_neither_values_nor_gradients(model, make_batch, monkeypatch, tokens, entropy):
    batch = make_batch()

    def run():
        model.zero_grad()
        found, entropies = answer_logprobs(model, batch, 0.8, entropy)
        ((found + 0.3 * entropies) * batch.train_mask * batch.advantages[:, None]).sum().backward()
        return found.detach(), entropies.detach(), [p.grad.clone() for p in model.parameters()]

    whole = run()
    calls = []
    checkpoint = logprobs_module.checkpoint
    monkeypatch.setattr(logprobs_module, "checkpoint", lambda *a, **kw: calls.append(1) or checkpoint(*a, **kw))
    monkeypatch.setattr(logprobs_module, "_SLICE_ELEMENTS", tokens * model.config.vocab_size)
    sliced = run()
    assert len(calls) > 1, "the sliced branch was not taken"
    assert torch.allclose(whole[0], sliced[0], atol=1e-6) and torch.allclose(whole[1], sliced[1], atol=1e-6)
    for one, other in zip(whole[2], sliced[2], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


def test_only_answer_places_go_through_the_head(model, make_batch):
    batch, seen = make_batch(), []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    with torch.no_grad():
        answer_logprobs(model, batch)
    handle.remove()
    assert seen == [(7, 13)]


def test_half_precision_models_get_single_precision_logprobs(make_tiny, make_batch):
    with torch.no_grad():
        found, _ = answer_logprobs(make_tiny(seed=11).to(torch.bfloat16), make_batch())
    assert found.dtype == torch.float32
