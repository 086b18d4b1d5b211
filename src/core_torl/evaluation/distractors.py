"""Irrelevant concepts before the question: what does a policy still solve that it solves without them?

CORE, section 6 and Figure 3: K concepts of other problems are put in front of the prompt, and ``RUD_K`` is the share of
the problems solved without distractors that are still solved with K of them. A policy that applies what it has learned
keeps them; one that takes whatever stands before a question for a hint loses them. The paper does not say how
distractors are drawn. Here each problem has its own seeded order of the other concepts, and K takes the first K of it:
the distractors of K = 1 are among those of K = 2, and are the same before and after training. Concepts are known by
uid. A problem's own concept is never among them, nor one with the same text under another uid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from core_torl.config.errors import UserError
from core_torl.data.prompt import PromptTemplate
from core_torl.evaluation.protocol import Evaluation, SetResult
from core_torl.intervention.base import concepts_by_uid, others_of, rng_of
from core_torl.problem import Concept, Problem
from core_torl.sampler.protocol import Sampler

_MARK = "_distractors"


def name_with(name: str, count: int) -> str:
    """What a test set is called whose prompts hold ``count`` distractors."""
    return f"{name}{_MARK}{count}"


def is_distracted(name: str) -> bool:
    """Whether a test set's name says that its prompts hold distractors: a diagnosis, never a headline."""
    return name.rpartition(_MARK)[2].isdigit() and _MARK in name


def check_distractors(counts: Sequence[int], sets: Mapping[str, Sequence[Problem]]) -> dict[str, Concept]:
    """The concepts of all test problems by uid. Raises UserError if a problem has too few others, or none has any."""
    problems = [p for part in sets.values() for p in part if p.concept is not None]
    try:
        concepts = concepts_by_uid(problems)
    except ValueError as error:
        raise UserError(str(error)) from error
    fewest = min((len(others_of(concept, concepts)) for concept in concepts.values()), default=0)
    if counts and fewest < max(counts):
        raise UserError(
            f"evaluation.distractors={list(counts)}: the test problems have {fewest} other concepts to draw from; "
            f"{'lower it, or ' if fewest else ''}use data with more concepts, or set evaluation.distractors=[]"
        )
    return concepts


def draw(problem: Problem, concepts: dict[str, Concept], count: int, seed: int) -> list[Concept]:
    """The first ``count`` distractors of a problem; more of them begin with the same ones."""
    assert problem.concept is not None
    others = others_of(problem.concept, concepts)
    rng_of("distractors", seed, problem.uid).shuffle(others)
    return others[:count]


def with_distractors(
    evaluation: Evaluation, sets: Mapping[str, Sequence[Problem]], plain: Sequence[SetResult], template: PromptTemplate,
    sampler: Sampler, reward: Any, tokenizer: Any,
) -> list[SetResult]:  # fmt: skip
    """The problems of every set once more for each K of ``evaluation.distractors``, as ``SET_distractorsK``.

    ``plain`` are the results without distractors, which those with them are held against. A problem without a concept,
    or whose longest prompt has more than ``evaluation.max_prompt_tokens`` tokens, is left out for all K alike, and
    counted. Raises UserError if that leaves a set without problems.
    """
    concepts = check_distractors(evaluation.distractors, sets)
    # The concepts' place is filled with texts that are rendered already, one after the other.
    slot = dataclasses.replace(template, concept="{text}")
    prompts: dict[tuple[int, str], tuple[int, ...]] = {}  # (K, uid in one order of the options) -> token ids
    kept: dict[str, list[Problem]] = {}
    left_out: dict[str, int] = {}
    for name, problems in sets.items():
        chosen = evaluation.choose(problems, name)
        with_concept = [p for p in chosen if p.concept is not None]
        kept[name] = []
        for problem in with_concept:
            own = _prompts(problem, evaluation, concepts, template, slot, tokenizer)
            if max(map(len, own.values())) <= evaluation.max_prompt_tokens:
                kept[name].append(problem)
                prompts |= own
        left_out[name] = len(chosen) - len(kept[name])
        if with_concept and not kept[name]:
            raise UserError(
                f"evaluation.distractors={list(evaluation.distractors)}: with {max(evaluation.distractors)} of them "
                f"every prompt of the test set {name!r} is longer than evaluation.max_prompt_tokens="
                f"{evaluation.max_prompt_tokens}: use fewer, or raise model.max_prompt_tokens"
            )
    solved = {r.label: r.values("accuracy") for r in plain}
    results = []
    for count in evaluation.distractors:
        renamed = {name_with(name, count): name for name in kept if kept[name]}
        found = evaluation.run(
            {new: kept[old] for new, old in renamed.items()},
            sampler,
            lambda problem, _, count=count: prompts[count, problem.uid],
            reward,
            tokenizer,
        )
        for result in found:
            old = renamed[result.name]
            before = solved[f"{old}/{result.decoding}"]
            items = [dataclasses.replace(item, undistracted=before[item.uid]) for item in result.items]
            results.append(dataclasses.replace(result, items=items, left_out=left_out[old]))
    return results


def _prompts(
    problem: Problem, evaluation: Evaluation, concepts: dict[str, Concept], template: PromptTemplate,
    slot: PromptTemplate, tokenizer: Any,
) -> dict[tuple[int, str], tuple[int, ...]]:  # fmt: skip
    """The problem's prompts for each K, in every order of its options that is evaluated."""
    drawn = draw(problem, concepts, max(evaluation.distractors), evaluation.seed)
    found = {}
    for count in evaluation.distractors:
        text = "".join(template.concept.format(text=c.text, name=c.name) for c in drawn[:count])
        before = Concept("distractors", "distractors", "", text)
        for variant in evaluation.variants(problem):
            found[count, variant.uid] = slot.encode(tokenizer, variant, before)
    return found
