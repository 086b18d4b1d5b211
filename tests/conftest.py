"""What several rooms' tests share: small policies that no shipped policy decides, and the commands in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: begun last, one of them would keep one worker busy and the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


WORDS = ["What", "is", "the", "sum", "of", "and", "?", ".", ":", "Question", "Answer", "trace", "matrix"]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The project's own kind of tokenizer on a handful of words; about 650 tokens."""
    from core_torl.model.tiny_tokenizer import build_tokenizer

    return build_tokenizer(WORDS, max_length=512)


@pytest.fixture(scope="session")
def make_tiny(tiny_tokenizer):
    """``make_tiny(seed)``: a very small Llama in eval mode whose distributions are far from uniform."""
    import torch

    from core_torl.model.tiny import TinyArchitecture, build_tiny

    def make(
        seed: int = 0, scale: float = 6.0, layers: int = 2, max_length: int = 512, width: int = 32, heads: int = 4
    ):
        arch = TinyArchitecture(layers=layers, width=width, heads=heads, mlp=64, max_length=max_length)
        with torch.random.fork_rng():
            model = build_tiny(tiny_tokenizer, arch, seed)
        with torch.no_grad():  # as initialised, attention hardly moves the output and an error in it would not show
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
        return model.eval()

    return make


@pytest.fixture
def front_door(monkeypatch) -> Callable[..., int]:
    """``front_door("train", "rl_steps=2")`` runs the command in this process and returns its exit code."""

    def run(name: str, *arguments: str) -> int:
        from importlib import import_module

        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [f"core-torl-{name}", *arguments])
        try:
            import_module(f"core_torl.{name}").main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        return 0

    return run
