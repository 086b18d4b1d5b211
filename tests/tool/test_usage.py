"""Each measure of tool use on answers made by hand, and that ratios are those of sums."""

from __future__ import annotations

import pytest

from core_torl.problem import Problem
from core_torl.tool.usage import has_void_turn, latencies, usage
from core_torl.trajectory import Sample, Score, ToolCall, Trajectory

PROBLEM = Problem("p", "?", "7")
BLOCK = "```python\nprint(7)\n```\n"
ASK = f"{BLOCK}```output"


def answer(
    turns: list[str], statuses: list[str] = (), correct=False, observations=None, codes=None, finish="eos", stop=None
):
    """An answer of three tokens a turn and two an observation."""
    calls, place = [], 3
    for i, status in enumerate(statuses):
        shown = 0 if status == "infrastructure" else 2
        text = observations[i] if observations else "7"
        code = codes[i] if codes else "print(7)"
        calls.append(ToolCall(code, status, text, place, place + shown, 0.1 * (i + 1)))
        place += shown + 3
    length = 3 * len(turns) + sum(c.end - c.start for c in calls)
    sample = Sample(tuple(range(length)), (0.0,) * length, finish, stop, "0", tuple(calls))
    score = None if finish == "abort" else Score(1.0 if correct else -1.0, correct, "correct" if correct else "wrong")
    return Trajectory(PROBLEM, (1,), sample, "".join(turns), sample.sampled, score, turns=tuple(turns))


def measured(name: str, *answers, budget: int = 1):
    return usage(list(answers), budget)[f"tool/{name}"]


PLAIN = answer(["so \\boxed{7}"])
RUN = answer([f"x {ASK}", "so \\boxed{7}"], ["ok"], correct=True)
FAILED = answer([f"x {ASK}", "so \\boxed{8}"], ["error"])
MENDED = answer([f"x {ASK}", f"again {ASK}", "so \\boxed{7}"], ["error", "ok"], correct=True)
LOST = answer([f"x {ASK}"], ["infrastructure"], finish="abort")


@pytest.mark.parametrize(
    ("name", "answers", "ratio"),
    [
        ("code_ratio", [PLAIN, RUN, FAILED, answer(["```python\nx"])], (2, 4)),
        ("call_ratio", [PLAIN, RUN, answer([BLOCK + "\\boxed{1}"])], (1, 3)),
        ("calls_per_response", [PLAIN, RUN, MENDED], (3, 3)),
        ("pass_ratio", [PLAIN, RUN, FAILED, MENDED, LOST], (2, 4)),
        ("pass_ratio_correct", [RUN, FAILED, MENDED], (2, 3)),
        ("pass_ratio_incorrect", [RUN, FAILED, MENDED], (0, 1)),
        ("executed_ratio", [RUN, answer([f"{BLOCK}{ASK}", "\\boxed{1}"], ["ok"])], (2, 3)),
        ("before_answer_ratio", [RUN, answer([f"\\boxed{{1}} {BLOCK}"]), PLAIN], (1, 2)),
        ("before_answer_ratio", [answer([f"\\boxed{{1}} {ASK}", "\\boxed{2}"], ["ok"])], (1, 1)),
        ("effective_ratio", [RUN, answer([ASK, "\\boxed{7}"], ["ok"], True, observations=["12"])], (1, 2)),
        ("hallucinated_output_ratio", [RUN, answer([f"{ASK}\n7\n```\n\\boxed{{7}}"])], (1, 2)),
        ("hallucinated_output_ratio", [answer([ASK, f"{ASK}\n3\n```\n"], ["ok"])], (1, 1)),
        ("hallucinated_output_ratio", [answer([f"{BLOCK}```outputs", "y"], ["ok"])], (0, 1)),
        ("hallucinated_output_ratio", [answer([f"{BLOCK}```outputs", "a\n```output\n3\n```\n"], ["ok"])], (1, 1)),
        ("hallucinated_output_ratio", [answer([ASK, ASK], ["ok"], stop="```output", finish="stop")], (0, 1)),
        ("void_answer_ratio", [PLAIN, answer(["nothing"]), answer([ASK, "hm"], ["ok"])], (2, 3)),
        ("budget_exhausted_ratio", [PLAIN, RUN], (1, 2)),
        ("time_limit_ratio", [RUN, answer([ASK, "y"], ["time_limit"])], (1, 2)),
        ("other_limit_ratio", [answer([ASK, "y"], ["memory_limit"]), answer([ASK, "y"], ["output_limit"]), RUN], (2, 3)),
        ("infrastructure_ratio", [RUN, LOST], (1, 2)),
        ("aborted_ratio", [RUN, LOST], (1, 2)),
        ("observation_tokens", [PLAIN, RUN, MENDED], (6, 3)),
        ("trainable_fraction", [PLAIN, RUN], (9, 11)),
        ("void_turn_ratio", [PLAIN, RUN, answer(["nothing"]), answer([ASK, "hm"], ["ok"])], (2, 6)),
        ("self_correction_ratio", [MENDED, RUN, FAILED], (1, 3)),
        ("self_correction_ratio", [answer([ASK, ASK, "y"], ["ok", "error"], True)], (0, 1)),
        ("cross_check_ratio", [answer([f"\\boxed{{7}} {ASK}", "yes"], ["ok"]), RUN], (1, 2)),
        ("revision_ratio", [answer([f"\\boxed{{8}} {ASK}", "\\boxed{7}"], ["ok"], True)], (1, 1)),
        ("revision_ratio", [answer([f"\\boxed{{7}} {ASK}", "\\boxed{7}"], ["ok"], True), RUN], (0, 2)),
    ],
)  # fmt: skip
def test_measures(name, answers, ratio):
    assert measured(name, *answers) == ratio


