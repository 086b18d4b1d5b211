"""``core-torl-evaluate``: standard and robust accuracy of a policy, or of a training checkpoint."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from core_torl.launch.app import run_app


def check(cfg: DictConfig) -> None:
    from core_torl.config.checks import check_evaluate

    check_evaluate(cfg)


def task(cfg: DictConfig) -> Any:
    from core_torl.runs.evaluation import evaluate

    return evaluate(cfg)


def main() -> None:
    run_app("evaluate", task, check=check, record=True, imports=("core_torl.runs.evaluation",))


if __name__ == "__main__":
    main()
