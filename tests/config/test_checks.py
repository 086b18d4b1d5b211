"""Combinations of keys that would train badly or be ignored in silence are refused, each with its own sentence."""

from __future__ import annotations

import pytest

from core_torl.config.checks import check_evaluate, check_train
from core_torl.config.errors import UserError

from .test_compose import composed


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.dtype=bfloat16"], "model.dtype=bfloat16 without LoRA: small updates"),
        (["trainer.precision=bf16-true"], "trainer.precision=bf16-true: small updates"),
        (["sampler.min_p=0.1"], "sampler.min_p=0.1 in training.*set sampler.min_p=0.0.*objective.correction=truncate"),
        (["sampler.top_k=5", "objective.correction=none"], "sampler.top_k=5 in training"),
        (["variant.overlap=true"], "set sampler.copy_weights=true"),
        (["ablation=sft", "variant.overlap=true"], "variant=sft samples nothing"),
        (["trainer.precision=16-mixed"], "use 32-true, 64-true or bf16-mixed"),
        (["trainer.devices=2"], "set trainer.strategy=ddp"),
        (["trainer=ddp", "prompts_per_step=3"], "prompts_per_step=3 must be a multiple of the 2 processes"),
    ],
)
def test_training_refuses(overrides, says):
    with pytest.raises(UserError, match=says):
        check_train(composed("train", *overrides))


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_truncated_sampling_is_fine_where_its_weights_are_corrected(correction):
    for key in ("sampler.top_p=0.9", "sampler.top_k=20", "sampler.min_p=0.1"):
        check_train(composed("train", key, f"objective.correction={correction}"))


def test_frozen_16_bit_weights_under_lora_are_fine():
    check_train(composed("train", "model.dtype=bfloat16", "model.lora.rank=8"))


def test_a_sampler_with_a_copy_of_the_weights_may_work_beside_training():
    check_train(composed("train", "variant.overlap=true", "sampler.copy_weights=true"))


def test_an_evaluation_refuses_ranks_that_it_would_ignore():
    with pytest.raises(UserError, match="an evaluation runs in one process"):
        check_evaluate(composed("evaluate", "trainer=ddp"))


def test_an_evaluation_samples_at_the_samplers_temperature_unless_told_otherwise():
    assert composed("evaluate", "sampler.temperature=0.6").evaluation.temperature == 0.6
