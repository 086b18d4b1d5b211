"""Guards the tiny policy's making: small, reproducible, and trained on the weighted tokens only."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from core_torl.model.tiny import TinyArchitecture, batches, build_tiny, text_loss, warm_start

SMALL = TinyArchitecture(layers=1, width=16, heads=2, mlp=16, max_length=64)


def test_it_is_small_and_its_seed_decides_its_weights(tiny_tokenizer):
    one, two, other = (build_tiny(tiny_tokenizer, TinyArchitecture(), seed) for seed in (0, 0, 1))
    assert sum(p.numel() for p in one.parameters()) < 1_000_000
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.config.vocab_size == len(tiny_tokenizer) and one.config.eos_token_id == tiny_tokenizer.eos_token_id


def test_the_loss_is_the_weighted_mean_over_targets(make_tiny):
    model = make_tiny(seed=3)
    batch = [([1, 5, 6, 7, 2], [0, 0, 1, 2.5, 1]), ([1, 9, 8], [0, 0, 0.5])]
    total, weight = 0.0, 0.0
    for ids, weights in batch:
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            total -= weights[place] * float(logprobs[place - 1, ids[place]].detach())
            weight += weights[place]
    assert float(text_loss(model, batch).detach()) == pytest.approx(total / weight, rel=1e-5)


def test_batches_hold_every_text_once_and_texts_of_like_length():
    texts = [([0] * (1 + i * 7 % 64), [float(i)]) for i in range(64)]
    drawn = list(itertools.islice(batches(itertools.cycle(texts), batch_size=4, pool=16), 16))
    assert sorted(t[1][0] for b in drawn for t in b) == [float(i) for i in range(64)]
    assert max(len(b[-1][0]) - len(b[0][0]) for b in drawn) <= 4
    assert [len(b[0][0]) for b in drawn] != sorted(len(b[0][0]) for b in drawn)


def test_training_learns_a_text_by_heart(tiny_tokenizer):
    model, seen = build_tiny(tiny_tokenizer, SMALL, 0), []
    text = ([1, 5, 6, 7, 8, 2], [0.0, 0, 1, 1, 1, 1])
    steps = warm_start(
        model, itertools.repeat(text), steps=120, lr=1e-2, batch_size=2, warmup_steps=5, decay=True,
        on_step=lambda step, loss, _: seen.append((step, loss)),
    )  # fmt: skip
    assert steps == 120 and [s for s, _ in seen] == list(range(1, 121)) and not model.training
    assert seen[0][1] > 5 and seen[-1][1] < 0.5


def test_training_ends_early_when_it_is_good_enough(tiny_tokenizer):
    model = build_tiny(tiny_tokenizer, SMALL, 0)
    text = ([1, 5, 6], [0.0, 1, 1])
    steps = warm_start(
        model, itertools.repeat(text), steps=400, lr=1e-2, batch_size=1, warmup_steps=1, decay=False,
        on_step=lambda *_: None, stop_below=1.0,
    )  # fmt: skip
    assert 100 <= steps < 300


def test_a_loss_that_is_no_number_stops_the_training(tiny_tokenizer):
    model = build_tiny(tiny_tokenizer, SMALL, 0)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="lower lr"):
        warm_start(
            model, itertools.repeat(([1, 5], [0.0, 1])), steps=2, lr=1.0, batch_size=1, warmup_steps=1, decay=False,
            on_step=lambda *_: None,
        )  # fmt: skip


def test_tokens_of_short_texts_may_count_like_those_of_long_ones(tiny_tokenizer):
    """Batches of one length each: by default each batch is a mean, with ``alike`` it is a share of what came so far."""
    short, long = ([1, 5, 6], [0.0, 1, 1]), ([1, 5, 6, 7, 8, 9, 10, 2], [0.0, 1, 1, 1, 1, 1, 1, 1])
    first = {}
    for alike in (False, True):
        model, losses = build_tiny(tiny_tokenizer, SMALL, 0), []
        with torch.no_grad():
            expected = float(text_loss(model, [short])), float(text_loss(model, [long]))
        texts = itertools.cycle([short, long])
        warm_start(
            model, texts, steps=2, lr=0.0, batch_size=1, warmup_steps=1, decay=False, alike=alike,
            on_step=lambda step, loss, _, losses=losses: losses.append(loss),
        )  # fmt: skip
        first[alike] = losses
        if not alike:
            assert all(loss == pytest.approx(expected[0]) or loss == pytest.approx(expected[1]) for loss in losses)
            sizes = [2 if loss == pytest.approx(expected[0]) else 7 for loss in losses]
    means = [sizes[0], sum(sizes) / 2]
    assert first[True] == pytest.approx([loss * n / m for loss, n, m in zip(first[False], sizes, means, strict=True)])
