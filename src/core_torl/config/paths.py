"""Where the shipped YAML files are: inside the package when installed from a wheel, beside ``src`` in a checkout."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> str:
    """Absolute path of ``conf/``. Raises FileNotFoundError if the installation lost it."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / "train.yaml").is_file():
            return str(candidate)
    raise FileNotFoundError(f"no conf/train.yaml beside {package}: install core-torl again")
