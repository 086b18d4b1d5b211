"""Guards the branches of ``expert_prefix``: the plain prompt, then a true beginning of the solution's own tokens."""

from __future__ import annotations

from core_torl.intervention.expert_prefix import ExpertPrefix

from .conftest import concept, quiz


def prefixes(intervention, problem, count, seed, encode, encode_answer) -> list[int]:
    """Lengths of the K prefixes, each held against prompt and solution."""
    plain, solution = encode(problem, None), encode_answer(problem.solution)
    primed = intervention.prime(problem, count, seed, encode, encode_answer)
    assert len(primed) == count and all(n == 1 for _, n in primed)
    lengths = []
    for ids, _ in primed:
        assert ids[: len(plain)] == plain, "the concept is not in it"
        lengths.append(len(ids) - len(plain))
        assert ids[len(plain) :] == solution[: lengths[-1]]
    return lengths


def test_a_branch_is_the_plain_prompt_and_a_true_prefix(problems, encode, encode_answer):
    intervention = ExpertPrefix(problems)
    for seed, problem in enumerate(problems[::3]):
        total = len(encode_answer(problem.solution))
        assert all(1 <= n < total for n in prefixes(intervention, problem, 4, seed, encode, encode_answer))


def test_branches_spread_over_the_range(encode, encode_answer):
    """Each of K branches falls in its own K-th of [shortest, longest], whatever the seed."""
    problem = quiz("q", concept("c"), "one , " * 100)
    total = len(encode_answer(problem.solution))
    assert total >= 200
    for seed in range(5):
        lengths = prefixes(ExpertPrefix([problem], 0.2, 0.8), problem, 4, seed, encode, encode_answer)
        for branch, length in enumerate(lengths):
            assert 0.2 + 0.15 * branch - 0.5 / total <= length / total <= 0.35 + 0.15 * branch + 0.5 / total
    one_point = prefixes(ExpertPrefix([problem], 0.5, 0.5), problem, 4, 0, encode, encode_answer)
    assert one_point == [round(0.5 * total)] * 4


def test_the_seed_moves_the_branches(encode, encode_answer):
    problem = quiz("q", concept("c"), "one , " * 100)
    drawn = [prefixes(ExpertPrefix([problem]), problem, 2, seed, encode, encode_answer) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_extreme_shares_still_give_one_token_and_leave_one(encode, encode_answer):
    problem = quiz("q", concept("c"), "one of options")
    total = len(encode_answer(problem.solution))
    assert set(prefixes(ExpertPrefix([problem], 0.001, 0.002), problem, 3, 0, encode, encode_answer)) == {1}
    assert set(prefixes(ExpertPrefix([problem], 0.998, 0.999), problem, 3, 0, encode, encode_answer)) == {total - 1}


def test_a_solution_of_one_token_gives_no_branch(encode, encode_answer):
    problem = quiz("q", concept("c"), "one")
    assert len(encode_answer("one")) == 1
    assert ExpertPrefix([problem]).prime(problem, 3, 0, encode, encode_answer) == []
