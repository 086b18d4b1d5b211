"""Guards QLoRA: frozen weights in four bits, adapters that learn, and weights that are unpacked before they are merged.

The tests with packed weights need bitsandbytes, which also works on the CPU: pip install 'core-torl[qlora]'.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core_torl.model import quantize
from core_torl.model.load import load_policy
from core_torl.model.quantize import check_quantization
from core_torl.model.tiny import TinyArchitecture, build_tiny

LORA = {"rank": 4, "alpha": 32.0, "dropout": 0.0, "target_modules": "all-linear"}
IDS = torch.arange(5, 40)[None]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'core-torl[qlora]'"
)


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("policy")
    # Blocks of 64 weights are packed together.
    model = build_tiny(tiny_tokenizer, TinyArchitecture(layers=2, width=64, heads=2, mlp=128), 11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("quantization", "rank", "installed", "says"),
    [
        ("int3", 4, True, "model.quantization='int3': use nf4"),
        ("nf4", 0, True, "set model.lora.rank=16"),
        ("nf4", 4, False, "pip install 'core-torl[qlora]'"),
    ],
)
def test_mistakes_are_one_line_errors_before_anything_is_loaded(monkeypatch, quantization, rank, installed, says):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: object() if installed else None)
    for function in (
        check_quantization,
        lambda q, r: load_policy(path="shipped:tiny", quantization=q, lora={"rank": r}),
    ):
        with pytest.raises(ValueError) as error:
            function(quantization, rank)
        assert says in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_asked_of_a_policy_that_is_not_packed(monkeypatch):
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    check_quantization(None, 0)


def packed(folder: str):
    policy = load_policy(path=folder, quantization="nf4", lora=LORA, gradient_checkpointing=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # adapters start as nothing
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@needs_bitsandbytes
def test_frozen_weights_are_packed_and_gradients_reach_the_adapters_only(folder):
    policy = packed(folder)
    parameters = dict(policy.model.named_parameters())
    linear = [p for n, p in parameters.items() if "base_layer.weight" in n]
    assert linear and all(quantize.is_quantized(p) and p.dtype == torch.uint8 for p in linear)
    policy.model.train()
    policy.model(input_ids=IDS).logits.sum().backward()
    learning = {n for n, p in parameters.items() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning and all("lora_" in n for n in learning)
    assert {n for n, p in parameters.items() if p.requires_grad} == {n for n in parameters if "lora_" in n}
    assert set(policy.trainable_state()) == {n for n in parameters if "lora_" in n}, (
        "a checkpoint has no packed weights"
    )


@needs_bitsandbytes
def test_merged_weights_are_unpacked_first_and_give_the_policys_logits(folder, tmp_path):
    policy = packed(folder)
    first = {name: tensor.float() for name, tensor in policy.merged()}
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = dict(plain.named_parameters())
    with torch.no_grad():  # as a sampler's passes, which pack the weights in another way on a CPU
        policy.model.eval()(input_ids=IDS)
    merged = dict(policy.merged())
    assert all((t - first[n]).abs().max() < 0.02 * first[n].abs().max() for n, t in merged.items())
    policy.model.train()(input_ids=IDS).logits.sum().backward()
    assert {n: t.shape for n, t in merged.items()} == {n: p.shape for n, p in own.items()}
    with torch.no_grad():
        before = plain(input_ids=IDS).logits
        for name, tensor in merged.items():
            own[name].copy_(tensor)
        right = policy.model.eval()(input_ids=IDS).logits
        found = plain(input_ids=IDS).logits
    assert (right - before).abs().max() > 0.5 and (found - right).abs().max() < 0.03 * right.abs().max()
    policy.export(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    AutoTokenizer.from_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        assert torch.allclose(exported(input_ids=IDS).logits, found, atol=1e-5)


@needs_bitsandbytes
def test_the_reference_of_packed_weights_is_they_without_adapters(folder):
    policy = packed(folder)
    assert policy.frozen_copy() is None
    with torch.no_grad(), policy.reference(None) as reference:
        base = reference(input_ids=IDS).logits
    fresh = load_policy(path=folder, quantization="nf4", lora=LORA)
    with torch.no_grad():
        assert torch.allclose(fresh.model.eval()(input_ids=IDS).logits, base, atol=1e-5)
        assert (policy.model.eval()(input_ids=IDS).logits - base).abs().max() > 0.5
