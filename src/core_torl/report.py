"""``core-torl-report``: compares finished training runs, cell by cell, in a table and in pictures."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from core_torl.launch.app import run_app


def check(cfg: DictConfig) -> None:
    from core_torl.config.checks import check_report

    check_report(cfg)


def task(cfg: DictConfig) -> Any:
    from core_torl.reports.comparing import report

    return report(cfg)


def main() -> None:
    run_app("report", task, check=check)


if __name__ == "__main__":
    main()
