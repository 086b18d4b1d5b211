"""Evaluation: permuted quizzes are re-keyed and all needed, the concept is never shown, intervals and gains are right."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core_torl.evaluation.protocol import Evaluation
from core_torl.problem import Concept, Problem
from core_torl.reward.correctness import Correctness
from core_torl.sampler.protocol import SamplingConfig
from core_torl.trajectory import Sample

CONCEPT = Concept("c/trace", "trace", "c", "SECRET DEFINITION")


def quiz(number: int, answer: str = "B", **changes) -> Problem:
    options = tuple(str(10 * number + i) for i in range(4))
    return replace(Problem(f"q{number}", f"question {number}", answer, options, CONCEPT), **changes)


class Words:
    """Encodes text as code points, so that a fake policy can read its prompt."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


class Oracle:
    """A sampler that answers by a rule over (prompt text, sample number)."""

    def __init__(self, rule):
        self.rule, self.prompts, self.calls = rule, [], []
        self.sampling = SamplingConfig(8)

    def generate(self, requests, sampling=None):
        self.calls.append(sampling)
        groups = []
        for request in requests:
            text = "".join(map(chr, request.prompt_ids))
            self.prompts.append(text)
            ids = [tuple(map(ord, self.rule(text, i))) for i in range(request.n)]
            groups.append([Sample(x, (0.0,) * len(x), "eos") for x in ids])
        return groups


def encode(problem, concept):
    text = (concept.text if concept else "") + problem.question + "|" + "|".join(problem.options) + "|" + problem.answer
    return tuple(map(ord, text))


def run(rule, sets, **settings):
    evaluation = Evaluation(**({"permutations": 3, "samples": 0} | settings))
    sampler, reward = Oracle(rule), Correctness()
    try:
        return evaluation, evaluation.run(sets, sampler, encode, reward, Words()), sampler
    finally:
        reward.close()


def knows(text, _):
    """Reads the key that stands at the end of this test's prompts."""
    return f"\\boxed{{{text[-1]}}}"


def test_a_policy_that_knows_the_content_is_robust_and_one_that_likes_a_letter_is_not():
    sets = {"s": [quiz(i) for i in range(6)]}
    _, right, _ = run(knows, sets)
    assert all(i.accuracy == 1 and i.robust == 1 and i.consistency == 1 for i in right[0].items)
    _, letter, _ = run(lambda *_: "\\boxed{B}", sets)
    assert all(i.accuracy == 1 and i.robust == 0 for i in letter[0].items)
    assert all(i.mean_over_orders < 1 and i.consistency == 0 for i in letter[0].items)


def test_one_wrong_order_is_enough_to_lose_robustness():
    seen = []

    def wrong_once(text, i):
        seen.append(text)
        return knows(text, i) if len(seen) != 3 else "\\boxed{" + ("A" if text[-1] != "A" else "B") + "}"

    _, results, _ = run(wrong_once, {"s": [quiz(0), quiz(1)]})
    assert [i.robust for i in results[0].items] == [0.0, 1.0]
    assert results[0].items[0].mean_over_orders == pytest.approx(0.75)


def test_orders_are_distinct_seeded_start_with_the_quiz_itself_and_respect_options_that_must_stay():
    evaluation = Evaluation()
    orders = evaluation.orders(quiz(1))
    assert len(set(orders)) == 4 and orders[0] == (0, 1, 2, 3)
    assert orders == Evaluation().orders(quiz(1)) != Evaluation(seed=1).orders(quiz(1))
    assert evaluation.orders(quiz(1, permutable=False)) == [(0, 1, 2, 3)]
    assert len(evaluation.orders(quiz(1, options=("yes", "no")))) == 2
    _, results, _ = run(knows, {"s": [quiz(1, permutable=False), quiz(2)]})
    assert results[0].items[0].robust is None and set(results[0].values("robust_accuracy")) == {"q2"}


def test_the_concept_is_never_in_the_prompt():
    _, _, sampler = run(knows, {"s": [quiz(i) for i in range(4)]}, samples=2)
    assert sampler.prompts and not any("SECRET" in p for p in sampler.prompts)


