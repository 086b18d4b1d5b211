"""W&B finds no account, and may write below the tests' own folders only."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path_factory):
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("wandb-home")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))  # staged files and logs stay with the run: see test_artifacts.py
    monkeypatch.setenv("NETRC", str(home / "no-netrc"))
