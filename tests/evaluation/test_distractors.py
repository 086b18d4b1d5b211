"""Irrelevant concepts: who is asked with which, what RUD counts, and that nothing changes where they are off."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from core_torl.config.errors import UserError
from core_torl.data.prompt import PromptTemplate
from core_torl.evaluation.distractors import check_distractors, draw, is_distracted, name_with, with_distractors
from core_torl.evaluation.protocol import Evaluation
from core_torl.evaluation.statistics import ratio_of_sums, wilson
from core_torl.problem import Concept, Problem
from core_torl.reward.correctness import Correctness
from core_torl.tracking.metrics import check_names
from tests.evaluation.test_protocol import Oracle

CONCEPTS = [Concept(f"c{i}", f"name {i}", "section", f"TEXT-{i}-") for i in range(6)]
TEMPLATE = PromptTemplate(
    style="bare", choice="{concept}Q {question}\n{options}A:", open="{concept}Q {question}\nA:",
    concept="Note {name}: {text}\n", option="{letter}. {text}\n",
)  # fmt: skip


def quiz(number: int, concept: Concept | None = None, **changes) -> Problem:
    options = tuple(f"o{10 * number + i}" for i in range(4))
    return replace(Problem(f"q{number}", f"<{number}>", "B", options, concept or CONCEPTS[number % 6]), **changes)


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


def key_of(prompt: str) -> str:
    """The letter whose option is the second of the quiz in its own order."""
    number = int(prompt.split("<")[1].split(">")[0])
    return next(line[0] for line in prompt.splitlines() if line.endswith(f" o{10 * number + 1}"))


def ask(rule, sets, **settings):
    """Plain results, results with distractors, and the prompts of the latter."""
    evaluation = Evaluation(
        **({"permutations": 0, "samples": 0, "distractors": [1, 2, 3], "max_prompt_tokens": 500} | settings)
    )
    sampler, reward, letters = Oracle(rule), Correctness(), Letters()
    try:
        plain = evaluation.run(sets, sampler, lambda p, c: TEMPLATE.encode(letters, p, c), reward, letters)
        sampler.prompts.clear()
        found = with_distractors(evaluation, sets, plain, TEMPLATE, sampler, reward, letters)
    finally:
        reward.close()
    return evaluation, plain, found, sampler.prompts


def solves(prompt, _):
    return f"\\boxed{{{key_of(prompt)}}}"


def loses(prompt, _):
    """Knows four quizzes of six; q0 is lost from two distractors on, q1 from three on, and q5 is found with any."""
    number, notes = int(prompt.split("<")[1].split(">")[0]), prompt.count("Note")
    right = {0: notes < 2, 1: notes < 3, 2: True, 3: True, 4: False, 5: notes > 0}[number]
    return solves(prompt, 0) if right else "\\boxed{Z}"


def test_rud_is_the_share_of_what_is_solved_without_that_is_still_solved():
    """By hand: q0 to q3 are solved without. With 1 all four stay, with 2 three, with 3 two. q5, won, counts nowhere."""
    evaluation, _, found, _ = ask(loses, {"s": [quiz(i) for i in range(6)]})
    estimates = evaluation.estimates(found)
    values = [estimates[f"s_distractors{k}/greedy/retained"] for k in (1, 2, 3)]
    assert [(e.value, e.n) for e in values] == [(1.0, 4), (0.75, 4), (0.5, 4)]
    assert values[0].low == wilson(4, 4).low and values[1].low < 0.75 < values[1].high
    assert [estimates[f"s_distractors{k}/greedy/accuracy"].value for k in (1, 2, 3)] == [5 / 6, 4 / 6, 3 / 6]
    rows = [r for r in evaluation.per_concept(found) if r["set"] == "s_distractors2"]
    assert [(r["concept"], r["retained"], r["n_retained"]) for r in rows] == [
        ("c0", 0.0, 1.0), ("c1", 1.0, 1.0), ("c2", 1.0, 1.0), ("c3", 1.0, 1.0), ("c4", None, 0), ("c5", None, 0),
    ]  # fmt: skip


def test_with_samples_an_answer_without_is_held_against_one_with():
    """q0 is right in all of 4 samples without and in 2 with, q1 in 2 and in 4: (1 * 0.5 + 0.5 * 1) / (1 + 0.5)."""

    def rule(prompt, sample):
        number, notes = int(prompt.split("<")[1].split(">")[0]), "Note" in prompt
        return solves(prompt, 0) if sample % 2 == 0 or notes == bool(number) else "\\boxed{Z}"

    evaluation, _, found, _ = ask(rule, {"s": [quiz(0), quiz(1)]}, greedy=False, samples=4, distractors=[1])
    assert evaluation.estimates(found)["s_distractors1/sampled/retained"].value == pytest.approx(2 / 3)


def test_nothing_solved_has_no_share_that_is_kept():
    evaluation, _, found, _ = ask(lambda *_: "\\boxed{Z}", {"s": [quiz(0), quiz(1), quiz(2), quiz(3)]})
    assert not [label for label in evaluation.estimates(found) if label.endswith("retained")]


def test_the_own_concept_is_never_among_them_nor_its_text_under_another_uid():
    twins = [*CONCEPTS, replace(CONCEPTS[0], uid="twin of c0")]
    problems = [quiz(i, twins[i % 7]) for i in range(70)]
    *_, prompts = ask(solves, {"s": problems})
    assert len(prompts) == 3 * 70
    for prompt in prompts:
        number = int(prompt.split("<")[1].split(">")[0])
        assert twins[number % 7].text not in prompt
    by_uid = check_distractors([3], {"s": problems})
    for problem in problems:
        drawn = draw(problem, by_uid, 5, seed=0)
        assert len({c.uid for c in drawn}) == 5 and problem.concept not in drawn


def test_k_concepts_stand_in_the_templates_own_place_each_in_its_own_words():
    problem = quiz(0)
    _, _, _, prompts = ask(solves, {"s": [problem, *(quiz(i) for i in range(1, 6))]})
    plain = TEMPLATE.user_text(problem)
    own = [p for p in prompts if "<0>" in p]
    drawn = draw(problem, {c.uid: c for c in CONCEPTS}, 3, seed=0)
    notes = [f"Note {c.name}: {c.text}\n" for c in drawn]
    assert own == ["".join(notes[:k]) + plain for k in (1, 2, 3)]


def test_the_same_seed_gives_the_same_distractors_whatever_the_policy_the_number_of_problems_or_the_order():
    sets = {"s": [quiz(i) for i in range(30)]}
    before, after = ask(solves, sets)[3], ask(lambda *_: "\\boxed{A}", sets)[3]
    assert before == after
    assert before != ask(solves, sets, seed=1)[3]
    some = ask(solves, sets, max_problems=7)[3]
    assert len(some) == 21 and set(some) < set(before)
    permuted = ask(solves, {"s": sets["s"][::-1]}, permutations=3)[3]
    assert len(permuted) == 4 * len(before) and set(before) < set(permuted)


def test_problems_that_become_too_long_are_left_out_for_every_k_and_counted():
    long = [replace(c, text=c.text + ("x" * 300 if c.uid == "c5" else "")) for c in CONCEPTS]
    problems = [quiz(i, long[i % 6]) for i in range(60)]
    by_uid = {c.uid: c for c in long}
    fits = [p for p in problems if all(c.uid != "c5" for c in draw(p, by_uid, 3, seed=0))]
    assert 10 < len(fits) < 60
    evaluation, _, found, _ = ask(solves, {"s": problems}, max_prompt_tokens=250)
    assert [[i.uid for i in r.items] for r in found] == [[p.uid for p in fits]] * 3
    metrics = evaluation.metrics(found)
    check_names(metrics)
    assert [metrics[f"eval/s_distractors{k}/greedy/left_out"] for k in (1, 2, 3)] == [60 - len(fits)] * 3
    with pytest.raises(UserError, match=r"every prompt of the test set 's' is longer than evaluation\.max_prompt_"):
        ask(solves, {"s": problems}, max_prompt_tokens=60)


def test_problems_without_a_concept_are_left_out_and_counted():
    odd = replace(quiz(9), concept=None)
    evaluation, _, found, _ = ask(solves, {"s": [*(quiz(i) for i in range(6)), odd], "t": [odd]})
    assert {r.name for r in found} == {"s_distractors1", "s_distractors2", "s_distractors3"}
    assert evaluation.metrics(found)["eval/s_distractors1/greedy/left_out"] == 1


def test_off_changes_neither_prompts_nor_results():
    sets = {"s": [quiz(i) for i in range(6)]}
    evaluation, plain, _, _ = ask(solves, sets)
    off = Evaluation(permutations=0)
    assert off.distractors == ()
    assert off.estimates(plain) == evaluation.estimates(plain)
    assert set(off.per_concept(plain)[0]) == set(evaluation.per_concept(plain)[0]) - {"retained", "n_retained"}
    assert not [name for name in off.metrics(plain) if "left_out" in name or "retained" in name]


@pytest.mark.parametrize("counts", [[0], [1, 1], [-1]])
def test_impossible_numbers_are_named(counts):
    with pytest.raises(ValueError, match=r"evaluation\.distractors"):
        Evaluation(distractors=counts)


def test_too_few_concepts_are_one_line():
    with pytest.raises(UserError, match=r"evaluation\.distractors=\[1, 6\]: the test problems have 5 other concepts"):
        check_distractors([1, 6], {"s": [quiz(i) for i in range(6)]})
    with pytest.raises(UserError, match="have 0 other concepts to draw from; use data with more"):
        check_distractors([1], {"s": [replace(quiz(0), concept=None)]})
    with pytest.raises(UserError, match=r"c0.*two different texts"):
        check_distractors([1], {"s": [quiz(0), quiz(6, replace(CONCEPTS[0], text="another"))]})


def test_names_of_sets_with_distractors_are_told_from_others():
    assert is_distracted(name_with("gap", 2)) and name_with("gap", 2) == "gap_distractors2"
    assert not any(map(is_distracted, ("gap", "gap_primed", "distractors", "gap2", "_distractors")))


def test_a_ratio_of_sums_resamples_whole_clusters_and_refuses_nothing_to_divide_by():
    """Ten clusters of ten, all kept or all lost: the interval is that of ten draws, not of a hundred."""
    parts = [float(i // 10 % 2) for i in range(100)]
    found = ratio_of_sums(parts, [1.0] * 100, [i // 10 for i in range(100)])
    assert found.value == 0.5 and found.high - found.low > 0.4
    assert ratio_of_sums([1.0, 1.0], [2.0, 4.0], ["a", "b"]).value == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="wholes must be above 0"):
        ratio_of_sums([0.0], [0.0], ["a"])


@pytest.mark.slow
def test_a_training_run_writes_them_before_and_after(front_door, tmp_path):
    """The shipped policy in two optimizer steps: sets by K beside the plain ones, in results and metrics, for the same problems."""
    code = front_door(
        "train", "debug=limit", "data.train_per_concept=4", "rl_steps=1", "evaluation.samples=0",
        "evaluation.permutations=0", "evaluation.distractors=[1,2]", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    names = {"gap", "mastered"} | {f"{name}_distractors{k}" for name in ("gap", "mastered") for k in (1, 2)}
    for section in ("before", "after"):
        assert {label.split("/")[0] for label in results[section]} == names
        assert results[section]["mastered_distractors2/greedy/retained"]["n"] > 0
    assert set(results["gains"]) >= {f"{name}/greedy/accuracy" for name in names}
    rows = {row["set"]: row for row in results["per_concept"]}
    assert set(rows) == names and {"retained", "n_retained"} <= set(rows["gap_distractors1"])
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert (
        '"eval/mastered_distractors1/greedy/retained"' in metrics
        and '"eval/gap_distractors2/greedy/left_out"' in metrics
    )
