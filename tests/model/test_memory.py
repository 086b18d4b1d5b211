"""Arithmetic against the real thing: parameters, adapters, optimizer state, cache and kept activations of small models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from core_torl.model.memory import (
    KNOWN,
    Architecture,
    Plan,
    checkpointed_bytes,
    estimate,
    gib,
    layer_bytes,
    trained_parameters,
    whole_logits_bytes,
)

SMALL = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 512,
}  # fmt: skip
KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2 tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama with biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": (LlamaConfig, LlamaForCausalLM, {"head_dim": 48, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


def small(kind: str):
    config, model, changes = KINDS[kind]
    torch.manual_seed(0)
    return model(config(**SMALL | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_real_model(kind):
    model = small(kind)
    assert Architecture.of(model.config).parameters == sum(p.numel() for p in model.parameters())


def test_the_presets_have_their_published_sizes():
    """From the model cards: 7.62, 1.54, 1.78 and 8.03 billion; exact numbers are those of the published weights."""
    assert {name.split("/")[1]: known.parameters for name, known in KNOWN.items()} == {
        "Qwen2-Math-7B": 7_615_616_512,
        "Qwen2.5-Math-7B": 7_615_616_512,
        "Qwen2.5-Math-1.5B": 1_543_714_304,
        "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
        "Meta-Llama-3-8B-Instruct": 8_030_261_248,
    }


def test_a_known_architecture_is_that_of_a_config_with_its_numbers():
    """The table and the reader of configs agree, without any weights: the whole model on the meta device."""
    known = KNOWN["Qwen/Qwen2.5-Math-1.5B"]
    config = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    assert replace(Architecture.of(config), head_dim=None) == known
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen2ForCausalLM(config).parameters()) == known.parameters


def test_another_family_is_not_guessed():
    from transformers import GPT2Config

    assert Architecture.of(GPT2Config()) is None


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_adapters_are_those_of_peft(kind, targets):
    from peft import LoraConfig, get_peft_model

    model = small(kind)
    found = Architecture.of(model.config).lora_parameters(8, targets)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    assert found == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["qwen2 tied", "llama"])
def test_a_cache_takes_as_many_bytes_as_the_real_one(kind):
    model = small(kind)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones(3, 17, dtype=torch.long), past_key_values=cache, use_cache=True)
    real = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert Architecture.of(model.config).kv_bytes_per_token(4) * 3 * 17 == real


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_gradients_and_optimizer_state_take_what_they_really_take(rank):
    from peft import LoraConfig, get_peft_model

    model = small("qwen2")
    shape, plan = Architecture.of(model.config), Plan(rank=rank)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    state = sum(t.numel() * 4 for s in optimizer.state.values() for t in (s["exp_avg"], s["exp_avg_sq"]))
    always = estimate(shape, plan).always
    assert always["AdamW's two moments"] == state
    assert always["gradients"] == sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
    weights = always["weights"] + always.get("LoRA adapters", 0)
    assert weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert trained_parameters(shape, plan) * 4 == always["gradients"]


def kept(model, tokens: torch.Tensor, mixed: bool) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed, cache_enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), cast:
        model.model(input_ids=tokens, use_cache=False)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize(("mixed", "dtype"), [(False, "float32"), (True, "float32"), (False, "bfloat16")])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_activations_are_about_what_a_forward_pass_keeps(kind, mixed, dtype):
    """Exactly a layer's input with checkpointing, up to positions; within an eighth without it."""
    model = small(kind).to(getattr(torch, dtype)).train()
    shape, tokens = Architecture.of(model.config), torch.randint(0, 97, (4, 64))
    weight, element = (4 if dtype == "float32" else 2), (2 if mixed or dtype != "float32" else 4)
    plain = kept(model, tokens, mixed) - (2 * shape.layers * shape.layer_parameters if mixed else 0)
    assert shape.layers * layer_bytes(shape, 256, element, weight) == pytest.approx(plain, rel=0.13)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert checkpointed_bytes(shape, 256, weight) == pytest.approx(kept(model, tokens, mixed), rel=0.01)


SHAPE = KNOWN["Qwen/Qwen2-Math-7B"]
FULL = Plan(mixed=True, checkpointing=True, tokens=8 * 2048, answer_tokens=8 * 1024)


def test_sharding_divides_what_each_device_holds_and_plain_copies_do_not():
    one, four = estimate(SHAPE, FULL), estimate(SHAPE, replace(FULL, ranks=4, sharded=True))
    assert sum(four.always.values()) == pytest.approx(sum(one.always.values()) / 4)
    assert four.training["gathered weights"] > SHAPE.embedding_parameters * 2
    copies = estimate(SHAPE, replace(FULL, ranks=4))
    assert sum(copies.always.values()) == sum(one.always.values()) + copies.always["DDP's buckets"]


def test_all_weights_of_7b_with_adamw_are_sixteen_bytes_each():
    assert sum(estimate(SHAPE, FULL).always.values()) == 16 * SHAPE.parameters


