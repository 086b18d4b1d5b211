"""What tests need to take a real vLLM engine where it is installed, and to say loudly where it is not."""

from __future__ import annotations

from typing import Any

import pytest

from core_torl.config.errors import UserError
from core_torl.config.vllm_checks import check_vllm
from core_torl.model.load import Policy


def _missing() -> str:
    try:
        check_vllm()
    except UserError as error:
        return f"{error}; `make test-vllm` runs these tests in an environment of their own"
    return ""


NEEDS_VLLM = [pytest.mark.vllm, pytest.mark.skipif(bool(_missing()), reason=_missing())]


def make_vllm(model: Any, tokenizer: Any, **settings: Any) -> Any:
    """A sampler with an engine that has taken the model's weights as version 0."""
    from core_torl.sampler.vllm import VllmSampler

    sampler = VllmSampler(model, tokenizer, **{"kv_cache_mb": 64, "enforce_eager": True, **settings})
    sampler.sync(Policy(model, tokenizer, adapted=hasattr(model, "peft_config")), "0")
    return sampler
