"""``core-torl-watch``: a live table of a sweep that runs, from this terminal or another one, on any launcher."""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from core_torl.launch.app import run_app


def check(cfg: DictConfig) -> None:
    from core_torl.config.checks import check_watch

    check_watch(cfg)


def task(cfg: DictConfig) -> None:
    from core_torl.launch.view import watch

    sys.exit(watch(cfg))


def main() -> None:
    run_app("watch", task, check=check)


if __name__ == "__main__":
    main()
