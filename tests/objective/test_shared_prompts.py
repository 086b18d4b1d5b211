"""Joining the answers to one prompt gives the log-probs and the gradient of separate rows, for every layout."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from core_torl.objective import logprobs as module
from core_torl.objective.logprobs import answer_logprobs
from core_torl.objective.shared_prompts import can_share, join, prompt_groups, worth_sharing
from core_torl.objective.token_batch import TokenBatch

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip


def make_model(kind: str = "llama", attention: str = "sdpa"):
    torch.manual_seed(0)
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**SIZES)
    model = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[kind]._from_config(
        config, attn_implementation=attention
    )
    for parameter in model.parameters():  # an untrained model is too flat to show a wrong mask
        parameter.data.mul_(4)
    return model


def make_batch(shape=((20, (3, 7, 5, 1)), (14, (6, 2)), (17, (4,)))) -> TokenBatch:
    rng = torch.Generator().manual_seed(1)
    prompts, answers = [], []
    for length, lengths in shape:
        prompt = torch.randint(1, 50, (length,), generator=rng).tolist()
        for n in lengths:
            prompts.append(prompt)
            answers.append(torch.randint(1, 50, (n,), generator=rng).tolist())
    order = torch.randperm(len(prompts), generator=rng).tolist()  # groups need not stand side by side
    prompts, answers = [prompts[i] for i in order], [answers[i] for i in order]
    zeros = [[0.0] * len(a) for a in answers]
    return TokenBatch.build(
        prompts, answers, zeros, [[True] * len(a) for a in answers], torch.randn(len(prompts), generator=rng), 0
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_values_and_gradients_equal_those_of_separate_rows(kind, attention, monkeypatch):
    monkeypatch.setattr(module, "worth_sharing", lambda *a: True)
    model, batch = make_model(kind, attention), make_batch()
    results = []
    for share in (False, True):
        model.zero_grad()
        values, entropies = answer_logprobs(model, batch, 0.7, entropy=True, share_prompts=share)
        weights = batch.train_mask * batch.advantages[:, None]
        ((values + 0.3 * entropies) * weights).sum().backward()
        results.append(
            (
                values.detach() * batch.train_mask,
                entropies.detach() * batch.train_mask,
                {n: p.grad.clone() for n, p in model.named_parameters()},
            )
        )
    (v1, e1, g1), (v2, e2, g2) = results
    assert torch.allclose(v1, v2, atol=1e-4) and torch.allclose(e1, e2, atol=1e-4)
    assert all(torch.allclose(g1[n], g2[n], rtol=1e-3, atol=2e-3) for n in g1)
    assert max(g.abs().max() for g in g1.values()) > 1


def test_the_joined_pass_really_runs_and_reads_fewer_tokens(monkeypatch):
    model, batch = make_model(), make_batch(((60, (4,) * 8), (60, (4,) * 8)))
    seen = []
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (seen.append(k["input_ids"].numel()), real(*a, **k))[1])
    answer_logprobs(model, batch, share_prompts=True)
    answer_logprobs(model, batch, share_prompts=False)
    assert seen == [2 * (60 + 8 * 4), 16 * 64]


def test_an_answer_sees_its_prompt_and_itself_and_nothing_else():
    batch = make_batch(((3, (2, 2)),))
    mask = join(batch, prompt_groups(batch), torch.float32).mask[0, 0] == 0
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]
    assert mask.int().tolist() == expected


def test_long_answers_are_not_joined_and_neither_are_single_rows():
    groups = torch.arange(2).repeat_interleave(8)
    assert worth_sharing(groups, prompt_length=40, answer_length=24)
    assert not worth_sharing(groups, prompt_length=200, answer_length=1024)
    assert not worth_sharing(torch.arange(8), prompt_length=200, answer_length=10)


def test_models_that_cannot_read_such_a_mask_are_left_alone():
    assert can_share(make_model())
    window = Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0))
    assert not can_share(window)
    batch = make_batch()
    one, _ = answer_logprobs(window, batch, share_prompts=True)
    two, _ = answer_logprobs(window, batch, share_prompts=False)
    assert torch.equal(one, two)