def test_a_box_inside_code_or_output_is_no_answer():
    inside = answer(["```python\nprint('\\boxed{1}')\n```\n```output\n\\boxed{1}\n```\n"])
    assert measured("before_answer_ratio", inside) == (0, 0)
    assert measured("void_turn_ratio", inside) == (0, 1)


def test_a_name_that_an_earlier_program_bound():
    lost = ["7", "NameError: name 'a' is not defined"]
    bound = answer([ASK, ASK, "y"], ["ok", "error"], observations=lost, codes=["a = 1", "print(a)"])
    other = answer([ASK, ASK, "y"], ["ok", "error"], observations=lost, codes=["b = 1", "print(a)"])
    assert measured("lost_name_ratio", bound) == (1, 2) and measured("lost_name_ratio", other) == (0, 2)


def test_every_step_gives_the_same_names_and_no_answer_divides_by_nothing():
    assert usage([], 1).keys() == usage([RUN, LOST], 1).keys()
    assert all(whole == 0 for _, whole in usage([], 1).values())


def test_ratios_add_up():
    """Over ranks and parts: the sums of numerators and denominators are those of all answers together."""
    whole, parts = usage([PLAIN, RUN, FAILED, MENDED], 1), [usage([PLAIN, RUN], 1), usage([FAILED, MENDED], 1)]
    assert all(whole[n] == (parts[0][n][0] + parts[1][n][0], parts[0][n][1] + parts[1][n][1]) for n in whole)


def test_names_are_known_metrics():
    from core_torl.tracking.metrics import check_names

    check_names({**usage([], 1), **latencies([RUN])})


def test_latencies():
    assert latencies([RUN, MENDED]) == {
        "tool/latency_p50_s": pytest.approx(0.1),
        "tool/latency_p95_s": pytest.approx(0.19),
    }
    sick = answer([ASK], ["infrastructure"], finish="abort")
    assert latencies([RUN, sick, sick]) == latencies([RUN])  # a failing sandbox has no fast programs
    assert latencies([PLAIN]) == {"tool/latency_p50_s": 0.0, "tool/latency_p95_s": 0.0}


def test_void_turns():
    assert not has_void_turn(RUN) and not has_void_turn(PLAIN)
    assert has_void_turn(answer([ASK, "hm"], ["ok"])) and has_void_turn(answer(["```python\nprint("]))


def test_transcripts_show_observations_where_they_stood():
    assert RUN.transcript == f"x {ASK}\n7\n```\nso \\boxed{{7}}"
    assert RUN.text == f"x {ASK}so \\boxed{{7}}" and LOST.transcript == LOST.text
