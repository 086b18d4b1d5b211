"""What does a coach cost? Seconds of one RL step of CORE-Base, CORE-CR and CORE-KL, half of the groups coached.

The real modules, composed from the shipped configuration, train the shipped tiny policy. A trigger fires on every
second group, so exactly half of them get an intervention: K primed answers in CR, M references in KL. All variants take
the same seeds, and the weights are put back before every step, so that all of them meet the same plain answers.
Variants alternate in one process; the first step of each round is warm-up and not counted.

    OMP_NUM_THREADS=1 python benchmarks/intervention.py [--rounds 4] [--steps 4]

Base gets off lightly where groups teach nothing: rows with advantage 0 skip its forward pass, while a coach gives them
something to learn. So there are four loads:

    varied     a coin pays (reward=random): every group has advantages, everyone trains on every row
    unskipped  as shipped, but rows with advantage 0 go through the forward pass all the same
    shipped    as shipped, answers paid for being right; the trigger looks at nothing but its turn
    failures   the coached groups are all wrong, as they are when CORE triggers, the others are paid by a coin: base
               skips half of its rows, CR trains on them

The loads `varied` and `unskipped` say what sampling, scoring and learning from primed answers cost; the other two also
charge the coach for rows that base skips. Ratios are seconds of the variant / seconds of base in the same step of the
same round: smaller is better here. The last lines speak of `varied` and K = M = 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from core_torl.config.build import build
from core_torl.config.paths import conf_dir
from core_torl.config.schema import register
from core_torl.reward.random import RandomReward
from core_torl.runs.assemble import Parts, assemble, prepare
from core_torl.runs.training import quiet
from core_torl.trajectory import Group, Score, Trajectory
from core_torl.trigger.failure import Failure
from core_torl.variant.policy_gradient import PolicyGradient

BAR = 1.6
HEADLINE, DEFAULT = "varied", 2  # the load and the number of primed answers that the last lines speak of
COACHED = {"core_cr": "replaced", "core_kl": "references"}  # how each calls its number of primed answers
LOADS = {
    "varied": ["reward=random"],
    "unskipped": ["variant.skip_zero_advantage=false"],
    "shipped": [],
    "failures": ["reward=random"],
}
PARTS = ("step", "sample", "reward", "intervene", "learn")
WALL, CPU = "time/step_s", "cpu"


class EverySecond(Failure):
    """Fires on every second group, whatever its answers. It is asked about every group once, in order."""

    def __init__(self) -> None:
        super().__init__(when="always")
        object.__setattr__(self, "asked", 0)

    def failed(self, group: Group) -> bool:
        return True

    def open(self, group: Group) -> bool:
        return True

    def fires(self, group: Group) -> bool:
        object.__setattr__(self, "asked", self.asked + 1)
        return self.asked % 2 == 0


class HalfFailed(RandomReward):
    """A coin pays, but every answer of every second group of ``group_size`` is wrong; primed answers get their coin."""

    def __init__(self, group_size: int, rows: int) -> None:
        super().__init__()
        self.group_size, self.rows = group_size, rows

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        scores = super().score(trajectories)
        if len(trajectories) != self.rows:
            return scores
        failed = (i // self.group_size % 2 == 1 for i in range(self.rows))
        wrong = {"value": self.incorrect, "correct": False, "outcome": "wrong"}
        return [replace(s, **wrong) if fails else s for s, fails in zip(scores, failed, strict=True)]


class Clock(pl.Callback):
    """Puts the weights back before each step and keeps what the module says it took."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.weights = {name: p.detach().clone() for name, p in module.model.named_parameters()}

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        for name, parameter in module.model.named_parameters():
            parameter.copy_(self.weights[name])
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.steps.append({**module.last_metrics, CPU: time.process_time() - self.started})


def composed(variant: str, load: str, primed: int, options: argparse.Namespace) -> DictConfig:
    own = [f"variant.{COACHED[variant]}={primed}"] if variant in COACHED else []
    return compose(
        "train",
        overrides=[
            f"variant={variant}", *own, *LOADS[load], f"group_size={options.group_size}",
            f"prompts_per_step={options.prompts}", f"rl_steps={options.steps + 1}", f"seed={options.seed}",
            f"trainer.threads={options.threads}", "paths.output_dir=unused", "evaluation=standard",
            "data.train_per_concept=20", "data.test_per_concept=1",
        ],
    )  # fmt: skip


