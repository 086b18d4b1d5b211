"""The warm start from its config to a policy folder: tokenizer, two stages of training, figures, model card."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from core_torl.config import UserError
from core_torl.data.concept_world.concepts import CONCEPTS
from core_torl.data.concept_world.corpus import RECALL, Corpus, Mixture, Text
from core_torl.data.concept_world.quizzes import make_quizzes
from core_torl.data.prompt import PromptTemplate
from core_torl.evaluation.protocol import Evaluation
from core_torl.evaluation.statistics import Estimate, wilson
from core_torl.model.load import load_policy
from core_torl.model.tiny import TinyArchitecture, Weighted, build_tiny, warm_start
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.problem import Concept, Problem
from core_torl.reward.correctness import Correctness
from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.transformers import TransformersSampler
from core_torl.tracking.console import make_console

_BOXED = re.compile(r"\\boxed\{[A-J]\}")


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


def start(cfg: DictConfig, template: PromptTemplate) -> tuple[Any, Any]:
    """The model to train and its tokenizer: fresh ones, or those of ``init``. Raises UserError."""
    if cfg.init is not None:
        try:
            policy = load_policy(path=cfg.init)
        except ValueError as error:
            raise UserError(str(error).replace("model.path", "init")) from error
        return policy.model, policy.tokenizer
    tokenizer = build_tokenizer(vocabulary(template.user_text), max_length=2048)
    return build_tiny(tokenizer, TinyArchitecture(cfg.layers, cfg.width, cfg.heads, cfg.mlp), cfg.seed), tokenizer


def warm(cfg: DictConfig) -> dict[str, Any]:
    """Train, measure, save. Returns the figures as plain numbers."""
    console = make_console()
    torch.set_num_threads(cfg.threads)
    prompt: Any = OmegaConf.to_container(cfg.prompt, resolve=True)
    try:
        template = PromptTemplate(**prompt)
    except ValueError as error:
        raise UserError(str(error).replace("model.prompt", "prompt")) from error
    model, tokenizer = start(cfg, template)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"warm start: {parameters:,} parameters, vocabulary {len(tokenizer)}, {cfg.drill_steps} + {cfg.steps} steps"
    )
    mixture: Any = OmegaConf.to_container(cfg.mixture)
    corpus = Corpus(template.user_text, cfg.seed, cfg.gap_epsilon, Mixture(**mixture))
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    started = time.perf_counter()
    common = {"lr": cfg.lr, "warmup_steps": cfg.warmup_steps}
    drilled = 0
    if cfg.drill_steps:
        # Drills weigh every answer alike: letter -> value is learned first and builds what value -> letter needs.
        drills = weigh(corpus.option_drills(), tokenizer, 1.0)
        drilled = warm_start(
            model, drills, steps=cfg.drill_steps, batch_size=cfg.drill_batch_size, decay=False,
            stop_below=cfg.drill_until, on_step=_progress(console, "drills"), **common,
        )  # fmt: skip
    texts = weigh(corpus.stream(), tokenizer, cfg.boxed_weight)
    warm_start(
        model,
        texts,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        decay=True,
        on_step=_progress(console, "mixture"),
        **common,
    )
    minutes = (time.perf_counter() - started) / 60
    measured = figures(model, tokenizer, template, cfg.evaluate_per_concept)
    folder = Path(cfg.output)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card(cfg, model.config, parameters, len(tokenizer), drilled, minutes, measured))
    plain = {name: [e.value, e.low, e.high, e.n] for name, e in measured.items()}
    (folder / "figures.json").write_text(json.dumps(plain, indent=1) + "\n")
    for name, e in measured.items():
        console.print(f"  {name}: {100 * e.value:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}], n = {e.n}")
    console.print(f"Wrote the policy and its card in {folder} after {minutes:.1f} minutes")
    return plain


def _progress(console: Console, stage: str) -> Callable[[int, float, float], None]:
    recent: list[float] = []

    def on_step(step: int, loss: float, seconds: float) -> None:
        recent.append(loss)
        if step % 100 == 0:
            console.print(
                f"  {stage} {step}: loss {sum(recent) / len(recent):.3f}, {seconds / 60:.1f} min", highlight=False
            )
            recent.clear()

    return on_step


def card(
    cfg: DictConfig,
    shape: Any,
    parameters: int,
    vocabulary_size: int,
    drilled: int,
    minutes: float,
    measured: dict[str, Estimate],
) -> str:
    """The model card; the first thing it says is that the gap is made on purpose."""
    rows = "\n".join(
        f"| {n} | {100 * e.value:.1f} % | {100 * e.low:.1f} to {100 * e.high:.1f} | {e.n} | {e.method} |"
        for n, e in measured.items()
    )
    shares = ", ".join(f"{k} {v}" for k, v in cfg.mixture.items())
    gaps = ", ".join(c.name for c in CONCEPTS if c.gap)
    origin = f"from {cfg.init}, " if cfg.init else ""
    architecture = (
        f"Llama, {shape.num_hidden_layers} layers, width {shape.hidden_size}, {shape.num_attention_heads} heads"
    )
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

- Architecture: {architecture}, {parameters:,} parameters, float32.
- Tokenizer: {vocabulary_size} pieces: words, integers from -99 to 99, boxed letters, bytes for anything else.
- Concepts: {len(CONCEPTS)}, of which {sum(c.gap for c in CONCEPTS)} have a gap: {gaps}.
- Training: {origin}seed {cfg.seed}; {drilled} steps of option drills in batches of {cfg.drill_batch_size}, then
  {cfg.steps} steps of the mixture ({shares}) in batches of {cfg.batch_size}; AdamW {cfg.lr:g}, boxed letters weighted
  {cfg.boxed_weight:g}. It took {minutes:.0f} minutes with {cfg.threads} thread(s).
- Made again by: `{again} threads={cfg.threads}`

## Before reinforcement learning

Held-out quizzes (operands that occur in no training text), four options, 95 % intervals. "Robust" counts a quiz only if
it and three permutations of its options are right. "Primed" has the definition in the prompt and is a diagnosis only.

| measure | share | interval | n | method |
|---|---|---|---|---|
{rows}
"""
