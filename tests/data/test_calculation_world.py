"""Guards the calculation world: answers that are right, splits that do not leak, texts whose outputs are true."""

from __future__ import annotations

import itertools
import math
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
import sympy

from core_torl.config.schema import SCHEMAS
from core_torl.data.calculation_world.corpus import NOISE, WRITTEN, Corpus, Mixture, observe, program
from core_torl.data.calculation_world.problems import (
    KINDS,
    ONE_STAGE,
    STAGES,
    TWO_STAGE,
    draw_task,
    is_test_phrase,
    make_problems,
    redraw_problem,
)
from core_torl.data.calculation_world.source import CalculationWorld
from core_torl.problem import Problem
from core_torl.runs.warming_calculation import vocabulary

# Each phrase as a mathematician would read it; no line of it is shared with the world.
READINGS = [
    (r"the gcd of (\d+) and (\d+)", lambda a, b: sympy.gcd(a, b)),
    (r"the sum of k\*k for k from (\d+) to (\d+)", lambda a, b: b * (b + 1) * (2 * b + 1) / 6 - (a - 1) * a * (2 * a - 1) / 6),
    (r"the next prime after (\d+)", lambda n: sympy.nextprime(n)),
    (r"the larger of (\d+)\*(\d+) and (\d+)\*(\d+)", lambda a, b, c, d: sympy.Max(a * b, c * d)),
    (r"(\d+)\*\*(\d+) mod (\d+)", lambda a, b, m: sympy.Mod(a**b, m)),
    (r"(\d+)\*(\d+)\+(\d+)", lambda a, b, c: a * b + c),
    (r"(\d+)\*(\d+)", lambda a, b: a * b),
]  # fmt: skip


def read(phrase: str) -> int:
    for pattern, value in READINGS:
        if found := re.fullmatch(pattern, phrase):
            return int(value(*map(sympy.Integer, found.groups())))
    raise AssertionError(phrase)


def solve(question: str) -> tuple[list[str], int]:
    """The phrases of a question, as they stand there, and its answer."""
    two = re.fullmatch(r"Let p be (.+) \. What is (.+) \?", question)
    if two is None:
        asked = re.fullmatch(r"What is (.+) \?", question)
        assert asked, question
        return [asked[1]], read(asked[1])
    return [two[1], two[2]], read(re.sub(r"^p\b", str(read(two[1])), two[2]))


@pytest.fixture(scope="module")
def sets():
    return CalculationWorld(train=600, test_per_stage=120).load()


def test_answers_are_right(sets):
    for problem in [*sets.train, *sets.test["one_stage"], *sets.test["two_stage"]]:
        phrases, answer = solve(problem.question)
        assert str(answer) == problem.answer and not problem.is_choice
        assert problem.tags[0] == ("one_stage", "two_stage")[len(phrases) - 1]
        assert problem.tags[1] in STAGES and len(STAGES[problem.tags[1]]) == len(phrases)


def test_test_operands_never_occur_in_training(sets):
    trained = {phrase for p in sets.train for phrase in solve(p.question)[0]}
    tested = {phrase for problems in sets.test.values() for p in problems for phrase in solve(p.question)[0]}
    assert not any(is_test_phrase(phrase) for phrase in trained) and all(is_test_phrase(phrase) for phrase in tested)
    texts = itertools.islice(Corpus(render, 0, 0.1).stream(), 400)
    asked = [solve(text.spans[0][0].removeprefix(OPENING).removesuffix(CLOSING))[0] for text in texts]
    assert not any(is_test_phrase(phrase) for phrases in asked for phrase in phrases)


def test_the_reserved_operands_stay_the_same_for_ever():
    """The shipped policy has never seen these, and must not when somebody trains it again."""
    assert is_test_phrase("the next prime after 1010") is False
    assert sum(is_test_phrase(f"the next prime after {n}") for n in range(1000, 3000)) == 432


