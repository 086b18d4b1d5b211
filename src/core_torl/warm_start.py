"""``core-torl-warm-start``: makes the tiny policy from nothing, with its tokenizer and its model card."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from core_torl.launch.app import run_app


def check(cfg: DictConfig) -> None:
    from core_torl.config.checks import check_warm_start

    check_warm_start(cfg)


def task(cfg: DictConfig) -> Any:
    from core_torl.runs.warming import warm

    return warm(cfg)


def main() -> None:
    run_app("warm_start", task, check=check, record=True)


if __name__ == "__main__":
    main()
