"""Guards the embedded engines: right on many architectures, and ``auto`` steps back where the cascade does not fit."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from core_torl.sampler import cascade as cascade_module
from core_torl.sampler.cascade import CascadeCache
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.transformers import TransformersSampler, find_eos_ids

SIZE = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.15, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
FITTING = {
    "llama, all heads": LlamaConfig(**SIZE, num_key_value_heads=4),
    "llama, grouped": LlamaConfig(**SIZE, num_key_value_heads=2),
    "llama, one kv head": LlamaConfig(**SIZE, num_key_value_heads=1),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=16),
    "mistral, no window": MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=None),
    "gemma": GemmaConfig(**SIZE, num_key_value_heads=1, head_dim=16),
    "gpt-neox": GPTNeoXConfig(**SIZE),
    "gpt2, learned positions": GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.15, eos_token_id=2
    ),
    "granite, scores scaled its own way": GraniteConfig(**SIZE, num_key_value_heads=2, attention_multiplier=0.8),
}
SLIDING = {
    "mistral": MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=6),
    "qwen2": Qwen2Config(**SIZE, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "gemma2": Gemma2Config(**SIZE, num_key_value_heads=2, head_dim=8, sliding_window=6),
}
FEW_EOS = [2, *range(10, 400, 20)]


def build(config, seed: int = 0):
    attention = "eager" if config.model_type == "gemma2" else "sdpa"  # its soft caps have no fused form
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("name", FITTING)
def test_the_cascade_equals_a_plain_forward(name, tiny_tokenizer, uneven_requests, largest_gap):
    model = build(FITTING[name])
    sampler = TransformersSampler(model, tiny_tokenizer, max_new_tokens=24, eos_ids=FEW_EOS)
    assert sampler.engine == "cascade"
    requests = uneven_requests(400, sizes=(1, 7, 2, 4, 3))
    results = sampler.generate(requests)
    assert len({len(s.token_ids) for g in results for s in g}) > 4
    assert largest_gap(model, requests, results, sampler.sampling) < 1e-5


@pytest.mark.parametrize("name", SLIDING)
def test_auto_steps_back_from_sliding_windows(name, tiny_tokenizer, uneven_requests, largest_gap, caplog):
    model = build(SLIDING[name])
    attention = model.config._attn_implementation
    sampler = TransformersSampler(model, tiny_tokenizer, max_new_tokens=12, eos_ids=FEW_EOS)
    with caplog.at_level(logging.WARNING):
        assert sampler.engine == sampler.engine == "generate"
    assert sum("does not fit" in r.message for r in caplog.records) == 1
    assert model.config._attn_implementation == attention
    requests = uneven_requests(400)
    results = sampler.generate(requests)
    assert largest_gap(model, requests, results, sampler.sampling) < 1e-5


def test_the_cascade_refuses_a_window_rather_than_ignoring_it(tiny_tokenizer, uneven_requests):
    model = build(SLIDING["mistral"])
    with pytest.raises(NotImplementedError, match="sliding_window"):
        TransformersSampler(model, tiny_tokenizer, engine="cascade").generate(uneven_requests(400))


def test_auto_steps_back_when_the_probe_finds_other_logits(make_tiny, tiny_tokenizer):
    right = cascade_module.cascade_attention

    def wrong(*args, **kwargs):
        out, weights = right(*args, **kwargs)
        return out * 1.3, weights

    cascade_module.AttentionInterface.register(cascade_module.NAME, wrong)
    try:
        sampler = TransformersSampler(make_tiny(), tiny_tokenizer)
        assert sampler.engine == "generate"
    finally:
        cascade_module.AttentionInterface.register(cascade_module.NAME, right)
    assert TransformersSampler(make_tiny(), tiny_tokenizer).engine == "cascade"


def test_the_probe_leaves_generators_and_mode_alone(make_tiny, tiny_tokenizer):
    model = make_tiny().train()
    before = torch.get_rng_state()
    assert TransformersSampler(model, tiny_tokenizer).engine == "cascade"
    assert torch.equal(torch.get_rng_state(), before) and model.training


def test_both_engines_give_the_same_answers(make_tiny, tiny_tokenizer, uneven_requests):
    requests = uneven_requests(len(tiny_tokenizer), seed=3)
    eos = list(range(2, len(tiny_tokenizer), 20))
    ours, theirs = (
        TransformersSampler(make_tiny(), tiny_tokenizer, engine=e, max_new_tokens=20, eos_ids=eos).generate(requests)
        for e in ("cascade", "generate")
    )
    assert [[(s.token_ids, s.finish, s.stop) for s in g] for g in ours] == [
        [(s.token_ids, s.finish, s.stop) for s in g] for g in theirs
    ]


def test_finished_rows_leave_the_batch_and_the_rest_stay_right(
    make_tiny, tiny_tokenizer, uneven_requests, largest_gap, monkeypatch
):
    """Answers longer than the first buffer, with packing on the way; both are seen to happen."""
    model, widths, packings = make_tiny(), [], []
    arrange = CascadeCache.arrange

    def spy(self, blocks, rows, rows_per_block):
        packings.append(len(rows))
        arrange(self, blocks, rows, rows_per_block)

    monkeypatch.setattr(CascadeCache, "arrange", spy)
    handle = model.register_forward_pre_hook(lambda _, __, kw: widths.append(kw["input_ids"].shape), with_kwargs=True)
    requests = uneven_requests(len(tiny_tokenizer), seed=1, sizes=(1, 7, 2, 4, 1, 7, 3, 5))
    eos = list(range(2, len(tiny_tokenizer), 60))
    sampler = TransformersSampler(model, tiny_tokenizer, engine="cascade", max_new_tokens=150, eos_ids=eos)
    results = sampler.generate(requests)
    handle.remove()
    assert len(packings) >= 4 and packings[-1] <= packings[0] // 4, packings
    assert widths[0] == (8, 30), "every prompt is read once"
    assert [rows for rows, _ in widths[1:]] == sorted((rows for rows, _ in widths[1:]), reverse=True)
    assert max(len(s.token_ids) for g in results for s in g) > 2 * cascade_module._FIRST_CAPACITY
    assert largest_gap(model, requests, results, sampler.sampling) < 1e-5


@pytest.mark.parametrize("engine", ["cascade", "generate"])
def test_adapters_take_part_and_can_be_switched_off(engine, make_tiny, tiny_tokenizer, uneven_requests, largest_gap):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(make_tiny(seed=7), settings).eval()
    sampler = TransformersSampler(model, tiny_tokenizer, engine=engine, max_new_tokens=10)
    requests = uneven_requests(len(tiny_tokenizer))
    adapted = sampler.generate(requests)
    assert largest_gap(model, requests, adapted, sampler.sampling) < 1e-5
    with model.disable_adapter():
        plain = sampler.generate(requests)
        assert largest_gap(model, requests, plain, sampler.sampling) < 1e-5
    assert [[s.token_ids for s in g] for g in plain] != [[s.token_ids for s in g] for g in adapted]
    assert TransformersSampler(model, tiny_tokenizer).engine == "cascade"


@pytest.mark.parametrize("engine", ["cascade", "generate"])
def test_a_models_own_generation_settings_do_not_bend_the_distribution(
    engine, make_tiny, tiny_tokenizer, uneven_requests, largest_gap
):
    """Published chat models ship a repetition penalty and sampling defaults in generation_config.json."""
    model = make_tiny(seed=8)
    settings = {
        "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": list(range(5, 200)), "top_k": 3,
        "temperature": 0.3, "min_new_tokens": 10, "do_sample": True, "num_beams": 2,
    }  # fmt: skip
    model.generation_config.update(**settings)
    before = model.generation_config.to_dict()
    eos = list(range(2, len(tiny_tokenizer), 20))
    sampler = TransformersSampler(model, tiny_tokenizer, engine=engine, max_new_tokens=20, eos_ids=eos)
    requests = uneven_requests(len(tiny_tokenizer))
    results = sampler.generate(requests)
    assert largest_gap(model, requests, results, sampler.sampling) < 1e-5
    assert min(len(s.token_ids) for g in results for s in g) < 10
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("engine", ["cascade", "generate"])
def test_gradient_checkpointing_of_the_trainer_does_not_disturb(
    engine, make_tiny, tiny_tokenizer, uneven_requests, largest_gap
):
    model = make_tiny(seed=9).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sampler = TransformersSampler(model, tiny_tokenizer, engine=engine, max_new_tokens=6)
    requests = uneven_requests(len(tiny_tokenizer))
    assert largest_gap(model.eval(), requests, sampler.generate(requests), sampler.sampling) < 1e-5
    assert model.is_gradient_checkpointing


def test_a_group_larger_than_max_rows_is_sampled_whole(make_tiny, tiny_tokenizer, monkeypatch):
    sampler = TransformersSampler(make_tiny(), tiny_tokenizer, engine="cascade", max_new_tokens=4, max_rows=3)
    parts = []
    cascade = sampler._cascade
    monkeypatch.setattr(
        sampler, "_cascade", lambda part, sampling: parts.append(sum(r.n for r in part)) or cascade(part, sampling)
    )
    results = sampler.generate([SampleRequest((5, 6), n, n) for n in (2, 1, 5, 2, 2)])
    assert [len(g) for g in results] == [2, 1, 5, 2, 2]
    assert parts == [3, 5, 2, 2]


def test_every_named_end_token_is_found(make_tiny, tiny_tokenizer):
    model = make_tiny()
    model.generation_config.eos_token_id = [7, 9]
    assert find_eos_ids(model, tiny_tokenizer) == {7, 9, tiny_tokenizer.eos_token_id}
    model.generation_config.eos_token_id = 7
    assert TransformersSampler(model, tiny_tokenizer).eos_ids == sorted({7, tiny_tokenizer.eos_token_id})
    assert TransformersSampler(model, tiny_tokenizer, eos_ids=[11, 5, 5]).eos_ids == [5, 11]


def test_a_model_that_names_no_end_is_an_error(make_tiny):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    model = make_tiny()
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        find_eos_ids(model, endless)


@pytest.mark.parametrize(
    ("settings", "text"), [({"engine": "fast"}, "auto, cascade or generate"), ({"max_rows": 0}, "at least 1")]
)
def test_wrong_settings_are_one_line_errors(make_tiny, tiny_tokenizer, settings, text):
    with pytest.raises(ValueError, match=text) as error:
        TransformersSampler(make_tiny(), tiny_tokenizer, **settings)
    assert "\n" not in str(error.value)


def test_the_samplers_own_settings_are_used(make_tiny, tiny_tokenizer, uneven_requests):
    sampler = TransformersSampler(
        make_tiny(), tiny_tokenizer, max_new_tokens=5, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, stop=["x"]
    )
    assert sampler.sampling == SamplingConfig(5, 0.5, 0.9, 7, 0.1, stop=("x",))
    requests = uneven_requests(len(tiny_tokenizer))
    assert sampler.generate(requests) == sampler.generate(requests, sampler.sampling)