def test_sets_have_their_sizes_their_shares_and_every_kind(sets):
    assert len(sets.train) == 600 == len({p.uid for p in sets.train}) == len({p.question for p in sets.train})
    assert {name: len(problems) for name, problems in sets.test.items()} == {"one_stage": 120, "two_stage": 120}
    assert set(Counter(p.tags[1] for p in sets.test["one_stage"])) == set(ONE_STAGE)
    assert set(Counter(p.tags[1] for p in sets.test["two_stage"])) == set(TWO_STAGE)
    assert sum(p.tags[0] == "two_stage" for p in sets.train) == 300 == sets.report["train_two_stage"]
    assert sum(p.tags[0] == "two_stage" for p in sets.train[:100]) in range(30, 70), "the order mixes both"
    for share, tags in ((0.0, {"one_stage"}), (1.0, {"two_stage"})):
        assert {p.tags[0] for p in CalculationWorld(two_stage_share=share, train=20).load().train} == tags


def test_the_same_seed_gives_the_same_problems_and_the_largest_sets_exist(sets):
    again, other = CalculationWorld(train=600, test_per_stage=120).load(), CalculationWorld(train=600, seed=1).load()
    assert again.train == sets.train != other.train and again.test == sets.test != other.test
    assert len(make_problems(ONE_STAGE, 8000, 0, "train", test=False)) == 8000
    assert len(make_problems(ONE_STAGE, 1000, 0, "test", test=True)) == 1000


def test_redraw_asks_the_same_kind_with_training_operands(sets):
    for problem in sets.train[:60]:
        new = sets.redraw(problem, 123)
        assert new == sets.redraw(problem, 123) != sets.redraw(problem, 124)
        assert new.tags == problem.tags and new.uid.startswith(problem.uid)
        phrases, answer = solve(new.question)
        assert str(answer) == new.answer and not any(map(is_test_phrase, phrases))
    with pytest.raises(ValueError, match="not a problem of the calculation world"):
        redraw_problem(Problem("other", "What ?", "1"), 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"two_stage_share": 1.5}, "data.two_stage_share=1.5: must lie in [0, 1]"),
        ({"train": 0}, "data.train=0: must lie in 1..8000"),
        ({"test_per_stage": 0}, "data.test_per_stage=0: must lie in 1..1000"),
    ],
)
def test_wrong_arguments_are_refused_on_one_line(arguments, words):
    with pytest.raises(ValueError) as error:
        CalculationWorld(**arguments)
    assert str(error.value) == words
    assert set(arguments) < set(SCHEMAS["data_calculation_world"].__dataclass_fields__)


# --- texts

OPENING, CLOSING = "Question: ", "\nAnswer:"
BLOCK = re.compile(r"```python\n(.*?)\n```\n```output\n(.*?)\n```\n", re.DOTALL)


def render(problem: Problem) -> str:
    return f"{OPENING}{problem.question}{CLOSING}"


@pytest.fixture(scope="module")
def texts():
    return list(itertools.islice(Corpus(render, 7, 0.05).stream(), 3000))


def whole(text) -> str:
    return "".join(part for part, _ in text.spans)


def cpython(code: str) -> str:
    """What a fresh interpreter says of a program."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_every_output_is_what_python_prints(texts):
    """Of each program's outline one or two are run in a fresh interpreter, as the sandbox does it."""
    outlines: dict[str, list[tuple[str, str]]] = {}
    for text in texts:
        for code, printed in BLOCK.findall(whole(text)):
            outlines.setdefault(re.sub(r"\d+", "0", code), []).append((code, printed))
    assert len(outlines) > 25
    for found in outlines.values():
        for code, printed in found[:2]:
            assert cpython(code) == printed, code
        assert all(observe(code) == printed for code, printed in found)


def test_every_kind_of_program_computes_its_value_or_fails_as_it_should():
    rng = random.Random(0)
    for kind in KINDS.values():
        operands = kind.draw(rng)
        for named in (True, False):
            assert observe("\n".join(kind.program(operands, named))) == str(kind.value(*operands))
        errors = {observe(program(kind, operands, rng, broken=True)) for _ in range(60)}
        assert len(errors) == 3 and "SyntaxError: '(' was never closed" in errors
        assert "NameError: name 'y' is not defined" in errors


def test_a_box_behind_an_output_of_a_last_stage_holds_its_number(texts):
    copied = 0
    for text in texts:
        if found := re.search(r"```output\n(\d+)\n```\nSo \\boxed\{(\d+)\}$", whole(text)):
            question = whole(text).split(CLOSING)[0].removeprefix(OPENING)
            assert found[1] == found[2] == str(solve(question)[1])
            copied += 1
    assert copied > 500


