r"""What the policy is shown of a program's run: a few words for each way it can end.

The paper says one thing, that of an error only the last line is shown (ToRL, section 2.3). Everything else here is a
choice, made so that a text never says what did not happen: a program that printed nothing is not told that it ran out
of time, and one that printed and then failed is shown both. ``core_torl.tool.legacy_torl`` holds the released rules.
"""

from __future__ import annotations

from core_torl.sandbox.protocol import Execution


def cut_middle(text: str, max_chars: int) -> str:
    """``text``, or its beginning and end around three dots, ``max_chars`` characters in all."""
    if len(text) <= max_chars:
        return text
    room = max_chars - 3
    return text[: room - room // 2] + "..." + text[len(text) - room // 2 :]


def last_line(text: str) -> str:
    """The last line with something on it, "" if there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


class Observations:
    """Texts by the way a program ended. At most ``max_chars`` characters, cut in the middle, the error's end kept.

    ``error`` is "last_line" (the paper) or "full" (the whole traceback). The other texts stand for a program that
    printed nothing, and for one that was stopped at a limit; of the latter, what it printed is shown before.

    Raises:
        ValueError: a value is out of range or a text is empty; the message names its config key and the fix.
    """

    def __init__(
        self,
        max_chars: int = 256,
        error: str = "last_line",
        no_output: str = "[no output: print the result]",
        time_limit: str = "TimeoutError: the program was stopped at its time limit",
        memory_limit: str = "MemoryError: the program was stopped at its memory limit",
        output_limit: str = "[stopped: the program printed too much]",
    ) -> None:
        if max_chars < 16:
            raise ValueError(f"tool.observation.max_chars={max_chars}: must be at least 16")
        if error not in ("last_line", "full"):
            raise ValueError(f"tool.observation.error={error!r}: use last_line or full")
        self.max_chars, self.error, self.no_output = max_chars, error, no_output
        self.stopped = {"time_limit": time_limit, "memory_limit": memory_limit, "output_limit": output_limit}
        for key, text in {"no_output": no_output, **self.stopped}.items():
            if not text.strip():
                raise ValueError(f"tool.observation.{key} is empty: the policy must be told something; write a text")

    def text(self, execution: Execution) -> str:
        """The observation between its fences. ``execution.status`` must not be "infrastructure": that is not shown."""
        if execution.status == "infrastructure":
            raise ValueError("a failure of the sandbox is not an observation")
        printed = execution.stdout.strip()
        if execution.status == "ok":
            return cut_middle(printed, self.max_chars) or self.no_output
        if execution.status == "error":
            failure = execution.stderr.strip() if self.error == "full" else last_line(execution.stderr)
            failure = failure or "Error: the program failed without a message"
        else:
            failure = self.stopped[execution.status]
        failure = cut_middle(failure, self.max_chars)
        room = self.max_chars - len(failure) - 1
        # What was printed gives way to what went wrong.
        return f"{cut_middle(printed, room)}\n{failure}" if printed and room >= 16 else failure
