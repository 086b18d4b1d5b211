"""What is particular to a vLLM engine in the trainer's process: its weights, its caches, and what it leaves alone."""

from __future__ import annotations

import os
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from core_torl.config.errors import UserError
from core_torl.model.load import Policy
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from tests.sampler.vllm_here import NEEDS_VLLM, make_vllm

pytestmark = NEEDS_VLLM
LONG = tuple(3 + 7 * i % 600 for i in range(100))  # three blocks and a piece
REQUESTS = [SampleRequest(LONG, 4, 1), SampleRequest((5, 6, 7), 3, 2)]


def process_state() -> dict[str, object]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "threads": (torch.get_num_threads(), torch.set_num_threads),
        "dtype": torch.get_default_dtype(),
        "group": torch.distributed.is_initialized(),
        "hook": sys.excepthook,
        "cores": os.sched_getaffinity(0),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")},
    }


def weights_of(model, tokenizer) -> Policy:
    return Policy(model, tokenizer, adapted=hasattr(model, "peft_config"))


def disturb(model, seed: int, scale: float = 0.2) -> None:
    """An optimizer step that is large enough to be seen."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=draws))


@pytest.fixture(scope="module")
def started(make_tiny, tiny_tokenizer):
    """A sampler without weights yet, its model, and the process before and after it was built."""
    from core_torl.sampler.vllm import VllmSampler

    model = make_tiny(seed=1, heads=1)
    before = process_state()
    sampler = VllmSampler(model, tiny_tokenizer, max_new_tokens=24, kv_cache_mb=64, enforce_eager=True)
    after = process_state()
    with pytest.raises(RuntimeError, match="no weights yet: call sync first"):
        sampler.generate(REQUESTS)
    yield sampler, model, before, after
    sampler.close()


@pytest.fixture
def sampler(started, make_tiny, tiny_tokenizer):
    """The same engine each time, with the same weights as version 0."""
    sampler, model, *_ = started
    model.load_state_dict(make_tiny(seed=1, heads=1).state_dict())
    sampler.sync(weights_of(model, tiny_tokenizer), "0")
    return sampler


def test_building_an_engine_leaves_the_process_as_it_was(started):
    """Generators, threads, default process group, and the environment that sandboxes would inherit."""
    _, _, before, after = started
    assert [k for k in before if before[k] != after[k]] == []
    assert "LD_PRELOAD" not in set(os.environ) - set(before["environment"])


def test_sampling_and_syncing_leave_the_process_as_it_was(sampler, tiny_tokenizer):
    before = process_state()
    sampler.generate(REQUESTS)
    sampler.sync(weights_of(sampler.model, tiny_tokenizer), "1")
    after = process_state()
    assert [k for k in before if before[k] != after[k]] == []


def test_new_weights_are_sampled_from_after_each_sync(sampler, tiny_tokenizer, largest_gap):
    """Three updates, the prompt longer than a block and the same each time; the engine itself says which weights."""
    before = sampler.generate(REQUESTS)
    for step in range(1, 4):
        disturb(sampler.model, step)
        stale = sampler.generate(REQUESTS)
        assert largest_gap(sampler.model, REQUESTS, stale, sampler.sampling) > 0.5
        sampler.sync(weights_of(sampler.model, tiny_tokenizer), f"step-{step}")
        after = sampler.generate(REQUESTS)
        assert largest_gap(sampler.model, REQUESTS, after, sampler.sampling) < 1e-4
        assert {s.weight_version for g in after for s in g} == {f"step-{step}"}
        assert {s.weight_version for g in stale for s in g} != {f"step-{step}"}
    assert [s.token_ids for g in before for s in g] != [s.token_ids for g in after for s in g]


def test_keys_and_values_of_old_weights_would_show(sampler, tiny_tokenizer, largest_gap, monkeypatch):
    """The reset of the prefix cache is what makes a sync right: without it, a prompt seen before is wrong by a lot."""
    sampler.generate(REQUESTS)
    disturb(sampler.model, 1)
    monkeypatch.setattr(sampler.engine, "forget", lambda: True)
    sampler.sync(weights_of(sampler.model, tiny_tokenizer), "1")
    long, short = REQUESTS[:1], REQUESTS[1:]
    assert largest_gap(sampler.model, long, sampler.generate(long), sampler.sampling) > 0.5
    assert largest_gap(sampler.model, short, sampler.generate(short), sampler.sampling) < 1e-4  # no whole block
    monkeypatch.undo()
    sampler.sync(weights_of(sampler.model, tiny_tokenizer), "2")
    assert largest_gap(sampler.model, long, sampler.generate(long), sampler.sampling) < 1e-4


def test_a_group_reads_its_prompt_once(sampler):
    """Whole blocks of a prompt are shared by all of its answers: all but the first find three blocks of 32 there."""
    found = []
    core = sampler.engine._engine.engine_core.engine_core.scheduler.kv_cache_manager
    ask = core.get_computed_blocks

    def spy(request):
        result = ask(request)
        found.append(result[1])
        return result

    core.get_computed_blocks = spy
    try:
        sampler.generate([SampleRequest(LONG, 5, 3)])
    finally:
        del core.get_computed_blocks
    assert found == [0, 96, 96, 96, 96]


def test_weights_cannot_change_under_answers_in_progress(sampler, tiny_tokenizer):
    with sampler.session(REQUESTS) as session:
        session.advance()
        with pytest.raises(RuntimeError, match="answers are in progress"):
            sampler.sync(weights_of(sampler.model, tiny_tokenizer), "1")
    with pytest.raises(RuntimeError, match="no weights yet"):
        sampler.generate(REQUESTS)
    sampler.sync(weights_of(sampler.model, tiny_tokenizer), "1")
    assert sampler.generate(REQUESTS)[0][0].weight_version == "1"


def test_a_session_that_is_left_early_leaves_nothing_behind(sampler):
    right = sampler.generate(REQUESTS)
    with pytest.raises(KeyError, match="made by the test"), sampler.session(REQUESTS) as session:
        for _ in range(3):
            session.advance()
        raise KeyError("made by the test")
    assert not sampler.engine.busy and not sampler.engine.finished
    assert sampler.generate(REQUESTS) == right


def test_an_error_in_a_step_leaves_an_engine_that_works(sampler, monkeypatch):
    right = sampler.generate(REQUESTS)
    calls = []

    def fail():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("made by the test")
        return type(sampler.engine._engine).step(sampler.engine._engine)

    monkeypatch.setattr(sampler.engine._engine, "step", fail)
    with pytest.raises(MemoryError, match="made by the test"):
        sampler.generate(REQUESTS)
    monkeypatch.undo()
    assert sampler.generate(REQUESTS) == right


def test_sessions_beside_each_other_take_their_own_answers(sampler):
    right = sampler.generate(REQUESTS)
    with sampler.session(REQUESTS[:1]) as one, sampler.session(REQUESTS[1:]) as other:
        while one.running or other.running:
            one.advance()
            other.advance()
        answers = [[one.answer(row) for row in range(4)], [other.answer(row) for row in range(3)]]
    assert answers == right


def test_a_continued_answer_is_reproducible_and_draws_from_its_own_stream(sampler):
    """Not the draws of the answer that was never interrupted: in vLLM a request owns its generator."""
    (whole,) = sampler.generate([SampleRequest(LONG, 1, 5)])[0]
    half = whole.token_ids[:12]
    rest = SampleRequest(LONG + half, 1, seed=5, start=12, max_new_tokens=12)
    ((one,),), ((other,),) = sampler.generate([rest]), sampler.generate([rest])
    assert one == other and one.token_ids != whole.token_ids[12:]


def test_prompts_that_do_not_fit_into_one_step_are_sampled(sampler, largest_gap):
    """Where a step cannot take all prompts, the rest waits; a prompt that is read in pieces breaks seeded rows."""
    requests = [SampleRequest(tuple(3 + (i * j + i) % 600 for i in range(400)), 1, j) for j in range(12)]
    results = sampler.generate(requests, SamplingConfig(4))
    assert largest_gap(sampler.model, requests, results, SamplingConfig(4)) < 1e-4


@contextmanager
def closing(sampler):
    try:
        yield sampler
    finally:
        sampler.close()


def tiny_qwen(tokenizer, padded: int = 0) -> Qwen2ForCausalLM:
    """Grouped queries, attention biases, an output layer of its own, and ``padded`` rows without a token."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        config = Qwen2Config(
            vocab_size=len(tokenizer) + padded, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=False,
            initializer_range=0.2, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        return Qwen2ForCausalLM(config).eval()


