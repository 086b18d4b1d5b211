"""Front doors called in this process: the real command line without a second start of Python."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hydra.core.global_hydra import GlobalHydra


@pytest.fixture
def front_door(monkeypatch) -> Callable[..., int]:
    """``front_door("train", "rl_steps=2")`` runs the command and returns its exit code."""

    def run(name: str, *arguments: str) -> int:
        from importlib import import_module

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


SMALL = (
    "rl_steps=2", "group_size=4", "prompts_per_step=4", "evaluation.max_problems=6", "evaluation.samples=1",
    "data.train_per_concept=4", "data.test_per_concept=1", "trainer.threads=1", "callbacks.checkpoint_every=1",
    "logger.system_metrics=false", "model.max_new_tokens=24",
)  # fmt: skip
