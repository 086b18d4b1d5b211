"""One line for each mistake of a user: what is wrong, where, and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a configuration or an input file. Front doors print its text as one line and exit with code 2."""


def nearest(wrong: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known name, comparing whole names and last parts; else an empty string."""
    names = sorted(set(known))
    found = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if not found:
        last = wrong.rsplit(".", 1)[-1]
        by_last = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
        found = [by_last[x] for x in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    return f" Did you mean {found[0]!r}?" if found else ""


def one_line(error: BaseException, keys: Iterable[str] = ()) -> str:
    """The message of ``error`` on one line; unknown keys and options get the nearest right name from ``keys``."""
    text = " ".join(str(error).split())
    found = re.search(r"Could not override '([^']+)'", text)
    if found:
        return f"unknown key {found[1]!r}.{nearest(found[1], keys)} (a new key would need a + before it)"
    found = re.search(r"Could not find '([^']+)'", text) or re.search(r"In '[^']*': Could not find '([^']+)'", text)
    if found:
        group, _, option = found[1].rpartition("/")
        available = re.search(r"Available options in '[^']*': (.*?)(?: Config search path|$)", text)
        options = [] if not available else [o for o in re.split(r"[\s,]+", available[1]) if o]
        if not options:
            return f"there is no config group {group or found[1]!r}.{nearest(group or found[1], keys)}"
        return f"{group}={option}: no such option.{nearest(option, options)} Available: {', '.join(options)}"
    found = re.search(r"Key '([^']+)' (?:is )?not in '[^']*'.*?full_key: (\S+)", text)
    if found:
        return f"unknown key {found[2]!r}.{nearest(found[2], keys)}"
    found = re.search(r"(Value .*?could not be converted to .*?|Invalid value .*?) full_key: (\S+)", text)
    if found:
        return f"{found[2]}: {found[1].rstrip(', ')}"
    return text.split(" full_key:")[0] if len(text) < 600 else text[:600] + " ..."
