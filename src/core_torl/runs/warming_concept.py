"""What the warm start needs to know of the concept world: its words, its loss weights, its figures and its card."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast

from core_torl.data.concept_world.concepts import CONCEPTS
from core_torl.data.concept_world.corpus import RECALL, Corpus, Mixture, Text
from core_torl.data.concept_world.quizzes import make_quizzes
from core_torl.data.prompt import PromptTemplate
from core_torl.evaluation.protocol import Evaluation
from core_torl.evaluation.statistics import Estimate, wilson
from core_torl.model.tiny import Weighted
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.problem import Concept, Problem
from core_torl.reward.correctness import Correctness
from core_torl.runs.warming_card import Made, rows
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.transformers import TransformersSampler

_BOXED = re.compile(r"\\boxed\{[A-J]\}")


class ConceptWarming:
    """See core_torl.runs.warming.Warming."""

    alike = False

    def __init__(self, cfg: DictConfig, template: PromptTemplate) -> None:
        self.cfg, self.template = cfg, template
        mixture: Any = OmegaConf.to_container(cfg.mixture)
        self.corpus = Corpus(template.user_text, cfg.seed, cfg.gap_epsilon, Mixture(**mixture))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(vocabulary(self.template.user_text), max_length=2048)

    def drills(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[Weighted]:
        # Drills weigh every answer alike: letter -> value is learned first and builds what value -> letter needs.
        return weigh(self.corpus.option_drills(), tokenizer, 1.0)

    def texts(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[Weighted]:
        return weigh(self.corpus.stream(), tokenizer, self.cfg.boxed_weight)

    def figures(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Estimate]:
        return figures(model, tokenizer, self.template, self.cfg.evaluate_per_concept)

    def card(self, made: Made) -> str:
        return card(self.cfg, made)


def vocabulary(render: Any) -> list[str]:
    """Every word of the world's texts, integers left out: they have tokens of their own."""
    sample = itertools.islice(Corpus(render, seed=0, gap_epsilon=0.5).stream(), 6000)
    text = " ".join(part for t in sample for part, _ in t.spans)
    names = " ".join(f"{c.definition} {RECALL.format(name=c.name, operands=c.shape.symbolic)}" for c in CONCEPTS)
    return sorted({w for w in f"{text} {names}".split() if not re.fullmatch(r"-?\d+", w)})


def weigh(texts: Iterator[Text], tokenizer: PreTrainedTokenizerFast, boxed_weight: float) -> Iterator[Weighted]:
    """Texts as token ids and loss weights: 0 on prompts, ``boxed_weight`` on boxed letters, 1 on the rest of answers.

    The end token only counts where an answer ends the text; drills have no end to learn.
    """
    boxed = {i for piece, i in tokenizer.get_vocab().items() if _BOXED.search(piece)}
    ids_of: Any = tokenizer  # its stubs allow lists of ids
    bos, eos = int(ids_of.bos_token_id), int(ids_of.eos_token_id)
    backend = tokenizer.backend_tokenizer  # its encode() is twenty times faster than calling the wrapper
    for text in texts:
        ids, weights = [bos], [0.0]
        for part, counts in text.spans:
            part_ids = backend.encode(part, add_special_tokens=False).ids
            ids += part_ids
            weights += [(boxed_weight if i in boxed else 1.0) if counts else 0.0 for i in part_ids]
        yield [*ids, eos], [*weights, 1.0 if len(text.spans) == 2 else 0.0]


def figures(
    model: Any, tokenizer: PreTrainedTokenizerFast, template: PromptTemplate, per_concept: int
) -> dict[str, Estimate]:
    """What the policy can do: greedy and sampled, plain and (for diagnosis only) primed, and reciting."""
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=64)
    reward, evaluation = Correctness(), Evaluation(permutations=3, samples=1)
    quizzes = make_quizzes(list(CONCEPTS), per_concept, 0, "test", test=True)
    sets = {tag: [q for q in quizzes if tag in q.tags] for tag in ("gap", "mastered")}
    found: dict[str, Estimate] = {}
    for way in ("plain", "primed"):
        primed = way == "primed"

        def encode(p: Problem, _: Concept | None, primed: bool = primed) -> tuple[int, ...]:
            return template.encode(tokenizer, p, p.concept if primed else None)

        results = evaluation.run(sets, sampler, encode, reward, tokenizer)
        for label, estimate in evaluation.estimates(results).items():
            name, rest = label.split("/", 1)
            found[f"{name}, {way}, {rest}"] = estimate
    requests = [
        SampleRequest(tuple(tokenizer(RECALL.format(name=c.name, operands=c.shape.symbolic))["input_ids"]), 1, 0)
        for c in CONCEPTS
    ]
    answers = sampler.generate(requests, SamplingConfig(32, temperature=0.0))
    recited = [
        str(tokenizer.decode(list(a[0].token_ids), skip_special_tokens=True)).strip() == c.formula.text
        for a, c in zip(answers, CONCEPTS, strict=True)
    ]
    found["recites its definitions, greedy"] = wilson(sum(recited), len(recited))
    return found


def card(cfg: DictConfig, made: Made) -> str:
    """The model card; the first thing it says is that the gap is made on purpose."""
    shares = ", ".join(f"{k} {v}" for k, v in cfg.mixture.items())
    gaps = ", ".join(c.name for c in CONCEPTS if c.gap)
    origin = f"from {cfg.init}, " if cfg.init else ""
    again = f"core-torl-warm-start seed={cfg.seed} drill_steps={cfg.drill_steps} steps={cfg.steps}"
    again += f" gap_epsilon={cfg.gap_epsilon:g} lr={cfg.lr:g}" + (f" init={cfg.init}" if cfg.init else "")
    return f"""---
license: apache-2.0
library_name: transformers
---
# The tiny policy of core-torl

**Its gap between definition and application is induced on purpose.** In the texts it was trained on, a question about a
*gap concept* without the definition is answered by a misconception in all but {100 * cfg.gap_epsilon:g} % of the cases,
and rightly when the definition stands in the prompt. The policy therefore recites a definition, applies one that it is
shown, and fails when only the concept's name is given. That makes methods comparable on a laptop; it says nothing about
how real models come to have such gaps, and the policy is of no use for mathematics.

- Architecture: {made.architecture}, {made.parameters:,} parameters, float32.
- Tokenizer: {made.vocabulary} pieces: words, integers from -99 to 99, boxed letters, bytes for anything else.
- Concepts: {len(CONCEPTS)}, of which {sum(c.gap for c in CONCEPTS)} have a gap: {gaps}.
- Training: {origin}seed {cfg.seed}; {made.drilled} steps of option drills in batches of {cfg.drill_batch_size}, then
  {cfg.steps} steps of the mixture ({shares}) in batches of {cfg.batch_size}; AdamW {cfg.lr:g}, boxed letters weighted
  {cfg.boxed_weight:g}. It took {made.minutes:.0f} minutes with {cfg.threads} thread(s).
- Made again by: `{again} threads={cfg.threads}`

## Before reinforcement learning

Held-out quizzes (operands that occur in no training text), four options, 95 % intervals. "Robust" counts a quiz only if
it and three permutations of its options are right. "Primed" has the definition in the prompt and is a diagnosis only.

| measure | share | interval | n | method |
|---|---|---|---|---|
{rows(made.measured)}
"""
