"""What the policy is shown: true of every ending, short, and the released rules as they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_torl.sandbox.protocol import Execution
from core_torl.tool.legacy_torl import TIMED_OUT, LegacyTorlObservations
from core_torl.tool.observation import Observations, cut_middle

TRACEBACK = 'Traceback (most recent call last):\n  File "main.py", line 1, in <module>\nValueError: no root\n'


@pytest.mark.parametrize(
    ("execution", "shown", "released"),
    [
        (Execution("12\n", "", "ok"), "12", "12"),
        (Execution("12\n", "a warning", "ok"), "12", "12"),
        (Execution("", "", "ok"), "[no output: print the result]", TIMED_OUT),
        (Execution("  \n", "", "ok"), "[no output: print the result]", ""),
        (Execution("", TRACEBACK, "error"), "ValueError: no root", "ValueError: no root"),
        (Execution("3\n", TRACEBACK, "error"), "3\nValueError: no root", "3"),
        (Execution("", "", "error"), "Error: the program failed without a message", TIMED_OUT),
        (Execution("", "", "time_limit"), "TimeoutError: the program was stopped at its time limit", TIMED_OUT),
        (Execution("7\n", "", "time_limit"), "7\nTimeoutError: the program was stopped at its time limit", "7"),
        (Execution("", "", "memory_limit"), "MemoryError: the program was stopped at its memory limit", TIMED_OUT),
        (Execution("a\n", "", "output_limit"), "a\n[stopped: the program printed too much]", "a"),
        (Execution("Error bound\n0.1\n", "", "ok"), "Error bound\n0.1", "0.1"),
    ],
    ids=str,
)
def test_every_ending_has_its_own_text(execution, shown, released):
    assert Observations().text(execution) == shown
    assert LegacyTorlObservations().text(execution) == released


def test_the_whole_traceback_can_be_asked_for():
    assert Observations(error="full").text(Execution("", TRACEBACK, "error")) == TRACEBACK.strip()


@pytest.mark.parametrize("rules", [Observations(), LegacyTorlObservations()])
def test_a_failing_sandbox_is_no_observation(rules):
    with pytest.raises(ValueError, match="not an observation"):
        rules.text(Execution("", "", "infrastructure"))


def test_long_outputs_lose_their_middle():
    text = Observations().text(Execution("a" * 300 + "b" * 300, "", "ok"))
    assert len(text) == 256 and text.startswith("a" * 127 + "...") and text.endswith("b" * 126)
    released = LegacyTorlObservations().text(Execution("a" * 300 + "b" * 300, "", "ok"))
    assert released == "a" * 128 + "..." + "b" * 128
    assert LegacyTorlObservations().text(Execution("a" * 256, "", "ok")) == "a" * 128 + "..." + "a" * 128
    assert Observations().text(Execution("a" * 256, "", "ok")) == "a" * 256


@given(
    printed=st.text(max_size=600),
    failed=st.text(max_size=600),
    status=st.sampled_from(["ok", "error", "time_limit", "memory_limit", "output_limit"]),
    longest=st.integers(16, 300),
)
def test_an_observation_is_never_empty_and_never_too_long(printed, failed, status, longest):
    rules = Observations(max_chars=longest, no_output="[none]", time_limit="T", memory_limit="M", output_limit="O")
    text = rules.text(Execution(printed, failed, status))
    assert 0 < len(text) <= max(longest, len("Error: the program failed without a message"))


@given(text=st.text(max_size=100), longest=st.integers(16, 120))
def test_what_is_kept_are_the_ends(text, longest):
    cut = cut_middle(text, longest)
    assert len(cut) == min(len(text), longest)
    head, _, tail = cut.partition("...") if len(text) > longest else (text, "", "")
    assert text.startswith(head) and text.endswith(tail)


def test_what_went_wrong_is_kept_when_much_was_printed():
    text = Observations(max_chars=64).text(Execution("x" * 500, TRACEBACK, "error"))
    assert text.endswith("\nValueError: no root") and len(text) == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_chars": 3}, "tool.observation.max_chars=3"),
        ({"error": "lastline"}, "tool.observation.error='lastline'"),
        ({"no_output": " "}, "tool.observation.no_output is empty"),
        ({"time_limit": ""}, "tool.observation.time_limit is empty"),
    ],
)
def test_wrong_settings_are_one_line_errors(change, words):
    with pytest.raises(ValueError, match=words):
        Observations(**change)
