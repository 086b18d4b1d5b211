"""Guards the cut into parts: each row once, within the budget, places as they are really read, the gradient unmoved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core_torl.objective.grpo import GRPO
from core_torl.objective.logprobs import answer_logprobs
from core_torl.objective.token_batch import TokenBatch
from core_torl.variant.core_kl import CoreKL
from core_torl.variant.microbatches import Lengths, cut, idle_part, lengths_of, picked

from .conftest import Rule, fit, weights

ROWS = st.lists(
    st.builds(Lengths, st.integers(1, 60), st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=40
)  # fmt: skip


def grouped(rows: list[Lengths]) -> list[Lengths]:
    """Equal prompts are equally long."""
    prompt = {row.group: row.prompt for row in rows}
    return [Lengths(prompt[row.group], row.answer, row.group) for row in rows]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 400), st.booleans())
def test_each_row_is_in_one_part_and_a_part_is_within_the_budget_or_a_single_row(rows, places, share):
    rows = grouped(rows)
    parts = cut(rows, 3, places, share)
    assert sorted(i for part in parts for i in part.rows) == list(range(len(rows)))
    assert all(part.places <= places or len(part.rows) == 1 for part in parts)
    assert all(0 < part.tokens <= part.places for part in parts)
    by_rows = cut(rows, 3, None, share)
    assert sorted(i for part in by_rows for i in part.rows) == list(range(len(rows)))
    assert all(len(part.rows) <= 3 for part in by_rows)


def uneven(rows: int = 24, seed: int = 0, per_prompt: int = 4) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(5, 300, (count,), generator=generator).tolist()

    prompts = [
        p
        for _ in range(rows // per_prompt)
        for p in [ids(int(torch.randint(4, 30, (), generator=generator)))] * per_prompt
    ]
    answers = [ids(int(2 ** (6 * torch.rand((), generator=generator)))) for _ in range(rows)]
    zeros = [[0.0] * len(a) for a in answers]
    advantages = torch.randn(rows, generator=generator)
    return TokenBatch.build(prompts, answers, zeros, [[True] * len(a) for a in answers], advantages, 0)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("rows", "places"), [(5, None), (64, 150), (64, 600), (64, 1)])
def test_places_are_what_a_forward_pass_reads(make_tiny, monkeypatch, share, rows, places):
    model, batch = make_tiny(seed=11), uneven()
    seen = []
    real = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (seen.append(k["input_ids"].numel()), real(*a, **k))[1])
    parts = cut(lengths_of(batch), rows, places, share)
    everything = torch.arange(batch.rows)
    for part in parts:
        answer_logprobs(model, picked(batch, everything, part), share_prompts=share)
    assert seen == [part.places for part in parts]
    if not share:
        assert sum(part.tokens for part in parts) == int(batch.attention_mask.sum())


def test_a_budget_forwards_less_padding_than_so_many_rows():
    lengths = lengths_of(uneven(96, per_prompt=1))
    by_budget, in_turn = cut(lengths, 0, 400, False), [lengths[s : s + 8] for s in range(0, 96, 8)]
    unsorted = sum(len(p) * (max(x.prompt for x in p) + max(x.answer for x in p)) for p in in_turn)
    assert sum(p.places for p in by_budget) < 0.75 * unsorted


def test_joined_prompts_count_once_so_more_answers_fit():
    rows = [Lengths(100, 4, group) for group in (0, 1) for _ in range(8)]
    assert [len(p.rows) for p in cut(rows, 1, 132, share=True)] == [8, 8]
    assert [len(p.rows) for p in cut(rows, 1, 132, share=False)] == [1] * 16
    assert [p.places for p in cut(rows, 1, 264, share=True)] == [264]


def test_an_idle_part_has_one_row_and_no_gradient(make_tiny):
    model, batch = make_tiny(seed=11), uneven()
    part = idle_part(batch)
    assert part.rows == 1 and int(part.attention_mask.sum()) == int(batch.attention_mask.sum(dim=1).min())
    logprobs, entropies = answer_logprobs(model, part, entropy=True)
    objective = GRPO(entropy_coef=0.1)
    objective.loss(logprobs, entropies, part, torch.tensor(3.0)).total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def gradient(module, batch) -> list[torch.Tensor]:
    """What one optimizer step would use, before clipping."""
    kept: list[torch.Tensor] = []
    clip = module._clip
    module._clip = lambda: (kept.extend(p.grad.clone() for p in module._trained()), clip())[1]
    try:
        module._optimizer_step(batch, torch.arange(batch.rows))
    finally:
        module._clip = clip
    return kept


@pytest.mark.parametrize("share", [False, True])
def test_the_gradient_of_training_does_not_depend_on_the_cut(make, share):
    """Whole runs, old and reference log-probs included; lr 0 keeps the batches alike."""

    def run(**changes):
        module = make(watched_gradients(), objective=GRPO(kl_coef=0.1), minibatch_size=8, update_epochs=2, rl_steps=1,
                      lr=0.0, weight_decay=0.0, grad_clip=0.0, share_prompts=share, max_new_tokens=12, **changes)  # fmt: skip
        return fit(module)

    one = run(microbatch_size=64)
    for changes in ({"microbatch_size": 3}, {"microbatch_tokens": 1}, {"microbatch_tokens": 300}):
        other = run(**changes)
        assert len(other.parts) > len(one.parts), "another cut"
        largest = max(float(g.abs().max()) for step in one.gradients for g in step)
        for a, b in zip(one.gradients, other.gradients, strict=True):
            assert largest > 0 and all((x - y).abs().max() < 1e-5 * largest for x, y in zip(a, b, strict=True))


def test_dividing_each_part_by_its_own_tokens_would_depend_on_the_cut(make):
    """The control of the test above."""

    class Own(GRPO):
        def loss(self, logprobs, entropies, batch, denominator):
            return super().loss(logprobs, entropies, batch, self.denominator(batch.train_mask).clamp(min=1))

    def run(**changes):
        return fit(make(watched_gradients(), objective=Own(), rl_steps=1, max_new_tokens=12, **changes))

    one, other = run(microbatch_size=64), run(microbatch_tokens=300)
    largest = max(float(g.abs().max()) for g in one.gradients[0])
    assert (
        max(float((a - b).abs().max()) for a, b in zip(one.gradients[0], other.gradients[0], strict=True))
        > 0.1 * largest
    )


def watched_gradients():
    from core_torl.variant.core_base import CoreBase

    class Watched(CoreBase):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.gradients, self.parts = [], []

        def _clip(self):
            self.gradients.append([p.grad.clone() for p in self._trained()])
            return super()._clip()

        def _forward(self, model, part, *rest):
            self.parts.append(part)
            return super()._forward(model, part, *rest)

    return Watched


def test_lessons_are_cut_by_tokens_as_well(make):
    class Counted(CoreKL):
        sizes: list[int]

        def _divergence(self, lessons):
            self.sizes.append(len(lessons))
            return super()._divergence(lessons)

    def run(**changes):
        module = make(Counted, reward=Rule(), kl_lambda=1.0, rl_steps=1, **changes)
        module.sizes = []
        return fit(module)

    whole, small = run(), run(microbatch_tokens=1)
    assert whole.sizes == [8] and small.sizes == [1] * 8
    for name, tensor in weights(whole).items():
        assert (tensor - weights(small)[name]).abs().max() < 1e-5, name


def test_the_share_of_padding_is_that_of_the_passes_that_were_made(make):
    module = fit(make(watched_gradients(), rl_steps=1, share_prompts=False, skip_zero_advantage=False))
    found = module.last_metrics["train/padding"]
    places = sum(part.ids.numel() for part in module.parts)
    assert found == pytest.approx(1 - sum(int(part.attention_mask.sum()) for part in module.parts) / places)
    tight = fit(
        make(watched_gradients(), rl_steps=1, share_prompts=False, skip_zero_advantage=False, microbatch_size=1)
    )
    assert tight.last_metrics["train/padding"] == 0
    assert found > 0, "rows of several lengths in one part"
