"""Two programs that prove a sandbox before it is trusted: one that must work, one that must fail.

The first prints a random token: a sandbox that is silently broken does not. The second tries to reach what is laid out
for it here, on this machine: a listener on the loopback device, a variable in this process's environment, a marker file
in the folder for temporary files, this package's own source, and the file of the machine's users. What it can reach,
any program of a policy could.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from core_torl.sandbox.protocol import Execution
from core_torl.sandbox.worker import WorkerLost

VARIABLE = "CORE_TORL_SANDBOX_CANARY"

_PROBES = """
import json, os, socket
def readable(path):
    with open(path, "rb") as file:
        return bool(file.read(1))
def environment():
    names = [os.environ.get({variable!r}) or ""]
    for number in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open("/proc/" + number + "/environ", "rb") as file:
                names.append(file.read().decode(errors="replace"))
        except OSError:
            pass
    return any({token!r} in name for name in names)
def connects():
    socket.create_connection(("127.0.0.1", {port}), 2).close()
    return True
found = []
for text, probe in (
    ("read /etc/passwd", lambda: readable("/etc/passwd")),
    ("read the folder for temporary files", lambda: readable({marker!r})),
    ("read this project's source", lambda: readable({source!r})),
    ("read the environment of this process", environment),
    ("open connections to this machine", connects),
):
    try:
        if probe():
            found.append(text)
    except OSError:
        pass
print(json.dumps(found))
"""


class Canary:
    """Lays out the bait while it is open. ``check`` may be called from several threads."""

    def __enter__(self) -> Canary:
        self._token = secrets.token_hex(16)
        # /proc/PID/environ shows what a process was started with, so the variable is for workers to inherit.
        os.environ[VARIABLE] = self._token
        self._marker = tempfile.NamedTemporaryFile(prefix="core-torl-canary-")
        self._marker.write(b"reachable")
        self._marker.flush()
        os.chmod(self._marker.name, 0o644)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop(VARIABLE, None)
        self._marker.close()
        self._listener.close()

    def check(self, run: Callable[[str], Execution]) -> list[str]:
        """What programs can reach and must not; empty if all is well.

        Raises WorkerLost if programs do not run.
        """
        result = run(f"print({self._token!r}[::-1])")
        if result.status != "ok" or result.stdout.strip() != self._token[::-1]:
            what = (result.stderr.strip().splitlines() or [result.detail])[-1]
            raise WorkerLost(f"a program that prints a word ended with {result.status}: {what[:200]}")
        probes = _PROBES.format(
            variable=VARIABLE,
            token=self._token,
            port=self._listener.getsockname()[1],
            marker=self._marker.name,
            source=str(Path(__file__).resolve()),
        )
        result = run(probes)
        try:
            found = json.loads(result.stdout)
        except ValueError:
            what = (result.stderr.strip().splitlines() or [result.detail])[-1]
            raise WorkerLost(f"the canary did not finish ({result.status}): {what[:200]}") from None
        return [str(text) for text in found]
