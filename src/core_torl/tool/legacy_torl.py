r"""The observation rules of ToRL's released code, for comparison runs only. They mislead a policy in four ways:

a program that prints nothing is told ``Timed Out``; an error after a first ``print`` is hidden; printed text that holds
the word "Error" loses all but its last line; a time limit after partial output looks like success.

(Released: verl/workers/rollout/vllm_rollout/vllm_rollout_spmd.py, lines 214 to 236 and 308 to 325.) One thing is not
reproduced: there, a sandbox that could not be reached was shown as ``UnknownError`` and trained on. Here such an answer
leaves the loss under every rule.
"""

from __future__ import annotations

from core_torl.sandbox.protocol import Execution

TIMED_OUT = "timeout_decorator.timeout_decorator.TimeoutError: 'Timed Out'"
_LONGEST, _SIDE = 256, 128


class LegacyTorlObservations:
    """Same interface as core_torl.tool.observation.Observations, without settings."""

    def text(self, execution: Execution) -> str:
        """The observation between its fences. ``execution.status`` must not be "infrastructure": that is not shown."""
        if execution.status == "infrastructure":
            raise ValueError("a failure of the sandbox is not an observation")
        done = execution.status == "ok" or bool(execution.stdout)
        # SandboxFusion has nothing on stderr of a program that it stopped.
        shown = execution.stdout if done else execution.stderr if execution.status == "error" else ""
        if "Error" in shown:
            shown = shown.strip().split("\n")[-1]
        shown = (shown or TIMED_OUT).strip()
        return shown if len(shown) < _LONGEST else f"{shown[:_SIDE]}...{shown[-_SIDE:]}"
