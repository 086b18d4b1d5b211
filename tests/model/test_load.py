"""Guards loading, adapting, checkpointing and exporting a policy, and that its reference stays what it was."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core_torl.model.load import check_model, load_policy, shipped_folder

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
IDS = torch.tensor([[1, 5, 6, 7, 8]])


@pytest.fixture(scope="module")
def folder(make_tiny, tiny_tokenizer, tmp_path_factory):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    path = tmp_path_factory.mktemp("policy")
    make_tiny(seed=21).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def change(policy) -> None:
    """What a few optimizer steps would do, only larger."""
    with torch.no_grad():
        for i, parameter in enumerate(p for p in policy.model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_reference_stays_what_was_loaded(folder, lora):
    policy = load_policy(path=folder, lora=lora)
    start = logits(policy.model.eval())
    frozen = policy.frozen_copy()
    assert policy.adapted is (lora is not None) is (frozen is None)
    change(policy)
    policy.model.train()
    part = next(m for m in policy.model.modules() if isinstance(m, torch.nn.Embedding))
    part.eval()  # frozen on purpose; it must come back as it was
    with policy.reference(frozen) as reference:
        assert not reference.training
        assert torch.allclose(logits(reference), start, atol=1e-6)
    assert policy.model.training and not part.training
    assert (logits(policy.model.eval()) - start).abs().max() > 0.1
    assert frozen is None or not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_checkpoint_brings_a_policy_back(folder, lora):
    policy = load_policy(path=folder, lora=lora)
    change(policy)
    state = policy.trainable_state()
    if lora:
        assert state and all("lora_" in name for name in state)
    fresh = load_policy(path=folder, lora=lora)
    assert not torch.allclose(logits(fresh.model), logits(policy.model))
    fresh.load_state({k: v.clone() for k, v in state.items()})
    assert torch.equal(logits(fresh.model), logits(policy.model))


def test_a_foreign_checkpoint_is_refused(folder):
    policy = load_policy(path=folder)
    state = policy.trainable_state()
    name = next(iter(state))
    for wrong in (
        {k: v for k, v in state.items() if k != name},
        state | {"extra": state[name]},
        state | {name: state[name][:-1]},
    ):
        with pytest.raises(ValueError, match="do not fit this model") as error:
            policy.load_state(wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_export_is_a_plain_transformers_folder(folder, lora, tmp_path):
    policy = load_policy(path=folder, lora=lora)
    change(policy)
    before = {n: p.data_ptr() for n, p in policy.model.named_parameters()}
    policy.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert torch.allclose(logits(model), logits(policy.model), atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert (tmp_path / "out" / "adapter").exists() is (lora is not None)
    assert {n: p.data_ptr() for n, p in policy.model.named_parameters()} == before, "exporting leaves the policy alone"


def test_settings_reach_the_model(folder):
    policy = load_policy(path=folder, dtype="bfloat16", attention="eager", gradient_checkpointing=True)
    assert policy.model.dtype == torch.bfloat16 and policy.model.config._attn_implementation == "eager"
    assert any(getattr(m, "gradient_checkpointing", False) for m in policy.model.modules())
    assert policy.pad_id == 0


def test_a_tokenizer_without_padding_pads_with_its_end_token(make_tiny, tiny_tokenizer, tmp_path):
    make_tiny().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_policy(path=str(tmp_path)).pad_id == tiny_tokenizer.eos_token_id


def test_gradients_reach_adapters_through_checkpointing(folder):
    policy = load_policy(path=folder, lora=LORA, gradient_checkpointing=True)
    policy.model.train()
    policy.model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in policy.model.parameters() if p.requires_grad)


def test_the_shipped_policy_loads():
    policy = load_policy(path="shipped:tiny")
    assert sum(p.numel() for p in policy.model.parameters()) < 1_000_000
    assert policy.model.config.vocab_size == len(policy.tokenizer)
    assert shipped_folder("tiny").name == "tiny"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"path": "shipped:huge"}, "known: tiny"),
        ({"path": "./nowhere"}, "no config.json there"),
        ({"path": "a/b/c"}, "no config.json there"),
        ({"path": "shipped:tiny", "dtype": "float8"}, "model.dtype='float8'"),
        ({"path": "shipped:tiny", "attention": "flash"}, "model.attention='flash'"),
    ],
)
def test_mistakes_are_one_line_errors_before_anything_is_loaded(settings, text):
    for function in (lambda **s: check_model(**{"dtype": "float32", "attention": "sdpa"} | s), load_policy):
        with pytest.raises(ValueError) as error:
            function(**settings)
        assert text in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_holds_no_model_is_a_one_line_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError) as error:
        load_policy(path=str(tmp_path))
    assert "\n" not in str(error.value)


# ---- shadows --------------------------------------------------------------------------------------------------------


def pointers(model, trained: bool | None = None) -> dict[str, int]:
    return {n: p.data_ptr() for n, p in model.named_parameters() if trained is None or p.requires_grad is trained}


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_shadow_owns_what_is_trained_and_shares_the_rest(folder, lora):
    policy = load_policy(path=folder, lora=lora)
    change(policy)
    before = {n: p.requires_grad for n, p in policy.model.named_parameters()}
    shadow = policy.shadow()
    own = pointers(shadow)
    assert own.keys() == pointers(policy.model).keys()
    frozen, trained = pointers(policy.model, trained=False), pointers(policy.model, trained=True)
    assert trained and bool(frozen) is (lora is not None)
    assert all(own[n] == at for n, at in frozen.items()), "what nobody trains is there once"
    assert not set(trained.values()) & set(own.values())
    assert not shadow.training and not any(p.requires_grad for n, p in shadow.named_parameters() if n in trained)
    assert {n: p.requires_grad for n, p in policy.model.named_parameters()} == before, "the policy is still trained"
    assert torch.equal(logits(shadow), logits(policy.model.eval()))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_shadow_stands_still_until_it_is_refreshed(folder, lora):
    policy = load_policy(path=folder, lora=lora)
    shadow = policy.shadow()
    start, at = logits(shadow), pointers(shadow)
    change(policy)
    assert torch.equal(logits(shadow), start)
    now = logits(policy.model.eval())
    assert (now - start).abs().max() > 0.1
    policy.refresh(shadow)
    assert torch.equal(logits(shadow), now) and pointers(shadow) == at
    change(policy)
    assert torch.equal(logits(shadow), now), "the weights were copied, not tied"


def test_the_reference_of_an_adapted_policy_is_the_base_model_and_leaves_the_adapters_as_they_were(folder):
    base = logits(load_policy(path=folder).model.eval())
    policy = load_policy(path=folder, lora=LORA)
    change(policy)
    trained = [p.requires_grad for p in policy.model.parameters()]
    policy.model.train()
    with policy.reference(None) as reference:
        assert torch.allclose(logits(reference), base, atol=1e-6) and not reference.training
        # Sharded parameters would remember a switch.
        assert [p.requires_grad for p in policy.model.parameters()] == trained
    assert policy.model.training
    assert (logits(policy.model.eval()) - base).abs().max() > 0.1, "the policy's own adapters are on again"


def test_an_offloaded_reference_lies_on_the_cpu_and_travels_for_as_long_as_it_is_needed(folder, monkeypatch):
    from core_torl.model import load as module

    moves = []

    def copied(tensor, device):
        moves.append(str(device))
        return tensor.clone()

    monkeypatch.setattr(module, "placed", copied)
    policy = load_policy(path=folder, offload_reference=True)
    start = logits(policy.model.eval())
    frozen = policy.frozen_copy()
    count = len(list(frozen.parameters()))
    assert moves == ["cpu"] * count, "it rests on the CPU"
    change(policy)
    resting = pointers(frozen)
    with policy.reference(frozen) as reference:
        assert moves[count:] == [str(policy.model.device)] * count
        assert not set(pointers(reference).values()) & set(resting.values()), "each weight has travelled"
        assert torch.equal(logits(reference), start)
    assert pointers(frozen) == resting, "and is not carried back"
    with pytest.raises(ArithmeticError), policy.at_hand(frozen):
        raise ArithmeticError
    assert pointers(frozen) == resting
    moves.clear()
    still = load_policy(path=folder)
    with still.reference(still.frozen_copy()):
        assert not moves
    adapted = load_policy(path=folder, lora=LORA, offload_reference=True)
    with adapted.at_hand(adapted.shadow()):  # its frozen weights are the policy's own
        assert not moves


def test_gradients_reach_the_policy_and_never_its_shadow(folder):
    policy = load_policy(path=folder, lora=LORA)
    shadow = policy.shadow()
    gap = policy.model(input_ids=IDS).logits - shadow(input_ids=IDS).logits
    gap.square().sum().backward()
    assert all(p.grad is not None for p in policy.model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in shadow.parameters())


def test_an_answer_that_is_given_needs_a_token_to_end_with(folder):
    policy = load_policy(path=folder)
    assert policy.eos_id == policy.tokenizer.eos_token_id == 2
    policy.tokenizer.eos_token = None
    with pytest.raises(ValueError) as error:
        _ = policy.eos_id
    assert str(error.value) == "model: the tokenizer has no end-of-sequence token, which given answers need"


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_merged_weights_are_those_of_the_trained_policy_under_plain_names(folder, lora):
    """What a sampler with weights of its own is given: a plain model with them answers as the trained one does."""
    policy = load_policy(path=folder, lora=lora)
    change(policy)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits(plain.eval()) - logits(policy.model.eval())).abs().max() > 0.1
    own = dict(plain.named_parameters())
    merged = dict(policy.merged())
    assert merged.keys() == own.keys()
    with torch.no_grad():
        for name, tensor in merged.items():
            assert not tensor.requires_grad
            own[name].copy_(tensor)
    assert torch.allclose(logits(plain), logits(policy.model), atol=1e-4)


def test_only_a_policy_with_adapters_can_hand_them_over(folder, tmp_path):
    with pytest.raises(ValueError, match=r"model\.lora\.rank=0"):
        load_policy(path=folder).save_adapter(tmp_path)
    load_policy(path=folder, lora=LORA).save_adapter(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_adapters_are_not_taken_for_a_model(folder, tmp_path):
    load_policy(path=folder, lora=LORA).save_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"LoRA adapters of .*, not a model; give the folder in which") as error:
        check_model(path=str(tmp_path), dtype="float32", attention="sdpa")
    assert folder in str(error.value) and "\n" not in str(error.value)