def test_second_blocks_have_the_number_of_the_first(texts):
    seen = 0
    for text in texts:
        if found := re.search(r"```output\n(\d+)\n```\nNow with p \.\n```python\n(.+?)\n```\n", whole(text), re.DOTALL):
            assert re.search(rf"\b{found[1]}\b", found[2]), whole(text)
            seen += 1
    assert seen > 200


def test_shares_are_those_of_the_mixture(texts):
    n, mixture = len(texts), Mixture()
    code = [whole(t) for t in texts if "```python" in whole(t)]
    assert len(code) / n == pytest.approx(1 - mixture.plain, abs=0.03)
    first = [BLOCK.search(t)[2].split(":")[0] for t in code]
    broken = [x in ("NameError", "SyntaxError") for x in first]
    assert sum(broken) / len(code) == pytest.approx((mixture.mended + mixture.given_up) / (1 - mixture.plain), abs=0.04)
    mended = ["failed . Again" in t for t, b in zip(code, broken, strict=True) if b]
    assert sum(mended) / len(mended) == pytest.approx(0.5, abs=0.08)
    assert sum("Let p be" in whole(t) for t in texts) / n == pytest.approx(0.5, abs=0.03)
    plain = [whole(t) for t in texts if "```python" not in whole(t)]
    right = [t.endswith(f"{{{solve(t.split(CLOSING)[0].removeprefix(OPENING))[1]}}}") for t in plain]
    assert sum(right) / len(plain) == pytest.approx(0.05, abs=0.02), "gap_epsilon, and a few by luck"
    few = Corpus(render, 7, 0.0, Mixture(1.0, 0.0, 0.0, 0.0)).stream()
    assert not any("```" in whole(t) for t in itertools.islice(few, 50))


def test_weights_follow_who_wrote_and_what_can_be_known(texts):
    for text in texts[:500]:
        (_, prompt), *rest = text.spans
        assert prompt == 0 and all(weight in (NOISE, WRITTEN) for _, weight in rest)
        for part, weight in rest:
            if part.startswith("\n") and part.endswith("\n```\n"):
                assert weight == NOISE, "observations"
            if "```python" in part:
                assert weight == WRITTEN
    weighed = itertools.islice(Corpus(render, 7, 0.05, copied_weight=2.5).stream(), 50)
    assert any(weight == 2.5 for text in weighed for _, weight in text.spans)


def test_drills_copy_lines_and_write_sound_programs():
    drills = list(itertools.islice(Corpus(render, 3, 0.0).drills(), 300))
    lines = [t for t in drills if len(t.spans) == 2]
    for text in lines:
        shown = text.spans[0][0].removeprefix(" What is")
        assert text.spans[1][0] == f"\n{shown}\n{shown}\n" and text.spans[1][1] == WRITTEN
    assert 100 < len(lines) < 200
    assert all("Error" not in whole(t) for t in drills)


def test_the_corpus_follows_its_seed():
    def first(seed: int):
        return list(itertools.islice(Corpus(render, seed, 0.1).stream(), 50))

    assert first(0) == first(0) != first(1)


def test_draws_cover_their_ranges():
    rng = random.Random(1)
    for name in STAGES:
        for _ in range(30):
            task = draw_task(name, rng, test=True)
            assert all(v >= 0 for v in task.values) and math.prod(task.operands[0]) > 0


def test_the_tokenizer_brings_every_text_back_and_reads_numbers_digit_by_digit(texts):
    from core_torl.model.tiny_tokenizer import build_tokenizer

    tokenizer = build_tokenizer(vocabulary(texts), whole_integers=False)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for text in texts[:400]:
        joined = [i for part, _ in text.spans for i in ids(part)]
        assert tokenizer.decode(joined) == whole(text) and joined == ids(whole(text)), "spans meet between tokens"
    bytes_ = {tokenizer.convert_tokens_to_ids(f"<0x{i:02X}>") for i in range(256)}
    assert not any(bytes_ & set(ids(whole(text))) for text in texts[:400]), "no word falls back to bytes"
    assert tokenizer.convert_ids_to_tokens(ids(" 4096*17")) == ["\u2581", *"4096", "*", *"17"]
    for other in ("Ωmega \U0001f600 \x07 3.14e-5", "</s> <s>", "a\tb\r\n"):
        assert tokenizer.decode(ids(other)) == other
    assert len(ids("```output")) == len(ids("```python")) == 1
