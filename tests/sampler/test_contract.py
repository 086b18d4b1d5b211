"""Guards what every sampler promises (core_torl.sampler.protocol), the same tests for each of them.

A further sampler joins by one more entry in FACTORIES: a function (model, tokenizer, **settings) -> Sampler, with a
marker if it needs something that is not always installed. ``model`` is a transformers model; a sampler that keeps its
own weights takes them from there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core_torl.model.load import Policy
from core_torl.sampler.protocol import Sampler, SampleRequest, SamplingConfig
from core_torl.sampler.transformers import TransformersSampler
from tests.sampler.vllm_here import NEEDS_VLLM, make_vllm


@dataclass(frozen=True)
class Factory:
    """``tolerance``: largest log-prob gap to a plain forward. ``heads``: of the model to sample from."""

    make: Callable[..., Sampler]
    tolerance: float = 1e-5
    own_weights: bool = False
    heads: int = 4


FACTORIES = [
    pytest.param(Factory(partial(TransformersSampler, engine="cascade")), id="cascade"),
    pytest.param(Factory(partial(TransformersSampler, engine="generate")), id="generate"),
    # vLLM's attention on the CPU takes heads of 32 numbers and more.
    pytest.param(Factory(make_vllm, 1e-4, own_weights=True, heads=1), id="vllm", marks=NEEDS_VLLM),
]
# One token in twenty ends an answer, so that lengths differ widely although the model is untrained.
EOS = list(range(2, 660, 20))


@pytest.fixture(scope="module", params=FACTORIES)
def factory(request) -> Factory:
    return request.param


@pytest.fixture(scope="module")
def make_tiny(make_tiny, factory):
    return partial(make_tiny, heads=factory.heads)


@pytest.fixture
def make_sampler(factory):
    """Builds samplers and closes them when the test is over."""
    made = []

    def make(model, tokenizer, **settings) -> Sampler:
        made.append(factory.make(model, tokenizer, **settings))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


@pytest.fixture(scope="module")
def model(make_tiny, tiny_tokenizer):
    model = make_tiny()
    model.generation_config.eos_token_id = [i for i in EOS if i < len(tiny_tokenizer)]
    return model


@pytest.fixture
def sampler(make_sampler, model, tiny_tokenizer):
    return make_sampler(model, tiny_tokenizer, max_new_tokens=24)


@pytest.fixture
def requests(uneven_requests, tiny_tokenizer):
    return uneven_requests(len(tiny_tokenizer))


def ids_of(results) -> list[list[tuple[int, ...]]]:
    return [[s.token_ids for s in group] for group in results]


def test_it_is_a_sampler(sampler):
    assert isinstance(sampler, Sampler)
    assert sampler.sampling == SamplingConfig(24)
    assert sampler.generate([]) == []


def test_ids_include_the_end_and_every_id_has_a_logprob(sampler, requests, model):
    eos = set(model.generation_config.eos_token_id)
    results = sampler.generate(requests)
    assert [len(group) for group in results] == [r.n for r in requests]
    samples = [s for group in results for s in group]
    assert {s.finish for s in samples} == {"eos", "length"}
    assert len({len(s.token_ids) for s in samples}) > 4
    for s in samples:
        assert len(s.logprobs) == len(s.token_ids) >= 1
        assert not eos & set(s.token_ids[:-1])
        if s.finish == "eos":
            assert s.token_ids[-1] in eos and s.stop == s.token_ids[-1]
        else:
            assert s.token_ids[-1] not in eos and len(s.token_ids) == 24 and s.stop is None


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.8},
        {"temperature": 0.0},
        {"top_p": 0.6},
        {"top_k": 5},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.7, "temperature": 1.3},
        {"min_new_tokens": 9},
        {"min_new_tokens": 9, "temperature": 0.0},
    ],
    ids=lambda how: " ".join(f"{k}={v}" for k, v in how.items()) or "plain",
)
def test_logprobs_are_those_of_a_plain_forward(factory, sampler, requests, model, largest_gap, how):
    sampling = SamplingConfig(24, **how)
    results = sampler.generate(requests, sampling)
    assert largest_gap(model, requests, results, sampling, model.generation_config.eos_token_id) < factory.tolerance


def test_greedy_takes_the_most_likely_token(sampler, requests, model, log_distributions):
    sampling = SamplingConfig(24, temperature=0.0)
    for request, group in zip(requests, sampler.generate(requests, sampling), strict=True):
        assert len({s.token_ids for s in group}) == 1
        rows = log_distributions(model, request.prompt_ids, group[0].token_ids, sampling)
        assert tuple(rows.argmax(-1)) == group[0].token_ids


def test_an_answer_depends_on_its_seed_alone(sampler, make_sampler, model, tiny_tokenizer, requests):
    together = ids_of(sampler.generate(requests))
    alone = [ids_of(sampler.generate([r]))[0] for r in requests]
    reverse = ids_of(sampler.generate(requests[::-1]))[::-1]
    one_by_one = ids_of(make_sampler(model, tiny_tokenizer, max_new_tokens=24, max_rows=1).generate(requests))
    in_twos = ids_of(make_sampler(model, tiny_tokenizer, max_new_tokens=24, max_rows=9).generate(requests))
    assert together == alone == reverse == one_by_one == in_twos


def test_a_smaller_group_is_the_beginning_of_a_larger_one(sampler, requests):
    prompt = requests[1].prompt_ids
    small, large = sampler.generate([SampleRequest(prompt, 2, 5), SampleRequest(prompt, 6, 5)])
    assert ids_of([large[:2]]) == ids_of([small])


def test_samples_and_seeds_differ(sampler, requests):
    prompt = requests[1].prompt_ids
    results = sampler.generate([SampleRequest(prompt, 6, seed) for seed in (0, 1, 2**62, 2**62 + 1)])
    answers = [s.token_ids for group in results for s in group]
    assert len(set(answers)) == len(answers)


def test_without_a_seed_answers_follow_the_global_generator(sampler, requests):
    request = [SampleRequest(requests[1].prompt_ids, 3)]
    torch.manual_seed(1)
    first, second = ids_of(sampler.generate(request)), ids_of(sampler.generate(request))
    torch.manual_seed(1)
    assert ids_of(sampler.generate(request)) == first
    assert first != second


@pytest.fixture(scope="module")
def ten_tokens():
    """A model over ten tokens, so that a few thousand draws fill every cell of a table."""
    from tokenizers import Tokenizer, models

    vocabulary = {t: i for i, t in enumerate(["<pad>", "</s>", *"abcdefgh"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), eos_token="</s>", pad_token="<pad>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            head_dim=32, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval(), tokenizer


@pytest.mark.parametrize("how", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8}], ids=str)
def test_frequencies_of_token_pairs_follow_their_probabilities(make_sampler, ten_tokens, log_distributions, how):
    model, tokenizer = ten_tokens
    prompt, n = (3, 5, 2), 4000
    sampling = SamplingConfig(2, min_new_tokens=2, **how)
    sampler = make_sampler(model, tokenizer, max_new_tokens=2, max_rows=2000)
    # Several seeds of several samples each: both ways to get independent draws are in the table.
    results = sampler.generate([SampleRequest(prompt, n // 20, seed) for seed in range(20)], sampling)
    counts = np.zeros((10, 10))
    for group in results:
        for s in group:
            counts[s.token_ids] += 1
    first = np.exp(log_distributions(model, prompt, (0,), sampling, [1])[0])
    second = np.stack([np.exp(log_distributions(model, prompt, (t, 0), sampling, [1])[1]) for t in range(10)])
    expected = n * first[:, None] * second
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    assert often.sum() >= 8
    observed, wanted = counts[often], expected[often]
    if (rest := expected[~often].sum()) > 1:
        observed, wanted = np.append(observed, counts[~often].sum()), np.append(wanted, rest)
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def plain_words(tokenizer, ids, start) -> int | None:
    """The first place from ``start`` on where two words of several plain letters stand side by side."""
    pieces = [tokenizer.decode([i]) for i in ids]
    good = [p.isascii() and p.strip().isalpha() and len(p.strip()) > 1 for p in pieces]
    return next((i for i in range(start, len(ids)) if good[i] and good[i - 1]), None)


def test_a_stop_string_ends_an_answer_even_inside_a_token(make_sampler, make_tiny, tiny_tokenizer, requests):
    sampler = make_sampler(make_tiny(), tiny_tokenizer, max_new_tokens=40)
    request = [SampleRequest(requests[0].prompt_ids, 24, 0)]
    free = [s.token_ids for s in sampler.generate(request)[0]]
    row, place = next((r, p) for r, ids in enumerate(free) if (p := plain_words(tiny_tokenizer, ids, 2)) is not None)
    before, token = (tiny_tokenizer.decode([free[row][i]]) for i in (place - 1, place))
    stop = before[-1] + token[:2]  # crosses from one token into the middle of the next
    stopped = sampler.generate(request, SamplingConfig(40, stop=("never said", stop)))[0]
    assert stopped[row].finish == "stop" and stopped[row].stop == stop
    assert not tiny_tokenizer.decode(list(stopped[row].token_ids)).endswith(stop), "the stop string ends inside a token"
    for whole, sample in zip(free, stopped, strict=True):
        ends = [m for m in range(1, len(whole) + 1) if stop in tiny_tokenizer.decode(list(whole[:m]))]
        assert sample.token_ids == whole[: ends[0] if ends else None]
        assert (sample.finish == "stop") == bool(ends)
    assert any(s.finish != "stop" for s in stopped)


def test_min_new_tokens_holds_back_every_end(sampler, requests, model):
    free = sampler.generate(requests)
    assert min(len(s.token_ids) for g in free for s in g) < 12
    held = sampler.generate(requests, SamplingConfig(24, min_new_tokens=12))
    assert min(len(s.token_ids) for g in held for s in g) > 12
    forced = sampler.generate(requests, SamplingConfig(24, min_new_tokens=24))
    assert {(len(s.token_ids), s.finish) for g in forced for s in g} == {(24, "length")}
    assert not set(model.generation_config.eos_token_id) & {t for g in forced for s in g for t in s.token_ids}


def test_min_new_tokens_holds_back_stop_strings_too(make_sampler, make_tiny, tiny_tokenizer, requests):
    sampler = make_sampler(make_tiny(), tiny_tokenizer, max_new_tokens=24)
    request = [SampleRequest(requests[0].prompt_ids, 12, 0)]
    free = [s.token_ids for s in sampler.generate(request)[0]]
    # Half a character is no stop string, and swallows what stands behind it.
    row = next(i for i, ids in enumerate(free) if "\ufffd" not in tiny_tokenizer.decode(list(ids[:2])))
    stop = tiny_tokenizer.decode([free[row][1]])
    early = sampler.generate(request, SamplingConfig(24, stop=(stop,)))[0]
    assert early[row].finish == "stop" and len(early[row].token_ids) <= 2
    late = sampler.generate(request, SamplingConfig(24, stop=(stop,), min_new_tokens=6))[0]
    assert min(len(s.token_ids) for s in late) > 6


def test_one_token_can_be_asked_for(sampler, requests):
    results = sampler.generate(requests, SamplingConfig(1))
    assert {len(s.token_ids) for g in results for s in g} == {1}


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (SampleRequest((), 2, 0), "empty"),
        (SampleRequest((5, 6), 0, 0), "n < 1"),
        (SampleRequest(tuple(range(3, 503)), 1, 0), "max_new_tokens"),
    ],
    ids=["empty", "no samples", "too long"],
)
def test_impossible_requests_are_one_line_errors_before_anything_is_sampled(sampler, requests, model, request_, word):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=word) as error:
            sampler.generate([*requests, request_])
    finally:
        handle.remove()
    assert "\n" not in str(error.value) and not calls


def test_the_longest_prompt_that_fits_is_sampled(factory, sampler, model, largest_gap):
    request = [SampleRequest(tuple(3 + i % 500 for i in range(512 - 24)), 2, 0)]
    results = sampler.generate(request)
    assert largest_gap(model, request, results, sampler.sampling) < factory.tolerance


def test_sync_brings_the_new_weights_and_their_version(
    factory, make_sampler, make_tiny, tiny_tokenizer, requests, largest_gap
):
    model = make_tiny(seed=1)
    sampler = make_sampler(model, tiny_tokenizer, max_new_tokens=8)
    before = sampler.generate(requests)
    with torch.no_grad():
        model.load_state_dict(make_tiny(seed=2).state_dict())
    sampler.sync(Policy(model, tiny_tokenizer, adapted=False), "step-7")
    after = sampler.generate(requests)
    assert {s.weight_version for g in after for s in g} == {"step-7"}
    assert not {s.weight_version for g in before for s in g} & {"step-7"}
    assert ids_of(before) != ids_of(after)
    assert largest_gap(model, requests, after, sampler.sampling) < factory.tolerance


def test_sleep_and_wake_change_nothing(sampler, requests):
    before = ids_of(sampler.generate(requests))
    sampler.sleep()
    sampler.wake()
    assert ids_of(sampler.generate(requests)) == before


def test_the_trainer_finds_its_model_and_generators_as_it_left_them(
    factory, make_sampler, make_tiny, tiny_tokenizer, requests, largest_gap
):
    model = make_tiny(seed=4)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    model.model.layers[0].mlp.eval()  # a part that the trainer has frozen on purpose
    sampler = make_sampler(model, tiny_tokenizer, max_new_tokens=8)

    def state():
        return {
            "modes": [m.training for m in model.modules()],
            "gradients": [p.requires_grad for p in model.parameters()],
            "attention": model.config._attn_implementation,
            "generation": model.generation_config.to_dict(),
            "torch": torch.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
        }

    before = state()
    results = sampler.generate(requests)
    after = state()
    assert [k for k in before if before[k] != after[k]] == []
    assert torch.is_grad_enabled()
    # Dropout was on in the trainer and must have been off in the sampler.
    assert largest_gap(model.eval(), requests, results, sampler.sampling) < factory.tolerance


def test_an_error_on_the_way_leaves_the_model_as_it_was(factory, make_sampler, make_tiny, tiny_tokenizer, requests):
    if factory.own_weights:
        pytest.skip("the trainer's model takes no part in sampling")
    model = make_tiny(seed=5).train()
    attention = model.config._attn_implementation
    sampler = make_sampler(model, tiny_tokenizer, max_new_tokens=8)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("made by the test")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="made by the test"):
        sampler.generate(requests)
    handle.remove()
    assert model.training and model.config._attn_implementation == attention and torch.is_grad_enabled()
    assert sampler.generate(requests) == sampler.generate(requests)
