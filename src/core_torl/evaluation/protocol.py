"""How good is the policy on problems it was not trained on: standard and robust accuracy, greedy and sampled.

Robust accuracy counts a quiz only if it and three permutations of its options are **all** answered right (CORE, section
3.3.2 and Table 1): a policy that prefers a letter, or guesses, loses it first. It falls with sampling noise alone, so
the accuracy over all orders, what independent errors at each concept's own rate would give, and the share of quizzes
with the same content chosen in every order stand beside it. The concept is never in the prompt: this module has no way
to put it there, since it renders problems through ``encode(problem, None)``. What concepts of other problems do to an
answer is measured in ``evaluation.distractors``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core_torl.evaluation.statistics import Estimate, bootstrap_mean, paired_difference, ratio_of_sums, wilson
from core_torl.problem import LETTERS, Concept, Problem
from core_torl.reward.answers import option_letter
from core_torl.sampler.protocol import Sampler, SampleRequest, SamplingConfig
from core_torl.tool.usage import usage
from core_torl.trajectory import Sample, Score, Trajectory

log = logging.getLogger(__name__)
_ATTEMPTS = 3  # further ones, for answers whose sandbox failed
_TOOL_USE = ("code_ratio", "pass_ratio", "executed_ratio", "calls_per_response", "hallucinated_output_ratio")
Encode = Callable[[Problem, Concept | None], tuple[int, ...]]


@dataclass(frozen=True)
class Item:
    """One problem's result: shares over its samples, between 0 and 1. ``robust`` is None where nothing was permuted.

    ``undistracted`` is its accuracy under the plain prompt, where this result is one with distractors.
    """

    uid: str
    concept: str | None
    accuracy: float
    robust: float | None
    mean_over_orders: float
    consistency: float | None
    unparsed: float
    truncated: float
    orders: int
    excluded: float
    transcript: str  # the first answer in the problem's own order, observations of tools included
    undistracted: float | None = None


@dataclass(frozen=True)
class SetResult:
    """One test set under one way of decoding ("greedy" or "sampled").

    ``tools`` holds shares of tool use, if any. ``left_out`` counts problems that cannot be asked with distractors; None
    where that was not the question.
    """

    name: str
    decoding: str
    items: list[Item]
    orders: int
    tools: dict[str, float] = field(default_factory=dict)
    left_out: int | None = None

    @property
    def label(self) -> str:
        return f"{self.name}/{self.decoding}"

    def values(self, measure: str) -> dict[str, float]:
        """uid -> value for the items that have it; measure: accuracy or robust_accuracy."""
        field = {"accuracy": "accuracy", "robust_accuracy": "robust"}[measure]
        return {i.uid: getattr(i, field) for i in self.items if getattr(i, field) is not None}

    def solved_without(self) -> list[tuple[Item, float]]:
        """Items solved without distractors and the share of their samples that are; [] in a set without distractors."""
        return [(i, i.undistracted) for i in self.items if i.undistracted]


class Evaluation:
    """Standard accuracy, and robust accuracy over ``permutations`` further orders of each quiz's options.

    ``greedy`` answers once at temperature 0; ``samples`` answers each prompt so often at ``temperature``.
    ``max_problems`` takes a seeded choice of each set. Everything random comes from ``seed``: the same before and after
    training.
    """

    def __init__(
        self,
        permutations: int = 3,
        greedy: bool = True,
        samples: int = 0,
        temperature: float = 1.0,
        primed: bool = False,
        max_problems: int | None = None,
        confidence: float = 0.95,
        seed: int = 0,
        distractors: Sequence[int] = (),
        max_prompt_tokens: int = 1024,
    ) -> None:
        if permutations < 0 or samples < 0:
            raise ValueError("evaluation.permutations and evaluation.samples must not be negative")
        if not greedy and samples == 0:
            raise ValueError("evaluation.greedy=false with evaluation.samples=0 evaluates nothing: set one of them")
        if samples and temperature <= 0:
            raise ValueError(
                f"evaluation.temperature={temperature}: must be positive; greedy answers have their own key"
            )
        if max_problems is not None and max_problems < 1:
            raise ValueError(f"evaluation.max_problems={max_problems}: must be at least 1, or null for all")
        if not 0 < confidence < 1:
            raise ValueError(f"evaluation.confidence={confidence}: must lie between 0 and 1")
        if any(count < 1 for count in distractors) or len(set(distractors)) < len(distractors):
            raise ValueError(
                f"evaluation.distractors={list(distractors)}: numbers of concepts, each at least 1 and given once; "
                "[] for none"
            )
        self.permutations, self.greedy, self.samples, self.temperature = permutations, greedy, samples, temperature
        self.max_problems, self.confidence, self.seed = max_problems, confidence, seed
        self.primed = primed  # whether the caller also wants the diagnosis with the concept in the prompt
        # The same for irrelevant concepts, see evaluation.distractors; only their prompts are held to a length here.
        self.distractors, self.max_prompt_tokens = tuple(distractors), max_prompt_tokens

    def orders(self, problem: Problem) -> list[tuple[int, ...]]:
        """The identity and up to ``permutations`` distinct other orders; only the identity where order must stay."""
        count = len(problem.options)
        identity = tuple(range(count))
        if not problem.is_choice or not problem.permutable or self.permutations == 0:
            return [identity]
        rng = random.Random(f"{self.seed}/orders/{problem.uid}")
        if count <= 5:
            others = [o for o in itertools.permutations(range(count)) if o != identity]
            return [identity, *rng.sample(others, min(self.permutations, len(others)))]
        chosen: dict[tuple[int, ...], None] = {identity: None}
        while len(chosen) <= self.permutations:
            chosen[tuple(rng.sample(range(count), count))] = None
        return list(chosen)

    def variants(self, problem: Problem) -> list[Problem]:
        """The problem in each of its orders; the first is its own."""
        return [problem.permuted(o) if problem.is_choice else problem for o in self.orders(problem)]

    def choose(self, problems: Sequence[Problem], name: str) -> list[Problem]:
        if self.max_problems is None or len(problems) <= self.max_problems:
            return list(problems)
        return random.Random(f"{self.seed}/choose/{name}").sample(list(problems), self.max_problems)

    def run(
        self, sets: Mapping[str, Sequence[Problem]], sampler: Sampler, encode: Encode, reward: Any, tokenizer: Any
    ) -> list[SetResult]:
        """Evaluate every set under every way of decoding; one batched sampler call for each of the latter."""
        limit = sampler.sampling.max_new_tokens
        ways = (
            [("greedy", 1, SamplingConfig(limit, temperature=0.0, stop=sampler.sampling.stop))] if self.greedy else []
        )
        if self.samples:
            ways.append(
                (
                    "sampled",
                    self.samples,
                    dataclasses.replace(sampler.sampling, temperature=self.temperature),
                )
            )
        chosen = {name: self.choose(problems, name) for name, problems in sets.items()}
        results: list[SetResult] = []
        for decoding, n, sampling in ways:
            variants = [
                (name, p, v, o)
                for name, ps in chosen.items()
                for p in ps
                for o, v in zip(self.orders(p), self.variants(p), strict=True)
            ]
            requests = [SampleRequest(encode(v, None), n, self._seed(decoding, v.uid)) for _, _, v, _ in variants]
            answers = _whole(sampler, requests, sampling)
            trajectories = [
                [
                    Trajectory.of(v, r.prompt_ids, s, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))
                    for s in group
                ]
                for (_, _, v, _), r, group in zip(variants, requests, answers, strict=True)
            ]
            flat = [t for group in trajectories for t in group]
            for trajectory, score in zip(flat, reward.score(flat), strict=True):
                trajectory.score = score
            by_problem: dict[tuple[str, str], list[tuple[tuple[int, ...], list[Trajectory]]]] = {}
            for (name, problem, _, order), group in zip(variants, trajectories, strict=True):
                by_problem.setdefault((name, problem.uid), []).append((order, group))
            budget: int = getattr(sampler, "call_budget", 0)
            for name, problems in chosen.items():
                items = [_item(p, by_problem[name, p.uid]) for p in problems]
                answered = [t for p in problems for _, group in by_problem[name, p.uid] for t in group]
                tools = _tool_use(answered, budget) if budget else {}
                results.append(SetResult(name, decoding, items, self.permutations + 1, tools))
        return results

    def _seed(self, decoding: str, uid: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{decoding}/{uid}".encode()).digest()[:8], "big") >> 2

    # ---- numbers -------------------------------------------------------------------------------------------------

    def estimates(self, results: Sequence[SetResult]) -> dict[str, Estimate]:
        """``set/decoding/measure`` -> estimate; ``n`` counts problems.

        Problems of one concept stand or fall together, so whole concepts are resampled where they are known; without
        concepts greedy shares get Wilson's interval and sampled ones a bootstrap over problems. Wilson's also takes the
        place of a bootstrap that has no width because all problems agree.
        """
        found: dict[str, Estimate] = {}
        for result in results:
            for measure in ("accuracy", "robust_accuracy"):
                values = list(result.values(measure).values())
                if not values:
                    continue
                found[f"{result.label}/{measure}"] = self._share(result, list(result.values(measure)), values)
            if result.solved_without():
                found[f"{result.label}/retained"] = self._retained(result)
        return found

    def _share(self, result: SetResult, uids: list[str], values: list[float]) -> Estimate:
        concepts = {i.uid: i.concept for i in result.items}
        if set(values) in ({0.0}, {1.0}):
            return wilson(round(sum(values)), len(values), self.confidence)
        if all(concepts[u] is not None for u in uids) and len({concepts[u] for u in uids}) > 1:
            # A mean is a difference to nothing.
            clusters = [concepts[u] for u in uids]
            share = paired_difference([0.0] * len(values), values, clusters, self.confidence, self.seed)
            return dataclasses.replace(share, n=len(values))
        if result.decoding == "greedy":
            return wilson(round(sum(values)), len(values), self.confidence)
        return bootstrap_mean(values, self.confidence, self.seed)

    def _retained(self, result: SetResult) -> Estimate:
        """RUD_K: of what is solved without distractors, the share that is solved with them; ``n`` counts such problems.

        With several samples a problem weighs as much as it is solved without: an answer drawn without distractors that
        is right is held against one drawn with them.
        """
        items = result.solved_without()
        parts, wholes = [i.accuracy * before for i, before in items], [before for _, before in items]
        concepts = [i.concept or i.uid for i, _ in items]
        share = sum(parts) / sum(wholes)
        if share in (0.0, 1.0) or (len(set(concepts)) == 1 and result.decoding == "greedy"):
            return wilson(round(share * len(items)), len(items), self.confidence)
        found = ratio_of_sums(parts, wholes, concepts, self.confidence, self.seed)
        return dataclasses.replace(found, n=len(items))

    def differences(self, before: Sequence[SetResult], after: Sequence[SetResult]) -> dict[str, Estimate]:
        """Gain of ``after`` over ``before`` on the same problems, resampling whole concepts where they are known."""
        earlier = {r.label: r for r in before}
        found: dict[str, Estimate] = {}
        for result in after:
            for measure in ("accuracy", "robust_accuracy"):
                old, new = earlier[result.label].values(measure), result.values(measure)
                uids = [u for u in new if u in old]
                if uids:
                    concept = {i.uid: i.concept or i.uid for i in result.items}
                    found[f"{result.label}/{measure}"] = paired_difference(
                        [old[u] for u in uids],
                        [new[u] for u in uids],
                        [concept[u] for u in uids],
                        confidence=self.confidence,
                        seed=self.seed,
                    )
        return found

    def metrics(self, results: Sequence[SetResult]) -> dict[str, float]:
        """Everything as flat metrics ``eval/{set}/{decoding}/{measure}``."""
        flat: dict[str, float] = {}
        for label, estimate in self.estimates(results).items():
            flat[f"eval/{label}"] = estimate.value
            flat[f"eval/{label}_low"], flat[f"eval/{label}_high"] = estimate.low, estimate.high
        for result in results:
            base = f"eval/{result.label}"
            mean = float(np.mean([i.mean_over_orders for i in result.items]))
            flat[f"{base}/mean_over_orders"] = mean
            flat[f"{base}/independence_reference"] = _independent(result.items)
            consistency = [i.consistency for i in result.items if i.consistency is not None]
            if consistency:
                flat[f"{base}/consistency"] = float(np.mean(consistency))
            for measure in ("unparsed", "truncated", "excluded"):
                flat[f"{base}/{measure}"] = float(np.mean([getattr(i, measure) for i in result.items]))
            flat[f"{base}/n"] = len(result.items)
            if result.left_out is not None:
                flat[f"{base}/left_out"] = result.left_out
            flat |= {f"{base}/{name}": value for name, value in result.tools.items()}
        return flat

    def per_concept(self, results: Sequence[SetResult]) -> list[dict[str, Any]]:
        """One row for each set, decoding and concept: accuracy, robust accuracy and number of problems.

        With distractors also ``retained``, and the number of problems solved without them that it is a share of.
        """
        rows = []
        for result in results:
            concepts: dict[str, list[Item]] = {}
            for item in result.items:
                concepts.setdefault(item.concept or "(none)", []).append(item)
            for concept, items in sorted(concepts.items()):
                robust = [i.robust for i in items if i.robust is not None]
                rows.append({
                    "set": result.name, "decoding": result.decoding, "concept": concept, "n": len(items),
                    "accuracy": float(np.mean([i.accuracy for i in items])),
                    "robust_accuracy": float(np.mean(robust)) if robust else None, "n_robust": len(robust),
                })  # fmt: skip
                if self.distractors:
                    solved = [(i.accuracy * i.undistracted, i.undistracted) for i in items if i.undistracted]
                    part, whole = sum(right for right, _ in solved), sum(before for _, before in solved)
                    rows[-1] |= {"retained": part / whole if whole else None, "n_retained": whole}
        return rows


def _item(problem: Problem, orders: list[tuple[tuple[int, ...], list[Trajectory]]]) -> Item:
    """Fold one problem's orders and samples into shares. Sample i of every order forms one attempt at robustness."""
    right = np.array([[bool(_score(t).correct) for t in group] for _, group in orders])  # [orders, samples]
    contents = [[_content(order, t) for t in group] for order, group in orders]
    flat = [t for _, group in orders for t in group]
    several = len(orders) > 1
    same = [len({row[i] for row in contents}) == 1 and contents[0][i] is not None for i in range(right.shape[1])]
    return Item(
        uid=problem.uid,
        concept=problem.concept.uid if problem.concept else None,
        accuracy=float(right[0].mean()),
        robust=float(right.all(axis=0).mean()) if several else None,
        mean_over_orders=float(right.mean()),
        consistency=float(np.mean(same)) if several else None,
        unparsed=float(np.mean([_score(t).outcome == "unparsed_prediction" for t in flat])),
        truncated=float(np.mean([t.truncated for t in flat])),
        orders=len(orders),
        excluded=float(np.mean([_score(t).value is None for t in flat])),
        transcript=orders[0][1][0].transcript,
    )


