r"""ToRL's reward: which box is the answer, who is penalised, and the released grader's faults graded right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from core_torl.problem import Problem
from core_torl.reward.base import Reward
from core_torl.reward.torl import SCOPES, TorlReward, answer_text
from core_torl.reward.verifier import Verdict
from core_torl.trajectory import Sample, ToolCall, ToolStatus, Trajectory

GOLD = Problem("p", "?", "3")
RIGHT, WRONG = r"\boxed{3}", r"\boxed{4}"
ASK = "```python\nprint(3)\n```\n```output"


def trajectory(*turns: str, statuses: Sequence[ToolStatus] = (), problem: Problem = GOLD) -> Trajectory:
    calls = tuple(ToolCall("print(3)", status, "3", i, i) for i, status in enumerate(statuses))
    return Trajectory(problem, (), Sample((), (), "eos", calls=calls), "".join(turns), (), turns=turns)


def graded_by_text(reward: TorlReward, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker: equal texts are equal answers."""
    verdict = {True: Verdict("correct"), False: Verdict("wrong")}
    monkeypatch.setattr(reward.verifier, "check", lambda pairs: [verdict[a == b] for a, b in pairs])


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorlReward]:
    made = TorlReward()
    graded_by_text(made, monkeypatch)
    yield made
    made.close()


ANSWERS = {
    "in the text": ([RIGHT], "correct"),
    "after a run": ([f"Compute.\n{ASK}", f"\nSo {RIGHT}."], "correct"),
    "after two runs": ([ASK, f"\nand\n{ASK}", f"\n{RIGHT}"], "correct"),
    "in a program": ([f"```python\nprint(r'{RIGHT}')\n```"], "unparsed_prediction"),
    "in a program that asks for a run": (
        [f"```python\nprint(r'{RIGHT}')\n```output", "\nDone."],
        "unparsed_prediction",
    ),
    "in a program without an end": ([f"```python\n# {RIGHT}"], "unparsed_prediction"),
    "in a made-up output": ([f"```output\n{RIGHT}\n```\nDone."], "unparsed_prediction"),
    "in a made-up output without an end": ([f"```output\n{RIGHT}"], "unparsed_prediction"),
    "before a program with another": ([f"{RIGHT}\n```python\n# {WRONG}\n```\n"], "correct"),
    "before a made-up output with another": ([f"{RIGHT}\n```output\n{WRONG}\n```\n"], "correct"),
    "two, the last counts": ([f"{RIGHT}\n{ASK}", f"\nRather {WRONG}."], "wrong"),
    "before the run": ([f"{RIGHT}\n{ASK}", "\nIt agrees."], "correct"),
    "in a block of no language": ([f"```\n{RIGHT}\n```"], "correct"),
    "nowhere": (["3"], "unparsed_prediction"),
    "nothing written": ([""], "unparsed_prediction"),
}


@pytest.mark.parametrize(("turns", "outcome"), ANSWERS.values(), ids=ANSWERS.keys())
def test_which_box_is_the_answer(reward: TorlReward, turns: list[str], outcome: str):
    (score,) = reward.score([trajectory(*turns)])
    assert (score.outcome, score.correct) == (outcome, outcome == "correct")
    assert score.value == (1.0 if score.correct else -1.0)
    assert score.parts == {"correctness": score.value, "executability": 0.0}


def test_an_open_output_block_ends_with_its_turn():
    """Over the whole text it would swallow what follows: the observation's closing fence is not there."""
    assert RIGHT in answer_text([ASK, f"\n{RIGHT}"]) and RIGHT not in answer_text([f"{ASK}\n{RIGHT}"])


def test_a_choice_problem_is_graded_outside_blocks_too(reward: TorlReward):
    quiz = Problem("q", "?", "A", ("x", "y"))
    turns = [r"\boxed{A}" + "\n```output\n" + r"\boxed{B}" + "\n```\n"]
    assert reward.score([trajectory(*turns, problem=quiz)])[0].outcome == "correct"


# Statuses of the calls, and who is penalised: (failed_code, no_success).
CASES: list[tuple[list[ToolStatus], bool, bool]] = [
    ([], False, True),
    (["ok"], False, False),
    (["error"], True, True),
    (["time_limit"], True, True),
    (["memory_limit"], True, True),
    (["output_limit"], True, True),
    (["error", "ok"], True, False),
    (["ok", "error"], True, True),
    (["ok", "ok"], False, False),
]


