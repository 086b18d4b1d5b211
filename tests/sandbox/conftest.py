"""The process sandboxes under test, started once per module with short limits; skipped, with the reason, where absent."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

from core_torl.config.errors import UserError
from core_torl.sandbox.bubblewrap import Bubblewrap
from core_torl.sandbox.locked_forkserver import LandlockPlan, LockedForkserver
from core_torl.sandbox.pool import ProcessSandbox


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """A folder that no other test and no other test process uses, for what a sandbox leaves behind to be seen in."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Landlocked(LockedForkserver):
    """The weaker way of the locked fork-server alone."""

    def plans(self):
        return [LandlockPlan()]


KINDS: dict[str, type[ProcessSandbox]] = {
    "bubblewrap": Bubblewrap,
    "locked_forkserver": LockedForkserver,
    "landlock": Landlocked,
}
LIMITS = {"workers": 1, "timeout_s": 1.0, "cpu_s": 5.0, "memory_mb": 512, "scratch_mb": 8, "file_mb": 4}


def start(kind: str, **options) -> ProcessSandbox:
    """A started sandbox of exactly that kind; skips where this machine cannot have it."""
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("NO BUBBLEWRAP HERE (bwrap): its walls are NOT tested; apt-get install bubblewrap")
    if kind == "landlock" and os.geteuid() == 0:
        pytest.skip("the landlock way refuses root; run the suite as a plain user to test it")
    sandbox = KINDS[kind](**{**LIMITS, **options})
    try:
        sandbox.start()
    except UserError as error:
        pytest.skip(f"NO {kind.upper()} HERE, its walls are NOT tested: {error}")
    if kind == "bubblewrap" and sandbox.isolation["plan"] != "bubblewrap":
        plan = sandbox.isolation["plan"]
        sandbox.close()
        pytest.skip(f"BUBBLEWRAP DOES NOT WORK HERE (fell back to {plan}): its walls are NOT tested")
    return sandbox


@pytest.fixture(scope="module", params=KINDS)
def locked(request):
    sandbox = start(request.param)
    yield sandbox
    sandbox.close()
