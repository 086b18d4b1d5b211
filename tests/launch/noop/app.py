"""A front door whose runs do next to nothing: what is left is the cost and the care of launching them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from core_torl.config.errors import UserError
from core_torl.config.paths import conf_dir
from core_torl.launch.app import run_app


def task(cfg: Any) -> float:
    if cfg.deaf:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if cfg.litter:
        subprocess.Popen(["sleep", "1000"])
    print(f"job {cfg.seed} on GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
    time.sleep(cfg.sleep_s)
    if cfg.fail:
        raise UserError("fail=true: as asked")
    return cfg.value + cfg.seed


if __name__ == "__main__":
    os.environ["CORE_TORL_CONF"] = conf_dir()
    run_app("noop", task, record=True, config_dir=str(Path(__file__).parent), imports=("hydra",))
