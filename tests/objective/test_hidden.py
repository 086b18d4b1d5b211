"""Guards hidden states and head: together they are the model's own logits, on answer positions, for real families."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from core_torl.objective.hidden import answer_hidden, check_head, head_of

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def random_model(config_of, vocabulary: int, scale: float = 4.0, **changes):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config_of(vocab_size=vocabulary, **(SMALL | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval()


@pytest.fixture(scope="module")
def models(make_tiny, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    size = len(tiny_tokenizer)

    def adapted(targets):
        settings = LoraConfig(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(random_model(Qwen2Config, size), settings).eval()

    return {
        "tiny": make_tiny(seed=11, scale=4.0),
        "qwen2": random_model(Qwen2Config, size),
        "qwen3": random_model(Qwen3Config, size),
        "mistral": random_model(MistralConfig, size),
        "lora": adapted("all-linear"),
        "lora with an adapted head": adapted(["q_proj", "v_proj", "lm_head"]),
    }


NAMES = ["tiny", "qwen2", "qwen3", "mistral", "lora", "lora with an adapted head"]


@pytest.mark.parametrize("name", NAMES)
def test_head_of_hidden_states_are_the_models_logits_on_answer_positions(models, make_batch, name):
    """Against plain forward passes row by row, without padding."""
    model, batch = models[name], make_batch()
    with torch.no_grad():
        states = answer_hidden(model, batch)
        assert states.shape[:2] == batch.train_mask.shape
        found = head_of(model)(states)
        for i in range(batch.rows):
            ids = batch.ids[i][batch.attention_mask[i].bool()]
            count = int(batch.attention_mask[i, batch.ids.shape[1] - batch.answer_length :].sum())
            plain = model(input_ids=ids[None]).logits[0, len(ids) - count - 1 : -1]
            assert torch.allclose(found[i, :count], plain, atol=2e-4), (i, (found[i, :count] - plain).abs().max())
            assert plain.std() > 0.05, "logits that are all alike would show no fault"


def test_adapters_count(models, make_batch):
    batch = make_batch()
    for name in ("lora", "lora with an adapted head"):
        model = models[name]
        with torch.no_grad():
            ours = head_of(model)(answer_hidden(model, batch))
            with model.disable_adapter():
                base = head_of(model)(answer_hidden(model, batch))
        assert not torch.allclose(ours, base, atol=1e-2), name


def test_hidden_states_carry_a_gradient_to_all_that_is_trained(models, make_batch):
    for name in ("tiny", "lora with an adapted head"):
        model = models[name]
        model.zero_grad()
        head_of(model)(answer_hidden(model, make_batch())).square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        model.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_whose_head_is_all_passes_and_is_left_in_its_mode(models, name):
    model = models[name]
    for mode in (True, False):
        model.train(mode)
        check_head(model, torch.tensor([[5, 6, 7]]))
        assert model.training is mode
    model.eval()


@pytest.mark.parametrize(
    ("config_of", "changes", "scale"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}, 4.0),
        (CohereConfig, {"logit_scale": 0.0625}, 4.0),
        (Gemma2Config, {"final_logit_softcapping": 30.0}, 40.0),
    ],
    ids=["granite scales", "cohere scales", "gemma2 caps"],
)
def test_a_model_that_does_more_to_its_logits_is_refused(tiny_tokenizer, config_of, changes, scale):
    model = random_model(config_of, len(tiny_tokenizer), scale, **changes).train()
    with pytest.raises(ValueError, match="caps or scales") as error:
        check_head(model, torch.tensor([[5, 6, 7]]))
    assert "\n" not in str(error.value) and model.training
    off = {name: None if name == "final_logit_softcapping" else 1.0 for name in changes}
    check_head(random_model(config_of, len(tiny_tokenizer), scale, **off), torch.tensor([[5, 6, 7]]))


def test_a_model_that_scales_without_its_config_saying_so_is_refused_by_its_numbers(tiny_tokenizer):
    model = random_model(Qwen2Config, len(tiny_tokenizer))
    check_head(model, torch.tensor([[5, 6, 7]]))
    forward = model.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with pytest.raises(ValueError, match="logits differ from its head's by 50"):
        check_head(model, torch.tensor([[5, 6, 7]]))
