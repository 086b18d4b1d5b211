"""Tables of rollouts: what is picked of a step's groups, and how it reads."""

import pytest

from core_torl.problem import Concept, Problem
from core_torl.tracking.rollouts import COLUMNS, cells, inserted, merged, read_rollouts, tables_of
from core_torl.tracking.samples import END, OBSERVATION, marked_transcript, spread
from core_torl.trajectory import Group, Sample, Score, ToolCall, Trajectory

PLAIN, SHOWN = (1, 2, 3, 4), (7, 8)


def answer(problem: Problem, text: str, reward: float | None, prompt=PLAIN, calls=(), turns=()) -> Trajectory:
    right = reward is not None and reward >= 1
    score = Score(reward, right, "timeout" if reward is None else "correct" if right else "wrong")
    sample = Sample((5,) * 9, (0.0,) * 9, "eos", calls=calls)
    return Trajectory(problem, prompt, sample, text, sample.sampled, score, turns=turns)


def group(name: str, *rewards: float | None) -> Group:
    problem = Problem(name, f"question {name}", "B", ("1", "2"), Concept(f"c-{name}", f"concept {name}", "1", "text"))
    return Group(problem, [answer(problem, f"{name}{i}", reward) for i, reward in enumerate(rewards)])


def tables(*groups: Group, newly=None, interventions=(), count=8):
    new = [g.problem.uid in (newly or ()) for g in groups]
    return tables_of(3, groups, new, interventions, lambda ids: f" {' '.join(map(str, ids))}\n", count)


def picked(rows) -> list[str]:
    return [row["answer"] for row in rows]


GROUPS = [group("a", 0.0, 1.0, 1.0), group("b", -0.5, 0.0, None), group("c", None, None), group("d", 0.2, 1.4)]


def test_best_and_worst_are_one_a_problem_and_in_order():
    found = tables(*GROUPS)
    assert picked(found["best"]) == ["d1", "a1", "b1"]
    assert picked(found["worst"]) == ["b0", "a0", "d0"]
    assert picked(tables(*GROUPS, count=1)["best"]) == ["d1"] and picked(tables(*GROUPS, count=1)["worst"]) == ["b0"]


def test_newly_solved_shows_the_right_answer_of_those_that_are():
    assert picked(tables(*GROUPS, newly={"d"})["newly_solved"]) == ["d1"]
    assert tables(*GROUPS)["newly_solved"] == []


def test_even_takes_from_everywhere():
    assert picked(tables(*GROUPS, count=3)["even"]) == ["a0", "b0", "c0"]
    assert spread(range(100), 4) == [0, 25, 50, 75] and spread([1, 2], 4) == [1, 2] and spread([1], 0) == []


def test_a_coached_group_has_plain_and_primed_answer_in_one_row():
    before = group("q", None, 0.0, 0.1)
    primed = [answer(before.problem, t, r, (1, *SHOWN, 2, 3, 4)) for t, r in (("p0", 0.0), ("p1", 1.0))]
    (row,) = tables(before, interventions=[(before, primed), (before, [])])["triggered"]
    assert row["shown"] == "7 8" and row["concept"] == "concept q" and "question q" in row["problem"]
    # The first of each, not the one that flatters the coach most.
    assert (row["plain_answer"], row["plain_reward"], row["plain_outcome"]) == ("q0", None, "timeout")
    assert (row["primed_answer"], row["primed_reward"], row["primed_outcome"]) == ("p0", 0.0, "wrong")
    assert row["primed_right"] == "1 of 2"


@pytest.mark.parametrize(
    ("plain", "primed", "shown"),
    [
        ((1, 2, 3), (1, 9, 9, 2, 3), [9, 9]),
        ((1, 2, 3), (9, 1, 2, 3), [9]),
        ((1, 2, 3), (1, 2, 3, 9), [9]),  # the beginning of an answer
        ((1, 2, 3), (1, 2, 3), []),
        ((1, 2, 3), (8, 9), [8, 9]),  # another prompt altogether
        ((1, 1), (1, 1, 1), [1]),
        ((2, 3), (1, 2, 4, 2, 3), [1, 2, 4]),
    ],
)
def test_what_was_shown_is_what_the_plain_prompt_has_not(plain, primed, shown):
    assert inserted(plain, primed) == shown


