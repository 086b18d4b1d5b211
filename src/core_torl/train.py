"""``core-torl-train``: reinforcement learning of one policy, evaluated before and after.

The front door only puts parts together and writes down what came of it. Nothing heavy is imported before the config is
known to be sound, so ``--help``, ``--cfg job`` and tab completion answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from core_torl.launch.app import run_app


def check(cfg: DictConfig) -> None:
    from core_torl.config.checks import check_train

    check_train(cfg)


def task(cfg: DictConfig) -> Any:
    """One training run; returns the headline number for a sweeper (the mean of the after-training accuracies)."""
    if cfg.dry_run:
        from core_torl.runs.dry_run import dry_run

        return dry_run(cfg)
    from core_torl.runs.training import train

    return train(cfg)


def report_on(sweep: Path) -> None:
    """At the end of a sweep: its aggregate and its report, in the sweep's folder."""
    from core_torl.reports.comparing import report_of

    report_of(sweep, sweep / "report")


def main() -> None:
    run_app("train", task, check=check, record=True, sweep_end=report_on, imports=("core_torl.runs.training",))


if __name__ == "__main__":
    main()
