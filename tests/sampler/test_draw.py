"""Guards the random streams and the truncation rules: reproducible for ever, and nothing impossible is ever drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from core_torl.sampler.draw import draw, token_logprobs, uniforms
from core_torl.sampler.protocol import SampleRequest, SamplingConfig

LAST_NUMBER = 1 - 2.0**-53  # the largest that a stream can give


def request(n: int, seed: int | None) -> SampleRequest:
    return SampleRequest((1,), n, seed)


# --- streams


def test_the_streams_never_change():
    """A published seed must give the same answers in every later version: these numbers are part of the interface."""
    numbers = uniforms([request(2, 0), request(1, 12345)], 3)
    expected = [
        [0.6935121390102292, 0.31174236392457866, 0.20227741715124992],
        [0.09898262136490354, 0.600573503279877, 0.18005546118837656],
        [0.7743183117234232, 0.3850672944949596, 0.6317111887520368],
    ]
    assert numbers.dtype == torch.float64 and numbers.tolist() == expected


def test_a_row_knows_its_seed_and_its_number_only():
    alone = uniforms([request(4, 7)], 10)
    among = uniforms([request(3, 1), request(8, 7), request(2, 2)], 25)
    assert torch.equal(among[3:7, :10], alone)


def test_streams_are_uniform_and_unrelated():
    numbers = uniforms([request(50, seed) for seed in range(20)], 100).numpy()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    centred = numbers - 0.5
    limit = 4.5 / 12 / math.sqrt(numbers.size)  # of a mean of products of two independent centred uniforms
    next_token = (centred[:, 1:] * centred[:, :-1]).mean()
    next_sample = (centred[1:] * centred[:-1]).mean()
    next_seed = (centred[50:] * centred[:-50]).mean()
    assert max(abs(next_token), abs(next_sample), abs(next_seed)) < limit


def test_large_and_negative_seeds_are_seeds_too():
    rows = uniforms([request(1, s) for s in (0, -1, 2**63, 2**64 + 5, 5)], 4)
    assert len({tuple(r) for r in rows.tolist()}) == 4  # seeds count modulo 2**64
    assert torch.equal(rows[3], rows[4])


def test_only_a_missing_seed_touches_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    uniforms([request(3, 1)], 5)
    assert torch.equal(torch.get_rng_state(), before)
    first = uniforms([request(3, None)], 5)
    assert not torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(uniforms([request(3, None)], 5), first)


# --- drawing


def test_a_draw_inverts_the_cumulative_distribution():
    probs = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.0, 0.3])
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    ids, logprobs = draw(probs.log().expand(1000, -1), SamplingConfig(1), numbers)
    assert torch.bincount(ids, minlength=6).tolist() == [100, 0, 400, 200, 0, 300]
    assert torch.allclose(logprobs, probs[ids].log())


@pytest.mark.parametrize("number", [0.0, 2.0**-53, 0.5, LAST_NUMBER])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 40.0])
def test_impossible_tokens_are_never_drawn_whatever_the_number(number, scale):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 17, generator=generator) * scale
    logits[:, [0, 1, 8, 15, 16]] = -torch.inf  # at both ends and inside
    ids, logprobs = draw(logits, SamplingConfig(1), torch.full((200,), number, dtype=torch.float64))
    assert not set(ids.tolist()) & {0, 1, 8, 15, 16}
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("number", [0.0, LAST_NUMBER])
@pytest.mark.parametrize(
    "how", [{"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}, {"top_k": 4, "top_p": 0.5, "min_p": 0.3}]
)
def test_truncated_tokens_are_never_drawn(number, how):
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(1))
    sampling = SamplingConfig(1, **how)
    ids, logprobs = draw(logits, sampling, torch.full((300,), number, dtype=torch.float64))
    kept = torch.isfinite(token_logprobs(logits, sampling))
    assert kept.gather(1, ids[:, None]).all() and torch.isfinite(logprobs).all()
    assert kept.sum(1).max() < 40


def test_every_token_of_a_large_vocabulary_can_be_drawn():
    """Sums in float32 would shift the border between two of 200,000 tokens by several tokens."""
    vocabulary = 200_000
    wanted = torch.tensor([0, 1, 77_777, 123_456, vocabulary - 2, vocabulary - 1])
    numbers = (wanted.double() + 0.5) / vocabulary
    ids, _ = draw(torch.zeros(len(wanted), vocabulary), SamplingConfig(1), numbers)
    assert (ids - wanted).abs().max() <= 1
    assert ids[-1] == vocabulary - 1 and ids[0] == 0


def test_rare_tokens_keep_their_places():
    """A thousand tokens of probability 1e-9: sums in float32 would merge sixty of them into one."""
    vocabulary, rare = 5000, 1000
    logits = torch.full((rare, vocabulary), -torch.inf, dtype=torch.float32)
    logits[:, 0], logits[:, -rare:] = 0.0, math.log(1e-9)
    numbers = 1 - (torch.arange(rare, dtype=torch.float64) + 0.5) * 1e-9
    ids, _ = draw(logits, SamplingConfig(1), numbers)
    assert (ids - (vocabulary - 1 - torch.arange(rare))).abs().max() <= 1


# --- distributions


def kept(logits: list[float], **how) -> list[int]:
    row = token_logprobs(torch.tensor([logits]), SamplingConfig(1, **how))[0]
    assert row.exp().sum().item() == pytest.approx(1)
    return torch.isfinite(row).nonzero().flatten().tolist()


HALVES = [math.log(p) for p in (0.1, 0.5, 0.25, 0.15)]


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.49}, [1]),
        ({"top_p": 0.51}, [1, 2]),
        ({"top_p": 0.76}, [1, 2, 3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"min_p": 0.99}, [1]),
        ({"min_p": 0.4}, [1, 2]),
        ({"min_p": 0.25}, [1, 2, 3]),
        ({"min_p": 0.1}, [0, 1, 2, 3]),
        ({"top_k": 3, "top_p": 0.8}, [1, 2]),  # nucleus of what top_k has left: 0.5 + 0.25 of 0.9
        ({"temperature": 0.5, "top_p": 0.9}, [1, 2]),  # after the temperature: 0.725, 0.181, 0.065, 0.029
    ],
    ids=str,
)
def test_truncation_keeps_exactly(how, tokens):
    assert kept(HALVES, **how) == tokens


def test_truncated_distributions_are_renormalised():
    row = token_logprobs(torch.tensor([HALVES]), SamplingConfig(1, top_k=2))[0]
    assert row.exp().tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0])


def test_equal_tokens_at_the_border_of_top_k_all_stay():
    assert kept([0.0, 1.0, 0.0, 0.0], top_k=2) == [0, 1, 2, 3]


def test_temperature_divides_the_logits():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    assert torch.allclose(token_logprobs(logits, SamplingConfig(1, 0.5)), torch.log_softmax(logits * 2, -1))
    assert torch.isfinite(token_logprobs(logits, SamplingConfig(1, 1e-4))).all()


def test_greedy_reports_the_untempered_untruncated_logprob():
    logits = torch.tensor([HALVES, HALVES[::-1]])
    ids, logprobs = draw(logits, SamplingConfig(1, 0.0, 0.1, 1), torch.tensor([0.99, 0.99], dtype=torch.float64))
    assert ids.tolist() == [1, 2] and logprobs.exp().tolist() == pytest.approx([0.5, 0.5])


def test_half_precision_logits_are_reported_in_single_precision():
    _, logprobs = draw(torch.zeros(1, 3, dtype=torch.bfloat16), SamplingConfig(1), torch.zeros(1, dtype=torch.float64))
    assert logprobs.dtype == torch.float32 and logprobs.item() == pytest.approx(-math.log(3), abs=1e-6)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", 1.0),
        ("min_p", -0.1), ("min_new_tokens", 9), ("min_new_tokens", -1),
    ],
)  # fmt: skip
def test_impossible_settings_name_their_key(key, value):
    with pytest.raises(ValueError, match=rf"sampler\.{key}={value}") as error:
        SamplingConfig(**{"max_new_tokens": 8, key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("how", "truncates"),
    [({}, False), ({"top_p": 0.9}, True), ({"top_k": 5}, True), ({"min_p": 0.1}, True), ({"temperature": 0.0, "top_k": 5}, False)],
    ids=str,
)  # fmt: skip
def test_it_is_known_which_settings_truncate(how, truncates):
    assert SamplingConfig(8, **how).truncates is truncates