def make(cfg: DictConfig, parts: Parts, load: str) -> PolicyGradient:
    """The module as runs.training builds it, with a trigger of our own."""
    coach: dict[str, Any] = {}
    reward = parts.reward
    if load == "failures":
        reward = HalfFailed(cfg.group_size, cfg.group_size * cfg.prompts_per_step)
    if cfg.variant._target_.rsplit(".", 1)[-1] != "CoreBase":
        coach = {
            "trigger": EverySecond(), "intervention": build(cfg.intervention, parts.problems.train),
            "max_prompt_tokens": cfg.model.max_prompt_tokens,
        }  # fmt: skip
    return build(
        cfg.variant, policy=parts.policy, sampler=parts.sampler, reward_function=reward,
        objective=build(cfg.objective), problems=parts.problems.train, encode=parts.encode, rl_steps=cfg.rl_steps,
        group_size=cfg.group_size, prompts_per_step=cfg.prompts_per_step, seed=cfg.seed,
        temperature=cfg.sampler.temperature, fingerprint={}, encode_answer=parts.encode_answer, **coach,
    )  # fmt: skip


def play(variant: str, load: str, primed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Metrics of the counted steps of one round."""
    cfg = composed(variant, load, primed, options)
    parts = assemble(cfg, prepare(cfg))
    clock = Clock()
    try:
        pl.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, callbacks=[clock],
        ).fit(make(cfg, parts, load))  # fmt: skip
    finally:
        parts.reward.close()
    steps = clock.steps[1:]
    expected = (options.prompts // 2) / options.prompts
    if variant in COACHED and any(abs(step["core/trigger_rate"] - expected) > 1e-9 for step in steps):
        raise SystemExit(f"{variant}: the trigger did not fire on exactly every second group")
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4, help="alternating rounds; medians are printed")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round")
    parser.add_argument("--prompts", type=int, default=16, help="groups of a step, an even number")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--primed", type=int, nargs="+", default=[2, 4], help="primed answers of a coached group")
    parser.add_argument("--loads", nargs="+", choices=list(LOADS), default=list(LOADS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.prompts % 2:
        parser.error("--prompts must be even, or the trigger rate is not 50 %")
    quiet()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    register()
    ways = [("core_base", 0), *((variant, k) for k in options.primed for variant in COACHED)]
    steps: dict[tuple[str, str, int], list[dict[str, float]]] = {
        (load, *way): [] for load in options.loads for way in ways
    }
    with initialize_config_dir(conf_dir(), version_base=None):
        for number in range(options.rounds):
            for load, variant, primed in steps:
                steps[load, variant, primed] += play(variant, load, primed, options)
            print(f"round {number + 1} of {options.rounds}", flush=True)
    print(
        f"\n{options.prompts} groups x {options.group_size} answers, half of the groups coached, "
        f"{options.threads} thread(s), {options.rounds} rounds of {options.steps} steps"
    )
    ratios: dict[tuple[str, str, int], float] = {}
    print(
        f"{'load':<11}{'variant':<11}{'K, M':>5}" + "".join(f"{part:>10}" for part in PARTS)
        + f"{'ratio':>8}{'of rounds':>14}{'CPU ratio':>11}"
    )  # fmt: skip
    for (load, variant, primed), runs in steps.items():
        base = steps[load, "core_base", 0]
        # Step by step against base's same step of the same round: equal problems, equal answers, almost equal moment.
        wall, cpu = ([one[k] / two[k] for one, two in zip(runs, base, strict=True)] for k in (WALL, CPU))
        ratios[load, variant, primed] = statistics.median(wall)
        by_round = [statistics.median(wall[i : i + options.steps]) for i in range(0, len(wall), options.steps)]
        times = [statistics.median(step.get(f"time/{part}_s", 0.0) for step in runs) for part in PARTS]
        print(
            f"{load:<11}{variant:<11}{primed or '-':>5}" + "".join(f"{t:>10.3f}" for t in times)
            + f"{ratios[load, variant, primed]:>8.2f}{f'{min(by_round):.2f} - {max(by_round):.2f}':>14}"
            + f"{statistics.median(cpu):>11.2f}"
        )  # fmt: skip
    print(
        "seconds are medians; ratio: median over steps of seconds / base's seconds, smaller is better, and the\n"
        "smallest and largest of a round; CPU ratio: the same of CPU seconds, which other jobs disturb less"
    )
    for load in options.loads:
        rates = {name: statistics.median(s[name] for s in steps[load, "core_base", 0]) for name in
                 ("reward/accuracy", "group/zero_variance", "rollout/length_mean")}  # fmt: skip
        print(f"{load}: " + ", ".join(f"{name} {value:.2f}" for name, value in rates.items()))
    for load in options.loads:
        for variant in COACHED:
            for primed in options.primed:
                value = ratios[load, variant, primed]
                if value > BAR:
                    print(f"above {BAR}: {variant} with {primed} primed answers, load {load}: {value:.2f}")
    load = HEADLINE if HEADLINE in options.loads else options.loads[0]
    primed = DEFAULT if DEFAULT in options.primed else options.primed[0]
    for variant in COACHED:
        print(f"ratio intervention_{variant.removeprefix('core_')} {ratios[load, variant, primed]:.2f}")
    # Smaller is better here: the dearer of the two.
    print(f"ratio intervention {max(ratios[load, variant, primed] for variant in COACHED):.2f}")


if __name__ == "__main__":
    main()