def test_a_transcript_numbers_calls_and_marks_observations():
    calls = (
        ToolCall("1/0", "error", "Zero", 2, 4), ToolCall("loop", "time_limit", "Timed out", 5, 6),
        ToolCall("more", "infrastructure", "", 9, 9),
    )  # fmt: skip
    problem = GROUPS[0].problem
    told = answer(problem, "abc", 1.0, calls=calls, turns=("a ```output", "b ```output", "c"))
    (row,) = tables(Group(problem, [told, answer(problem, "none", 0.0)]))["tools"]
    assert row["calls"] == 3 and list(row) == list(COLUMNS["tools"])
    assert row["answer"] == marked_transcript(told) == (
        f"a ```output\n>>> call 1 of 3: error\n{OBSERVATION}\nZero\n{END}\n```\n"
        f"b ```output\n>>> call 2 of 3: time_limit\n{OBSERVATION}\nTimed out\n{END}\n```\n"
        "c\n>>> call 3 of 3: infrastructure, nothing was shown\n"
    )  # fmt: skip


def test_no_text_of_policy_or_program_passes_for_a_mark():
    forged = f"x\n{END}\n{OBSERVATION}\n\\{END}"
    call = ToolCall("code", "ok", forged, 2, 4)
    text = marked_transcript(answer(GROUPS[0].problem, "ab", 1.0, calls=(call,), turns=(forged, "b")))
    lines = text.split("\n")
    assert lines.count(OBSERVATION) == 1 and lines.count(END) == 1
    assert lines.count("\\" + END) == 2 and lines.count("\\\\" + END) == 2  # one backslash more, so nothing is lost
    inside = lines[lines.index(OBSERVATION) + 1 : lines.index(END)]
    assert [line.replace("\\", "", 1) if line.startswith("\\") else line for line in inside] == forged.split("\n")


def test_tables_of_ranks_become_one():
    one, two = tables(GROUPS[0], GROUPS[1]), tables(GROUPS[3], newly={"d"})
    both = merged([one, two], 2)
    assert picked(both["best"]) == ["d1", "a1"] and picked(both["worst"]) == ["b0", "a0"]
    assert picked(both["newly_solved"]) == ["d1"] and len(both["even"]) == 2
    assert {k: len(rows) for k, rows in merged([one], 8).items()} == {k: len(rows) for k, rows in one.items()} | {
        "worst": 2,
        "best": 2,
    }


def test_where_all_earned_the_same_none_is_best_or_worst():
    """And otherwise the least is never among the best, nor the most among the worst."""
    same = merged([tables(group("a", 0.0, 0.0)), tables(group("b", 0.0, None))], 8)
    assert same["best"] == same["worst"] == [] and len(same["even"]) == 4
    mixed = merged([tables(group("a", 0.0, 0.0)), tables(group("b", 1.0, 1.0), group("c", 0.5))], 8)
    assert picked(mixed["best"]) == ["b0", "c0"] and picked(mixed["worst"]) == ["a0", "c0"]
    assert merged([tables(group("a", None))], 8)["best"] == []


def test_cells_follow_the_columns():
    row = tables(*GROUPS)["best"][0]
    (cell,) = cells("best", [dict(reversed(row.items()))])
    assert dict(zip(COLUMNS["best"], cell, strict=True)) == row


def test_reading_tolerates_a_torn_end_and_nothing_else(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"kind": "best", "rl_step": 1}\n{"kind": "wo')
    assert read_rollouts(path) == [{"kind": "best", "rl_step": 1}]
    path.write_text('{"kind": "best", "rl_step": 1}\n{"train/rl_step": 1}\n')
    with pytest.raises(ValueError, match="line 2: a row needs kind and rl_step"):
        read_rollouts(path)
