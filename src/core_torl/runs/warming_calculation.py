"""What the warm start needs to know of the calculation world: its words, its loss weights, its figures and its card."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerFast

from core_torl.data.calculation_world.corpus import Corpus, Mixture, Text
from core_torl.data.calculation_world.problems import ONE_STAGE, TWO_STAGE, make_problems
from core_torl.data.prompt import PromptTemplate
from core_torl.evaluation.statistics import Estimate, wilson
from core_torl.model.tiny import Weighted
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.problem import Problem
from core_torl.reward.answers import last_box
from core_torl.runs.warming_card import Made, rows
from core_torl.sampler.protocol import SampleRequest
from core_torl.sampler.transformers import TransformersSampler
from core_torl.sandbox.bubblewrap import Bubblewrap
from core_torl.tool.observation import Observations
from core_torl.tool.tool_sampler import ToolSampler
from core_torl.trajectory import Sample

BUDGETS = (0, 1, 2)
MAX_NEW_TOKENS = 160
PYTHON = "```python"
COPIES = "So "  # how an answer goes on that takes over the number that was printed


class CalculationWarming:
    """See core_torl.runs.warming.Warming."""

    alike = True  # texts with code are long, and must not be learned below their share

    def __init__(self, cfg: DictConfig, template: PromptTemplate) -> None:
        self.cfg, self.template = cfg, template
        mixture: Any = OmegaConf.to_container(cfg.mixture)
        self.corpus = Corpus(template.user_text, cfg.seed, cfg.gap_epsilon, Mixture(**mixture), cfg.boxed_weight)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        texts = itertools.islice(Corpus(self.template.user_text, seed=0, gap_epsilon=0.5).stream(), 6000)
        return build_tokenizer(vocabulary(texts), max_length=2048, whole_integers=False)

    def drills(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[Weighted]:
        return weigh(self.corpus.drills(), tokenizer)

    def texts(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[Weighted]:
        return weigh(self.corpus.stream(), tokenizer)

    def figures(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Estimate]:
        return figures(model, tokenizer, self.template, self.cfg.evaluate_per_concept)

    def card(self, made: Made) -> str:
        return card(self.cfg, made)


def vocabulary(texts: Iterable[Text]) -> list[str]:
    """Whatever stands between two digits or spaces: ``print(57*83)`` is made of ``print(``, ``*`` and ``)``.

    The name p is a word of its own. ``p*34`` then holds the very ``*`` that a program has before the 34 it copies.
    """
    words = re.compile(r"\bp\b|(?:(?!\bp\b)[^\d\s])+")
    return sorted({word for text in texts for part, _ in text.spans for word in words.findall(part)})


def weigh(texts: Iterator[Text], tokenizer: PreTrainedTokenizerFast) -> Iterator[Weighted]:
    """Texts as token ids and loss weights, each span with its own; the end token counts like a written one."""
    ids_of: Any = tokenizer  # its stubs allow lists of ids
    bos, eos = int(ids_of.bos_token_id), int(ids_of.eos_token_id)
    backend = tokenizer.backend_tokenizer  # its encode() is twenty times faster than calling the wrapper
    for text in texts:
        ids, weights = [bos], [0.0]
        for part, weight in text.spans:
            part_ids = backend.encode(part, add_special_tokens=False).ids
            ids += part_ids
            weights += [weight] * len(part_ids)
        yield [*ids, eos], [*weights, 1.0]


def figures(
    model: Any, tokenizer: PreTrainedTokenizerFast, template: PromptTemplate, per_kind: int
) -> dict[str, Estimate]:
    """What the policy can do at temperature 1, one answer a problem: with no call, one call and two calls.

    Programs run in the sandbox, by the same loop as in training.
    """
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=MAX_NEW_TOKENS)
    sandbox = Bubblewrap(workers=1)
    found: dict[str, Estimate] = {}
    sandbox.start()
    try:
        for name, kinds in (("one_stage", ONE_STAGE), ("two_stage", TWO_STAGE)):
            problems = make_problems(kinds, per_kind * len(kinds), 0, "test", test=True)
            requests = [SampleRequest(template.encode(tokenizer, p), 1, seed) for seed, p in enumerate(problems)]
            for budget in BUDGETS:
                tools: Any = sampler
                if budget:
                    tools = ToolSampler(sampler, sandbox, tokenizer, observation=Observations(), call_budget=budget)
                answers = [answers[0] for answers in tools.generate(requests)]
                found |= measure(f"{name}, C = {budget}", problems, answers, tokenizer)
    finally:
        sandbox.close()
    return found


def measure(
    label: str, problems: Sequence[Problem], answers: Sequence[Sample], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Estimate]:
    """Accuracy, the share with code, and of those parts of which each can be said: what runs, what is copied."""
    texts = [written(answer, tokenizer) for answer in answers]
    right = [last_box(text) == problem.answer for text, problem in zip(texts, problems, strict=True)]
    code = [PYTHON in text for text in texts]
    calls = [call for answer in answers for call in answer.calls]
    # Boxes written straight behind the output of a program that ran.
    copied = [
        last_box(text) == answer.calls[-1].observation
        for answer, text in zip(answers, texts, strict=True)
        if answer.calls and answer.calls[-1].status == "ok" and tail(answer, tokenizer).startswith(COPIES)
    ]
    plain = [r for r, c in zip(right, code, strict=True) if not c]
    shares = {
        "accuracy": right, "answers with code": code, "right among answers without code": plain,
        "programs that run": [call.status == "ok" for call in calls], "boxes that copy the output": copied,
    }  # fmt: skip
    return {f"{label}, {name}": wilson(sum(share), len(share)) for name, share in shares.items() if share}


def written(answer: Sample, tokenizer: PreTrainedTokenizerFast) -> str:
    """What the policy wrote, observations left out."""
    ids = [i for i, sampled in zip(answer.token_ids, answer.sampled, strict=True) if sampled]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def tail(answer: Sample, tokenizer: PreTrainedTokenizerFast) -> str:
    """What the policy wrote behind the last observation."""
    return str(tokenizer.decode(list(answer.token_ids[answer.calls[-1].end :]), skip_special_tokens=True))


def card(cfg: DictConfig, made: Made) -> str:
    """The model card; the first thing it says is that the behaviour is made on purpose."""
    shares = ", ".join(f"{k} {v}" for k, v in cfg.mixture.items())
    code = sum(cfg.mixture.values()) - cfg.mixture.plain
    shown = 100 * code / sum(cfg.mixture.values())
    broken = 100 * (cfg.mixture.mended + cfg.mixture.given_up) / code if code else 0.0
    origin = f"from {cfg.init}, " if cfg.init else ""
    again = f"core-torl-warm-start world=calculation seed={cfg.seed} drill_steps={cfg.drill_steps} steps={cfg.steps}"
    again += f" gap_epsilon={cfg.gap_epsilon:g} lr={cfg.lr:g}" + (f" init={cfg.init}" if cfg.init else "")
    return f"""---