def test_greedy_and_sampled_answers_have_their_own_settings_and_results():
    evaluation, results, sampler = run(
        lambda t, i: knows(t, i) if i % 2 == 0 else "no idea", {"s": [quiz(0)]}, samples=4, temperature=0.7
    )
    assert [(c.temperature, c.max_new_tokens) for c in sampler.calls] == [(0.0, 8), (0.7, 8)]
    assert [(r.decoding, r.items[0].accuracy) for r in results] == [("greedy", 1.0), ("sampled", 0.5)]
    assert results[1].items[0].unparsed == 0.5
    metrics = evaluation.metrics(results)
    assert metrics["eval/s/greedy/accuracy"] == 1 and metrics["eval/s/sampled/accuracy"] == 0.5
    assert metrics["eval/s/greedy/accuracy_low"] == pytest.approx(0.2065, abs=1e-3)  # Wilson, one of one


def test_metrics_have_registered_names():
    from core_torl.tracking.metrics import check_names

    evaluation, results, _ = run(knows, {"s": [quiz(i) for i in range(3)]}, samples=2)
    check_names(evaluation.metrics(results))


def test_gains_are_paired_by_problem():
    sets = {"s": [quiz(i) for i in range(10)]}
    _, before, _ = run(lambda t, i: "\\boxed{C}", sets)
    evaluation, after, _ = run(knows, sets)
    gain = evaluation.differences(before, list(reversed(after)))["s/greedy/accuracy"]
    assert gain.value == 1.0 and evaluation.differences(after, after)["s/greedy/accuracy"].value == 0


def test_a_limited_set_is_a_seeded_choice_and_per_concept_rows_add_up():
    sets = {"s": [quiz(i, concept=replace(CONCEPT, uid=f"c{i % 2}")) for i in range(10)]}
    evaluation, results, _ = run(knows, sets, max_problems=4)
    again, *_ = run(knows, sets, max_problems=4)[1]
    assert [i.uid for i in results[0].items] == [i.uid for i in again.items] and len(again.items) == 4
    assert sum(row["n"] for row in evaluation.per_concept(results)) == 4


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"permutations": -1}, "evaluation.permutations"),
        ({"greedy": False, "samples": 0}, "evaluation.greedy"),
        ({"samples": 1, "temperature": 0.0}, "evaluation.temperature"),
        ({"max_problems": 0}, "evaluation.max_problems"),
        ({"confidence": 1.0}, "evaluation.confidence"),
    ],
)
def test_impossible_settings_are_named(settings, key):
    with pytest.raises(ValueError, match=key):
        Evaluation(**settings)


def test_intervals_resample_concepts_and_never_claim_certainty():
    """Ten concepts of ten quizzes each, all right or all wrong: the interval is that of ten draws, not of a hundred."""
    sets = {"s": [quiz(i, concept=replace(CONCEPT, uid=f"c{i // 10}")) for i in range(100)]}

    def half(text, i):
        return knows(text, i) if int(text.split("|")[0].split()[-1]) // 10 % 2 else "\\boxed{Z}"

    evaluation, results, _ = run(half, sets, permutations=0)
    share = evaluation.estimates(results)["s/greedy/accuracy"]
    assert share.value == 0.5 and share.n == 100 and share.high - share.low > 0.4
    none = evaluation.estimates(run(lambda *_: "nothing", sets, samples=2)[1])["s/sampled/robust_accuracy"]
    assert none.value == 0 and none.high > 0.02


def test_truncated_sampling_reaches_a_sampled_evaluation():
    sampler = Oracle(knows)
    sampler.sampling = SamplingConfig(8, top_p=0.9)
    reward = Correctness()
    Evaluation(permutations=0, samples=1).run({"s": [quiz(0)]}, sampler, encode, reward, Words())
    reward.close()
    assert [c.top_p for c in sampler.calls] == [1.0, 0.9]


def test_the_independence_reference_knows_that_concepts_differ():
    """Half the concepts always right, half never: independent orders at those rates are robust half of the time."""
    sets = {"s": [quiz(i, concept=replace(CONCEPT, uid=f"c{i % 2}")) for i in range(8)]}
    evaluation, results, _ = run(lambda t, i: knows(t, i) if int(t.split("|")[0].split()[-1]) % 2 else "no", sets)
    metrics = evaluation.metrics(results)
    assert metrics["eval/s/greedy/independence_reference"] == pytest.approx(0.5)
    assert metrics["eval/s/greedy/mean_over_orders"] == pytest.approx(0.5)
