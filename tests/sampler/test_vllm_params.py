"""What is asked of vLLM for one answer: seeds that are stable and all different, and parameters that say what we mean."""

from __future__ import annotations

import pytest
import torch

from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.vllm_params import answer_seed, sample_seeds, sampling_parameters


def test_seeds_are_the_same_on_every_machine():
    assert sample_seeds(SampleRequest((5,), 2, seed=7)) == [answer_seed(7, 0, 0), answer_seed(7, 1, 0)]
    assert answer_seed(7, 0, 0) == 2425133424100914575


def test_seeds_differ_by_seed_place_and_start_and_by_nothing_else():
    seeds = [answer_seed(s, p, t) for s in (0, 1, 2**62, 2**62 + 1) for p in range(8) for t in (0, 1, 17)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    whole = sample_seeds(SampleRequest((5,), 6, seed=3))
    assert sample_seeds(SampleRequest((9, 9), 2, seed=3, first=4)) == whole[4:]
    assert set(sample_seeds(SampleRequest((5,), 6, seed=3, start=2))).isdisjoint(whole)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(4)
    first, second = sample_seeds(SampleRequest((5,), 3)), sample_seeds(SampleRequest((5,), 3))
    torch.manual_seed(4)
    assert sample_seeds(SampleRequest((5,), 3)) == first != second


def test_a_request_overrides_and_a_continued_one_counts_what_it_has():
    sampling = SamplingConfig(20, temperature=0.7, top_k=5, min_new_tokens=6, stop=("a",))
    plain = sampling_parameters(SampleRequest((5,)), sampling, [9, 2, 2])
    assert (plain["max_tokens"], plain["min_tokens"], plain["stop"], plain["stop_token_ids"]) == (20, 6, ["a"], [2, 9])
    assert plain["ignore_eos"] and plain["logprobs"] == 0 and (plain["temperature"], plain["top_k"]) == (0.7, 5)
    rest = SampleRequest((5,), start=4, max_new_tokens=16, stop=("b",))
    assert [sampling_parameters(rest, sampling, [2])[k] for k in ("max_tokens", "min_tokens", "stop")] == [16, 2, ["b"]]
    late = SampleRequest((5,), start=7, max_new_tokens=13)
    assert sampling_parameters(late, sampling, [2])["min_tokens"] == 0


def test_greedy_sampling_is_not_truncated():
    asked = sampling_parameters(SampleRequest((5,)), SamplingConfig(4, 0.0, top_p=0.5, top_k=3, min_p=0.1), [2])
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, 0, 0.0)


def test_a_temperature_that_vllm_would_replace_is_refused():
    with pytest.raises(ValueError, match=r"temperature=0.005.*0.01 at least") as error:
        sampling_parameters(SampleRequest((5,)), SamplingConfig(4, temperature=0.005), [2])
    assert "\n" not in str(error.value)
