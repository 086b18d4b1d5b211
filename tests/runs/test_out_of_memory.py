"""Running out of memory ends a run with one line that names what to turn down."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from core_torl.config import UserError
from core_torl.runs.out_of_memory import advice_on_memory
from tests.config.test_compose import composed

from .conftest import SMALL


@pytest.mark.parametrize(
    ("overrides", "names", "not_named"),
    [
        ([], ["variant.microbatch_tokens=816 ", "model.gradient_checkpointing=true", "sampler.max_rows="], "offload"),
        (["variant.microbatch_tokens=4096"], ["lower variant.microbatch_tokens=4096"], "microbatch_size"),
        (
            ["objective.kl_coef=0.1"],
            ["model.offload_reference=true", "trainer=fsdp", "model.lora.rank=16"],
            "utilization",
        ),
        (["model.lora.rank=8", "model.gradient_checkpointing=true"], ["variant.microbatch_tokens"], "checkpointing"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=["cuda", "cpu"],
)
def test_the_line_says_what_to_turn_down(overrides, names, not_named, error):
    with (
        pytest.raises(UserError, match="out of memory while training") as said,
        advice_on_memory(composed("train", *overrides), "training"),
    ):
        raise error
    text = str(said.value)
    assert "\n" not in text and all(name in text for name in names) and not_named not in text
    assert said.value.__cause__ is error


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shapes") as error, advice_on_memory(composed("train"), "training"):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(error.value, UserError)


@pytest.mark.slow
def test_a_training_run_ends_with_that_line(front_door, tmp_path, monkeypatch, capsys):
    def full(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(pl.Trainer, "fit", full)
    quiet = ["logger.mode=disabled", "evaluation.max_problems=1", f"hydra.run.dir={tmp_path}"]
    assert front_door("train", *SMALL, *quiet) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert "out of memory while training" in errors[-1] and "variant.microbatch_tokens=" in errors[-1]
    assert not any("Traceback" in line for line in errors)