@pytest.mark.parametrize(("statuses", "failed_code", "no_success"), CASES)
def test_who_is_penalised(statuses, failed_code, no_success, monkeypatch: pytest.MonkeyPatch):
    batch = [trajectory(RIGHT, statuses=statuses), trajectory(WRONG, statuses=statuses)]
    for scope, hit in zip(SCOPES, (failed_code, no_success), strict=True):
        reward = TorlReward(executability=-0.5, scope=scope)
        graded_by_text(reward, monkeypatch)
        penalty = -0.5 if hit else 0.0
        scores = reward.score(batch)
        assert [s.value for s in scores] == [1 + penalty, -1 + penalty]
        assert [s.parts for s in scores] == [{"correctness": c, "executability": penalty} for c in (1.0, -1.0)]
        assert [s.correct for s in scores] == [True, False], "the penalty says nothing about the answer"


def test_without_a_judgement_there_is_no_value(monkeypatch: pytest.MonkeyPatch):
    reward = TorlReward(executability=-0.5)
    graded_by_text(reward, monkeypatch)
    for statuses in (["infrastructure"], ["ok", "infrastructure"], ["infrastructure", "error"]):
        (score,) = reward.score([trajectory(RIGHT, statuses=statuses)])
        assert (score.value, score.parts) == (None, {}), "a broken sandbox is not the policy's fault"
    monkeypatch.setattr(reward.verifier, "check", lambda pairs: [Verdict("timeout") for _ in pairs])
    (score,) = reward.score([trajectory(RIGHT, statuses=["error"])])
    assert (score.value, score.outcome, score.parts) == (None, "timeout", {})


def test_trajectories_are_left_as_they_are(reward: TorlReward):
    assert isinstance(reward, Reward) and reward.score([]) == []
    answer = trajectory(ASK, RIGHT, statuses=["ok"])
    before = (answer.text, answer.turns)
    reward.score([answer])
    assert (answer.text, answer.turns, answer.score) == (*before, None)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"executability": 0.5}, "reward.executability=0.5"),
        ({"executability": float("nan")}, "reward.executability=nan"),
        ({"executability": float("-inf")}, "reward.executability=-inf"),
        ({"scope": "any_failure"}, "reward.scope='any_failure'"),
        ({"incorrect": 1.0}, "reward.correct"),
        ({"exclude": ["late"]}, "reward.exclude"),
        ({"workers": 0}, "reward.workers"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(arguments: dict[str, Any], key: str):
    with pytest.raises(ValueError) as caught:
        TorlReward(**arguments)
    assert key in str(caught.value) and "\n" not in str(caught.value)


# Gold, prediction, and what ToRL's released grader says of it, which is the wrong way round each time. A list without
# brackets is a set of solutions, in any order (math-verify's semantics); `(1,-2)` is an ordered pair.
RELEASED_FAULTS = [
    (r"70\sqrt{2}", r"70\sqrt{3}", True), ("6 - 5i", "6 + 3i", True), (r"12\pi", "12", True),
    ("8n^2 + 4n + 1", "8", True), (r"1 \pm \sqrt{19}", "1", True), (r"(2,\infty)", r"(2, \infty)", False),
    ("(3,4]", "(3, 4]", False), ("p - q", "p-q", False), ("1,-2", "-2,1", False),
]  # fmt: skip


@pytest.mark.slow
def test_the_released_graders_faults():
    rows = [json.loads(line) for line in (Path(__file__).parent / "corpus.jsonl").read_text("utf-8").splitlines()]
    labelled = {(row["gold"], row["text"]): row["outcome"] for row in rows if "known" not in row}
    batch = []
    for gold, prediction, released in RELEASED_FAULTS:
        assert labelled[gold, rf"So the result is \boxed{{{prediction}}}."] == ("wrong" if released else "correct")
        batch.append(trajectory(rf"\boxed{{{prediction}}}", problem=Problem("p", "?", gold)))
    reward = TorlReward(timeout_s=10.0)
    try:
        assert [score.correct for score in reward.score(batch)] == [not released for *_, released in RELEASED_FAULTS]
    finally:
        reward.close()
