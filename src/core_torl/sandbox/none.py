"""No sandbox. Programs of a policy are not run at all; this is what ``sandbox=none`` means, not "run them unguarded".

It guards against everything by refusing. Runs without tools start no sandbox, whichever is chosen.
"""

from __future__ import annotations

from concurrent.futures import Future

from core_torl.config.errors import UserError
from core_torl.sandbox.protocol import Execution


class NoSandbox:
    """Refuses to start."""

    concurrency = 1

    def start(self) -> None:
        """Raises UserError."""
        raise UserError("sandbox=none runs no programs; choose one that does: sandbox=bubblewrap")

    def submit(self, code: str) -> Future[Execution]:
        """An infrastructure failure, always."""
        future: Future[Execution] = Future()
        future.set_result(Execution("", "", "infrastructure", detail="sandbox=none runs no programs"))
        return future

    def close(self) -> None:
        """Nothing to give back."""
