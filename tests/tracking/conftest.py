"""W&B may write below the test's own folder only, and finds no account."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path_factory):
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("wandb-home")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "no-netrc"))
