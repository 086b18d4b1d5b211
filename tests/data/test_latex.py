"""Removing the second escaping of the quizzes: every run length, the single-escaped exceptions, the fault finder."""

import pytest

from core_torl.data.latex import N_COMMANDS, clean, faults


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        (r"$\\frac{1}{2}$", r"$\frac{1}{2}$"),
        (r"$2 \times 2$", r"$2 \times 2$"),
        (r"a \\\\ b", r"a \\ b"),
        (r"first\nsecond", "first\nsecond"),
        (r"end.\n\nthen", "end.\n\nthen"),
        (r"1 \\\\\n2", "1 \\\\\n2"),
        (r"1 \\\\\times", r"1 \\\times"),
        (r"$\\nu \\neq \\nabla$", r"$\nu \neq \nabla$"),
        (r"$\\{0\\}$, $m;\\ j$", r"$\{0\}$, $m;\ j$"),
        (r"$\{v_1\}$", r"$\{v_1\}$"),
        (r"\n\\begin{a}\nx", "\n\\begin{a}\nx"),
        ("no backslash, {a} $b$", "no backslash, {a} $b$"),
        ("", ""),
        ("ends in \\", "ends in \\"),
    ],
)
def test_a_run_of_backslashes_is_read_by_its_length(raw, cleaned):
    assert clean(raw) == cleaned


@pytest.mark.parametrize("command", sorted(N_COMMANDS))
def test_commands_that_start_with_n_are_no_line_breaks(command):
    assert clean(f"$a \\{command} b$") == f"$a \\{command} b$"
    assert clean(f"end\\n{command} of line") == f"end\n{command} of line"


@pytest.mark.parametrize("word", ["is", "it", "In", "next", "eqs", "0", "_1"])
def test_a_word_that_only_begins_like_a_command_follows_a_line_break(word):
    assert clean(f"\\n{word}") == f"\n{word}"


def test_row_breaks_of_a_once_escaped_environment_stay():
    once = r"\begin{bmatrix} a & b \\ c & d \end{bmatrix}"
    twice = r"\\begin{bmatrix} a & b \\\\ c & d \\end{bmatrix}"
    assert clean(f"${once}$ and ${twice}$") == f"${once}$ and ${once}$"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (r"$\\frac$", "two backslashes"),
        (r"line\nline", "line break"),
        ("{a", "braces"),
        ("}a{", "braces"),
        ("$a", "dollar"),
        (r"\{{a}", None),
        (r"costs \$5", None),
        (r"1 \\ 2", None),
        (r"$a \ne b$", None),
    ],
)
def test_faults_names_what_is_wrong_and_nothing_else(text, fault):
    found = faults(text)
    assert (fault is None and found == []) or (fault is not None and len(found) == 1 and fault in found[0]), found