def test_a_reference_costs_a_copy_that_may_wait_on_the_host():
    plain, beside = estimate(SHAPE, FULL), estimate(SHAPE, replace(FULL, copies=1))
    away = estimate(SHAPE, replace(FULL, copies=1, offload_copies=True))
    copied = SHAPE.parameters * 4
    assert beside.peak - plain.peak == copied
    assert away.always == plain.always and away.host["frozen copies"] == copied


def test_a_reference_that_waited_on_the_host_is_whole_on_the_device_while_it_reads():
    """Gradients and moments stay beside it, the policy's activations do not: the larger of the two counts."""
    plan = replace(FULL, copies=1, offload_copies=True)
    plain, away = estimate(SHAPE, FULL), estimate(SHAPE, plan)
    copied = SHAPE.parameters * 4
    assert plain.while_training < sum(plain.always.values()) + copied < away.while_training
    assert away.while_training < plain.while_training + copied and "layer inputs" not in away.training
    many = replace(FULL, checkpointing=False, tokens=1 << 18)  # activations of far more than the copy
    assert estimate(SHAPE, replace(many, copies=1, offload_copies=True)).training == estimate(SHAPE, many).training
    teacher = estimate(SHAPE, replace(plan, copy_teaches=True))
    assert teacher.while_training == plain.while_training + copied, "a teacher is read between the policy's passes"
    sharded = replace(plan, ranks=4, sharded=True)
    assert estimate(SHAPE, sharded).training == estimate(SHAPE, replace(FULL, ranks=4, sharded=True)).training
    assert estimate(SHAPE, sharded).host["frozen copies"] == copied / 4


def test_the_old_policy_as_teacher_copies_what_is_trained_and_stays_on_the_device():
    full, lora = FULL, Plan(dtype="bfloat16", rank=16)
    for plan, element in ((full, 4), (lora, 4)):
        found = estimate(SHAPE, replace(plan, shadows=1, offload_copies=True))
        assert found.always["the old policy"] == trained_parameters(SHAPE, plan) * element and not found.host
    assert "the old policy" in estimate(SHAPE, replace(full, shadows=1, offload_copies=True, sharded=True)).host


def test_each_rank_holds_all_weights_before_they_are_spread():
    spread = replace(FULL, ranks=64, sharded=True, copies=1, tokens=1024, answer_tokens=512)
    found, weights = estimate(SHAPE, spread), SHAPE.parameters * 4
    assert found.starting == {"all weights": weights, "whole frozen copies": weights} and found.loading == {}
    assert found.peak == 2 * weights > max(found.while_training, found.while_sampling)
    assert estimate(SHAPE, replace(spread, offload_copies=True)).starting == {"all weights": weights}
    assert estimate(SHAPE, replace(spread, shadows=1, offload_copies=True)).while_starting == 2 * weights


def test_a_sampler_that_sleeps_is_away_while_copies_are_made_but_not_while_it_is():
    plan = replace(FULL, ranks=8, sharded=True, copies=1, sampler_weights=2, cache_bytes=7)
    asleep, awake = estimate(SHAPE, replace(plan, sampler_sleeps=True)), estimate(SHAPE, plan)
    weights, own = SHAPE.parameters * 4, SHAPE.parameters * 2
    assert sum(asleep.loading.values()) == sum(awake.loading.values()) == weights + own + 7
    assert sum(asleep.starting.values()) == 2 * weights and asleep.host["sampler's weights, asleep"] == own
    assert sum(awake.starting.values()) == 2 * weights + own + 7 == awake.while_starting
    assert asleep.beside_sampler == weights and awake.beside_sampler == 2 * weights
    plain = estimate(SHAPE, replace(FULL, sampler_weights=2, cache_bytes=7, sampler_sleeps=True))
    assert plain.beside_sampler == sum(plain.always.values())


def test_a_sampler_that_sleeps_is_not_there_while_training():
    awake = estimate(SHAPE, replace(FULL, sampler_weights=2, cache_tokens=1000))
    asleep = estimate(SHAPE, replace(FULL, sampler_weights=2, cache_tokens=1000, sampler_sleeps=True))
    taken = SHAPE.parameters * 2 + 1000 * SHAPE.kv_bytes_per_token(2)
    assert awake.while_training - asleep.while_training == taken
    assert awake.while_sampling == asleep.while_sampling
    assert estimate(SHAPE, replace(FULL, cache_bytes=7)).sampling == {"key-value cache": 7}


def test_quantized_weights_below_adapters_take_half_a_byte_each_and_embeddings_stay():
    lora = Plan(dtype="bfloat16", rank=16)
    plain, packed = estimate(SHAPE, lora), estimate(SHAPE, replace(lora, quantization="nf4"))
    assert plain.always["weights"] == SHAPE.parameters * 2
    linear = SHAPE.layers * sum(i * o for i, o, _ in SHAPE.linears.values())
    assert packed.always["weights"] == pytest.approx(0.516 * linear + 2 * (SHAPE.parameters - linear))
    assert estimate(SHAPE, replace(FULL, quantization="nf4")) == estimate(SHAPE, FULL), "only below adapters"


def test_sizes_read_as_people_write_them():
    assert (gib(3 * 2**30), gib({"a": 2**20, "b": 2**19})) == ("3.0 GiB", "1.5 MiB")
    assert whole_logits_bytes(SHAPE, FULL) == 2 * 4 * 8 * 1024 * 152_064
