"""Attacks that only a plain user's sandbox leaves open to try, when the suite itself runs as root.

As root, programs get an id of their own (``ids.py``). Where a plain user runs this project they share the worker's, may
open more of what is their own, and Landlock stands in where namespaces are forbidden; none of that is seen as root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.sandbox.conftest import KINDS

pytestmark = pytest.mark.sandbox

ROOT = Path(__file__).parents[2]
# Nobody, if that one can read the interpreter; else root's files under another name and without root's rights. (To the
# second, as root by its true id, the kernel's limit on processes does not apply.)
WAYS = (
    ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"],
    ["unshare", "--user", "--map-user=1000", "--map-group=1000"],
)
PROBE = "import os, sys; open(os.path.realpath(sys._base_executable)); import core_torl.sandbox.pool, tests.sandbox.conftest"
ATTACKS = (
    "steals_its_own_output",
    "memory_shared_by_many_processes",
    "kill_everything",
    "kill_parent",
    "kill_group_of_parent",
    "ptrace",
    "memory_of_the_parent",
    "writes_to_all_descriptors",
    "host_tmp",
    "network_loopback",
)


def test_attacks_of_a_plain_user():
    if os.geteuid() != 0:
        pytest.skip("the suite runs as a plain user already: test_attacks.py does all of this")
    # pytest's own folder for temporary files can be entered by root only.
    folder = Path(tempfile.mkdtemp(prefix="core-torl-plain-user-", dir="/tmp"))
    folder.chmod(0o777)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder), "TMPDIR": str(folder)}
    for name in [n for n in environment if n.startswith("PYTEST_")]:  # of the run that this test is part of
        del environment[name]

    def run(way: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        words = [*way, sys.executable, *arguments]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)

    try:
        found = [way for way in WAYS if shutil.which(way[0]) and run(way, "-c", PROBE).returncode == 0]
        if not found:
            pytest.skip("NO WAY TO BE A PLAIN USER HERE (setpriv, unshare): their sandboxes are NOT tested")
        test = "tests/sandbox/test_attacks.py::test_attack_is_contained_and_the_next_call_is_unharmed"
        chosen = [f"{test}[{kind}-{attack}]" for kind in KINDS for attack in ATTACKS]
        options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(folder / "b")]
        done = run(found[0], *options, *chosen)
    finally:
        shutil.rmtree(folder)
    words = done.stdout[-3000:] + done.stderr[-500:]
    assert done.returncode == 0, words
    passed = re.search(r"(\d+) passed", done.stdout)
    if passed is None:
        pytest.skip(f"NO SANDBOX OF A PLAIN USER WORKS HERE; NOT tested: {words[-300:]}")
    assert int(passed[1]) % len(ATTACKS) == 0, words
