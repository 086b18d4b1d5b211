"""The warm start from its config to a policy folder: tokenizer, two stages of training, figures, model card.

What differs between the two worlds (words, texts, figures, card) is in a module for each; see ``Warming``.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from core_torl.config import UserError
from core_torl.data.prompt import PromptTemplate
from core_torl.evaluation.statistics import Estimate
from core_torl.model.load import load_policy
from core_torl.model.tiny import TinyArchitecture, Weighted, build_tiny, warm_start
from core_torl.runs.warming_calculation import CalculationWarming
from core_torl.runs.warming_card import Made
from core_torl.runs.warming_concept import ConceptWarming
from core_torl.tracking.console import make_console


class Warming(Protocol):
    """What a world gives to its warm start. Its constructor takes the config and the prompt template."""

    alike: bool  # see core_torl.model.tiny.warm_start

    def __init__(self, cfg: DictConfig, template: PromptTemplate) -> None: ...

    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    def drills(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[Weighted]:
        """Stage 1, where ``drill_steps`` asks for it."""
        ...

    def texts(self, tokenizer: PreTrainedTokenizerFast) -> Iterator[Weighted]:
        """Stage 2: the mixture."""
        ...

    def figures(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Estimate]:
        """What the policy can do before any reward."""
        ...

    def card(self, made: Made) -> str: ...


WORLDS: dict[str, type[Warming]] = {"concept": ConceptWarming, "calculation": CalculationWarming}


def start(cfg: DictConfig, world: Warming) -> tuple[Any, Any]:
    """The model to train and its tokenizer: fresh ones, or those of ``init``. Raises UserError."""
    if cfg.init is not None:
        try:
            policy = load_policy(path=cfg.init)
        except ValueError as error:
            raise UserError(str(error).replace("model.path", "init")) from error
        return policy.model, policy.tokenizer
    tokenizer = world.tokenizer()
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
    world = WORLDS[cfg.world](cfg, template)
    model, tokenizer = start(cfg, world)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"warm start: {parameters:,} parameters, vocabulary {len(tokenizer)}, {cfg.drill_steps} + {cfg.steps} steps"
    )
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    started = time.perf_counter()
    common = {"lr": cfg.lr, "warmup_steps": cfg.warmup_steps, "alike": world.alike}
    drilled = 0
    if cfg.drill_steps:
        drilled = warm_start(
            model, world.drills(tokenizer), steps=cfg.drill_steps, batch_size=cfg.drill_batch_size, decay=False,
            stop_below=cfg.drill_until, on_step=_progress(console, "drills"), **common,
        )  # fmt: skip
    warm_start(
        model, world.texts(tokenizer), steps=cfg.steps, batch_size=cfg.batch_size, decay=True,
        on_step=_progress(console, "mixture"), **common,
    )  # fmt: skip
    minutes = (time.perf_counter() - started) / 60
    folder = Path(cfg.output)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = world.figures(model, tokenizer)
    shape = model.config
    architecture = (
        f"Llama, {shape.num_hidden_layers} layers, width {shape.hidden_size}, {shape.num_attention_heads} heads"
    )
    made = Made(architecture, parameters, len(tokenizer), drilled, minutes, measured)
    (folder / "README.md").write_text(world.card(made))
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
