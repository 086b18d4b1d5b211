"""``core-torl-watch``: a live table of a sweep that runs, from this terminal or another one, on any launcher."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from core_torl.launch.app import run_app


def task(cfg: DictConfig) -> Any:
    from core_torl.launch.view import watch

    return watch(cfg)


def main() -> None:
    run_app("watch", task)


if __name__ == "__main__":
    main()