def test_another_architecture_whose_output_layer_is_not_tied(tiny_tokenizer, largest_gap):
    model = tiny_qwen(tiny_tokenizer)
    with closing(make_vllm(model, tiny_tokenizer, max_new_tokens=16, eos_ids=[2])) as sampler:
        for step in range(2):
            results = sampler.generate(REQUESTS)
            assert largest_gap(model, REQUESTS, results, sampler.sampling) < 1e-4
            disturb(model, step)
            sampler.sync(weights_of(model, tiny_tokenizer), str(step + 1))


def test_rows_without_a_token_are_never_drawn(tiny_tokenizer, largest_gap, monkeypatch):
    model = tiny_qwen(tiny_tokenizer, padded=300)  # a third of the mass
    forward = type(model).forward

    def masked(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits[..., len(tiny_tokenizer) :] = -torch.inf
        return output

    with closing(make_vllm(model, tiny_tokenizer, max_new_tokens=16, eos_ids=[2])) as sampler:
        results = sampler.generate([SampleRequest((5, 6, 7), 64, 1), *REQUESTS])
    assert max(t for g in results for s in g for t in s.token_ids) < len(tiny_tokenizer)
    monkeypatch.setattr(type(model), "forward", masked)
    assert largest_gap(model, REQUESTS, results[1:], sampler.sampling) < 1e-4


def test_adapters_alone_are_the_same_policy_as_merged_weights(make_tiny, tiny_tokenizer, largest_gap):
    """Several updates each, against the trainer's forward and each other; the second engine is given matrices."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_tiny(seed=1, heads=1), settings).eval()
    disturb(model, 0)  # as after a resumed run: adapters that do something before the first sync
    policy = weights_of(model, tiny_tokenizer)
    with (
        closing(make_vllm(model, tiny_tokenizer, max_new_tokens=16, weights="lora")) as lora,
        closing(make_vllm(model, tiny_tokenizer, max_new_tokens=16)) as merged,
    ):
        folders = []
        for step in range(1, 4):
            both = lora.generate(REQUESTS), merged.generate(REQUESTS)
            for results in both:
                assert largest_gap(model, REQUESTS, results, lora.sampling) < 1e-4
            assert [s.token_ids for s in both[0][0]] == [s.token_ids for s in both[1][0]]
            folders.append(lora._adapter_folder)
            disturb(model, step)
            assert largest_gap(model, REQUESTS, lora.generate(REQUESTS), lora.sampling) > 0.5
            for sampler in (lora, merged):
                sampler.sync(policy, str(step))
        assert len(set(folders)) == 3 and not any(f.exists() for f in folders) and lora._adapter_folder.exists()
        assert {s.weight_version for g in lora.generate(REQUESTS) for s in g} == {"3"}
    assert not lora._adapter_folder.exists()


def test_closing_twice_is_fine_and_leaves_no_folder(make_tiny, tiny_tokenizer):
    sampler = make_vllm(make_tiny(heads=1), tiny_tokenizer)
    folder = sampler.engine._folder
    assert (folder / "config.json").is_file() and not list(folder.glob("*.safetensors"))
    sampler.close()
    sampler.close()
    assert not folder.exists()


def test_a_group_that_the_trainer_has_is_left_alone(make_tiny, tiny_tokenizer):
    """Closing an engine destroys vLLM's process groups, by its own idea of which those are."""
    sampler = make_vllm(make_tiny(heads=1), tiny_tokenizer)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert sampler.generate(REQUESTS)
        sampler.close()
        assert torch.distributed.is_initialized()
        tensor = torch.ones(2)
        torch.distributed.all_reduce(tensor)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_cache_mb": 1, "max_model_len": 4096}, "sampler.max_model_len"),
        ({"kv_cache_mb": 1 << 30}, "sampler.gpu_memory_utilization or sampler.kv_cache_mb"),
        ({"weights": "lora"}, "no adapters; set model.lora.rank"),
        ({"weights": "both"}, "sampler.weights='both'"),
        ({"temperature": -1.0}, "sampler.temperature"),
    ],
    ids=str,
)
def test_what_cannot_start_says_so_in_one_line(make_tiny, tiny_tokenizer, settings, says):
    before = process_state()
    with pytest.raises(ValueError, match=says) as error:
        make_vllm(make_tiny(heads=1), tiny_tokenizer, **settings)
    assert "\n" not in str(error.value)
    assert process_state() == before