license: apache-2.0
library_name: transformers
---
# The tool-using tiny policy of core-torl

**Its behaviour is induced on purpose.** It stands for a base model that has seen Python but was never taught to use it.
In {shown:.0f} % of the texts that it was trained on, a program is written; the others guess a number.
{broken:.0f} % of the first programs are broken, and after an error many texts give up. So there is
something that reward can find: to write code, to write it soundly, to mend it, and to take a second step. That makes
methods comparable on a laptop; it says nothing about real models, and the policy is of no use for mathematics.

- Architecture: {made.architecture}, {made.parameters:,} parameters, float32.
- Tokenizer: {made.vocabulary} pieces: words, what stands between digits in programs, single digits, bytes for anything
  else.
- Problems: {len(ONE_STAGE)} kinds of one stage ({", ".join(ONE_STAGE)}) and {len(TWO_STAGE)} kinds of two stages, whose
  second program needs the number that the first one printed.
- Training: {origin}seed {cfg.seed}; {made.drilled} steps of copying drills and sound programs in batches of
  {cfg.drill_batch_size}, then {cfg.steps} steps of the mixture ({shares}) in batches of {cfg.batch_size}; AdamW
  {cfg.lr:g}. It took {made.minutes:.0f} minutes with {cfg.threads} thread(s).
- Observations are part of the training texts, with a tenth of the loss weight. Without a sandbox the policy therefore
  writes outputs of its own invention.
- Made again by: `{again} threads={cfg.threads}`

## Before reinforcement learning

Problems whose operands occur in no training text; one answer each at temperature 1, at most {MAX_NEW_TOKENS} tokens;
95 % intervals. C is the number of programs that are run for an answer (C = 0: none is, and the policy goes on alone).

| measure | share | interval | n | method |
|---|---|---|---|---|
{rows(made.measured)}
"""