def _whole(sampler: Sampler, requests: Sequence[SampleRequest], sampling: SamplingConfig) -> list[list[Sample]]:
    """Answers to every request; those whose sandbox failed are asked for again, with the same draws.

    Raises RuntimeError if it fails for good: to leave problems out would compare others before and after training.
    """
    answers = sampler.generate(requests, sampling)
    for _ in range(_ATTEMPTS):
        lost = [i for i, group in enumerate(answers) if any(s.finish == "abort" for s in group)]
        if not lost:
            return answers
        log.warning(
            "evaluation: the sandbox failed in answers to %d of %d prompts; once more", len(lost), len(requests)
        )
        for i, group in zip(lost, sampler.generate([requests[i] for i in lost], sampling), strict=True):
            answers[i] = group
    lost = [i for i, group in enumerate(answers) if any(s.finish == "abort" for s in group)]
    if lost:
        raise RuntimeError(
            f"evaluation: the sandbox failed again and again in answers to {len(lost)} of {len(requests)} prompts; "
            "mend it and evaluate once more"
        )
    return answers


def _tool_use(trajectories: Sequence[Trajectory], budget: int) -> dict[str, float]:
    ratios = usage(trajectories, budget)
    return {
        name: ratios[f"tool/{name}"][0] / ratios[f"tool/{name}"][1] for name in _TOOL_USE if ratios[f"tool/{name}"][1]
    }


def _independent(items: Sequence[Item]) -> float:
    """Robust accuracy to expect if a concept's answers were right independently, each at that concept's own rate."""
    rates: dict[str | None, list[float]] = {}
    for item in items:
        rates.setdefault(item.concept, []).append(item.mean_over_orders)
    return float(np.mean([float(np.mean(rates[i.concept])) ** i.orders for i in items]))


def _score(trajectory: Trajectory) -> Score:
    assert trajectory.score is not None
    return trajectory.score


def _content(order: tuple[int, ...], trajectory: Trajectory) -> int | None:
    """Which option was chosen, by its place in the original order; None if no letter can be read."""
    problem = trajectory.problem
    letter = option_letter(trajectory.text, problem.options, problem.letters) if problem.is_choice else None
    return None if letter is None else order[LETTERS.index(letter)]