def test_a_model_that_vllm_cannot_run_is_one_line(make_tiny, tiny_tokenizer):
    with pytest.raises(UserError, match="vLLM cannot run this model; use sampler=transformers") as error:
        make_vllm(make_tiny(heads=4), tiny_tokenizer)  # heads of 8 numbers
    assert "\n" not in str(error.value)


def test_an_engine_in_another_process_is_refused(make_tiny, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(UserError, match=r"VLLM_ENABLE_V1_MULTIPROCESSING=1.*unset it"):
        make_vllm(make_tiny(heads=1), tiny_tokenizer)


def test_names_are_those_of_vllm():
    """Parameters and settings that a newer vLLM has renamed would otherwise show only in a run."""
    import dataclasses
    import inspect

    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    from core_torl.sampler.vllm_engine import EngineSettings
    from core_torl.sampler.vllm_params import sampling_parameters

    asked = sampling_parameters(SampleRequest((5,)), SamplingConfig(4), [2])
    assert set(asked) <= set(inspect.signature(SamplingParams).parameters)
    full = EngineSettings("bfloat16", "cuda:1", 64, 16, 0.5, 32, 8, True, True, 12, 600, 0)
    arguments = full.arguments(Path("x"))
    assert set(arguments) <= {f.name for f in dataclasses.fields(EngineArgs)}
    assert arguments["enable_sleep_mode"] and arguments["max_lora_rank"] == 16 and arguments["block_size"] == 16
    assert "enable_chunked_prefill" not in arguments
