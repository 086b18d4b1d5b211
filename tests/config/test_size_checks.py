"""What cannot work with sharded or packed weights is refused in one line, before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from core_torl.config.checks import check_evaluate, check_train
from core_torl.config.errors import UserError

from .test_compose import composed

FSDP = ["trainer=fsdp", "sampler.copy_weights=true"]
NF4 = ["model.quantization=nf4", "model.lora.rank=8"]


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch):
    """As if it were installed, whether it is or not."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "bitsandbytes" else find(name))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trainer.strategy=deepspeed"], "trainer.strategy='deepspeed': use auto, ddp or fsdp"),
        (["trainer=fsdp"], "trainer.strategy=fsdp.*set sampler.copy_weights=true, or use sampler=vllm"),
        (
            [*FSDP, "trainer.precision=64-true"],
            "trainer.precision=64-true with trainer.strategy=fsdp: use bf16-mixed",
        ),
        (
            ["trainer=fsdp", "sampler.copy_weights=true", *NF4],
            "model.quantization=nf4: packed weights cannot be sharded; use trainer=gpu",
        ),
        ([*FSDP, "prompts_per_step=3"], "prompts_per_step=3 must be a multiple of the 2 processes"),
        (["model.quantization=int8", "model.lora.rank=8"], "model.quantization='int8': use nf4"),
        (["model.quantization=nf4"], "model.quantization=nf4.*set model.lora.rank=16"),
        ([*NF4, "sampler.copy_weights=true"], "set sampler.copy_weights=false, or use sampler=vllm"),
        (["variant.microbatch_tokens=0"], "variant.microbatch_tokens=0: must be at least 1, or null"),
    ],
)
def test_training_refuses(overrides, says):
    with pytest.raises(UserError, match=says) as error:
        check_train(composed("train", *overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        FSDP,
        [*FSDP, "trainer.accelerator=cpu", "trainer.precision=32-true", "model.lora.rank=8"],
        ["trainer=ddp_gpu", "trainer.devices=4", "trainer.num_nodes=2"],
        ["trainer=gpu", *NF4],
        ["variant.microbatch_tokens=4096", "model.offload_reference=true"],
    ],
)
def test_training_takes(overrides):
    check_train(composed("train", *overrides))


def test_packed_weights_need_bitsandbytes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*pip install 'core-torl\[qlora\]'") as error:
        check_train(composed("train", *NF4))
    assert "\n" not in str(error.value)


def test_an_evaluation_refuses_shards_as_it_does_ranks():
    with pytest.raises(UserError, match="an evaluation runs in one process"):
        check_evaluate(composed("evaluate", "trainer=fsdp"))
