"""What one RL step measured: sums while it runs, means when it ends, the same over all ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from core_torl.objective.mismatch import Mismatch
from core_torl.reward.base import outcome_rates
from core_torl.trajectory import Group

# Metrics of which ranks report the largest value instead of the mean.
_LARGEST = (
    "policy/ratio_max", "policy/sampler_logprob_gap_max", "rollout/length_max", "core/replaced_ratio_max",
    "tool/latency_p50_s", "tool/latency_p95_s", "mismatch/ratio_max", "mismatch/sequence_ratio_max",
)  # fmt: skip
# And of which the smallest.
_SMALLEST = ("mismatch/sequence_ratio_min",)
# Extremes of a step start here, so that every rank has a value, also one that compared nothing.
_EXTREMES = {
    "policy/ratio_max": 0.0, "policy/sampler_logprob_gap_max": 0.0, "mismatch/ratio_max": 0.0,
    "mismatch/sequence_ratio_max": 0.0, "mismatch/sequence_ratio_min": math.inf,
}  # fmt: skip

# What each sum is divided by when the step ends; "total" is not divided.
_SUMS = {
    **dict.fromkeys(("loss/policy", "loss/total", "loss/reference_kl", "loss/auxiliary"), "updates"),
    "policy/grad_norm": "updates",
    **dict.fromkeys(("core/auxiliary_grad_norm", "core/auxiliary_grad_share"), "auxiliary updates"),
    **dict.fromkeys(("policy/ratio_mean", "policy/clip_fraction", "policy/old_kl"), "own tokens"),
    "policy/entropy": "tokens",
    "train/padding": "token places",
    "policy/sampler_logprob_gap_mean": "compared tokens",
    **dict.fromkeys(("mismatch/kl", "mismatch/ratio_mean", "mismatch/outside"), "compared tokens"),
    **dict.fromkeys(("mismatch/weight_mean", "mismatch/bounded"), "weighed tokens"),
    **dict.fromkeys(("core/trigger_rate", "core/gated"), "groups"),
    **dict.fromkeys(("core/primed_accuracy",), "primed answers"),
    **dict.fromkeys(("core/primed_tokens", "core/replaced_tokens"), "total"),
    **dict.fromkeys(("core/replaced_ratio_mean", "core/replaced_clip_fraction"), "replaced tokens"),
    "core/primed_logprob_gap": "primed tokens",
    "core/kl_per_token": "kl tokens",
}


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, outcomes and lengths of sampled groups, before any intervention."""
    flat = [t for g in groups for t in g.trajectories]
    scores = [t.score for t in flat if t.score is not None]
    judged = [s for s in scores if s.value is not None]
    whole = [t for t in flat if not t.aborted]
    lengths = [t.sample.drawn for t in whole] or [0]
    by_group = [[t.score for t in g.trajectories if t.score is not None and t.score.value is not None] for g in groups]
    count = len(groups)
    return {
        "reward/mean": sum(s.value or 0.0 for s in judged) / max(1, len(judged)),
        "reward/accuracy": sum(s.correct for s in judged) / max(1, len(judged)),
        "reward/excluded": 1 - len(judged) / len(flat),
        **{f"reward/outcome/{outcome}": rate for outcome, rate in outcome_rates(scores).items()},
        "group/all_wrong": sum(g.all_wrong for g in groups) / count,
        "group/all_right": sum(bool(group) and all(s.correct for s in group) for group in by_group) / count,
        "group/zero_variance": sum(len({s.value for s in group}) < 2 for group in by_group) / count,
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/length_max": max(lengths),
        "rollout/truncated": sum(t.truncated for t in whole) / max(1, len(whole)),
    }


def _larger(one: float, two: float) -> float:
    """The larger number, and NaN if one of them is: max() would drop it, and a check would pass on nothing."""
    return one if math.isnan(one) or two <= one else two


class StepMetrics:
    """Collects one RL step's metrics; names and units stand in core_torl.tracking.metrics."""

    def __init__(self, coached: bool = False) -> None:
        """``coached`` says whether the variant intervenes: only then are there metrics ``core/*``."""
        # Every rank reports the same names, also one whose rows had nothing to train on.
        self._sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
        self._counts: dict[str, float] = dict.fromkeys(set(_SUMS.values()), 0.0)
        self._plain: dict[str, float] = dict(_EXTREMES)
        self._ratios: dict[str, tuple[float, float]] = {}
        self._ratio_gap = 0.0
        if coached:
            self._plain["core/replaced_ratio_max"] = 0.0
        self.exact_sampler = True  # False where it is meant to differ from the trainer: a gap is then no fault
        self._coached = coached

    def update(self, metrics: dict[str, float]) -> None:
        self._plain.update(metrics)

    def add(self, name: str, value: float) -> None:
        self._sums[name] += value

    def add_ratios(self, ratios: dict[str, tuple[float, float]]) -> None:
        """Numerators and denominators that are summed over ranks. Every rank must give the same names."""
        for name, (part, whole) in ratios.items():
            before = self._ratios.get(name, (0.0, 0.0))
            self._ratios[name] = before[0] + part, before[1] + whole

    def count(self, denominator: str, value: float) -> None:
        """Add to what the sums with this denominator are divided by."""
        self._counts[denominator] += value

    def _largest(self, name: str, value: float) -> None:
        self._plain[name] = _larger(self._plain[name], value)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._plain[name] = time.perf_counter() - started

    def per_second(self, name: str, count: float, clock: str) -> None:
        """``count`` divided by what ``timed(clock)`` measured."""
        self._plain[name] = count / self._plain[clock]

    def add_loss(self, loss: Any, entropies: Tensor, mask: Tensor) -> None:
        """Sums of one part's loss (see objective.grpo.Loss); entropies: [rows, answer length], zeros if unasked."""
        self.add("loss/policy", float(loss.policy))
        self.add("loss/total", float(loss.total.detach()))
        self.add("loss/reference_kl", float(loss.reference_kl))
        self.add("policy/ratio_mean", float(loss.ratio_sum))
        self.add("policy/clip_fraction", float(loss.clipped))
        self.add("policy/old_kl", float(loss.old_kl))
        self.add("policy/entropy", float((entropies.detach() * mask).sum()))
        self._largest("policy/ratio_max", float(loss.ratio_max))
        self._ratio_gap = _larger(self._ratio_gap, float(loss.ratio_gap))
        self.count("tokens", float(loss.tokens))
        self.count("own tokens", float(loss.own_tokens))
        self.add("mismatch/weight_mean", float(loss.weight_sum))
        self.add("mismatch/bounded", float(loss.bounded))
        self.count("weighed tokens", float(loss.weighed_tokens))
        if self._coached:
            self.add("core/replaced_ratio_mean", float(loss.foreign_ratio_sum))
            self.add("core/replaced_clip_fraction", float(loss.foreign_clipped))
            self.count("replaced tokens", float(loss.foreign_tokens))
            self.add_primed_gap(float(loss.foreign_gap), float(loss.foreign_tokens))
            self._largest("core/replaced_ratio_max", float(loss.foreign_ratio_max))

    def add_primed_gap(self, total: float, tokens: float) -> None:
        """Sum of log p(y|primed) - log p(y|plain) over so many tokens of primed answers."""
        self.add("core/primed_logprob_gap", total)
        self.count("primed tokens", tokens)

    def add_mismatch(self, found: Mismatch) -> None:
        """What a part of the batch has to say of sampler and trainer, before the step's first update."""
        self._largest("policy/sampler_logprob_gap_max", float(found.gap_max))
        self.add("policy/sampler_logprob_gap_mean", float(found.gap_sum))
        self.add("mismatch/kl", float(found.kl_sum))
        self.add("mismatch/ratio_mean", float(found.ratio_sum))
        self.add("mismatch/outside", float(found.outside))
        self._largest("mismatch/ratio_max", float(found.ratio_max))
        self._largest("mismatch/sequence_ratio_max", float(found.sequence_ratio_max))
        smallest = "mismatch/sequence_ratio_min"
        self._plain[smallest] = -_larger(-self._plain[smallest], -float(found.sequence_ratio_min))
        self.count("compared tokens", float(found.tokens))

    @property
    def compared(self) -> bool:
        """Whether any trained token was compared with the sampler."""
        return self._counts["compared tokens"] > 0

    @property
    def updates(self) -> int:
        """Optimizer steps made in this RL step so far."""
        return int(self._counts["updates"])

    def deviations(self) -> tuple[float, float, float]:
        """Largest sampler gap, largest distance of a ratio from 1, and the KL to the reference, so far.

        Infinity stands for NaN, which the maximum over ranks would lose.
        """
        gap = self._plain["policy/sampler_logprob_gap_max"] if self.exact_sampler else 0.0
        found = gap, self._ratio_gap, abs(self._sums["loss/reference_kl"])
        gap, ratio, kl = (math.inf if math.isnan(value) else value for value in found)
        return gap, ratio, kl

    def optimizer_step(self, grad_norm: float, lr: float) -> None:
        self.add("policy/grad_norm", grad_norm)
        self._plain["policy/lr"] = lr
        self.count("updates", 1)

    def finish(self, ranks: int, device: torch.device, entropy: bool) -> dict[str, float]:
        """All metrics of the step, averaged over ranks (the largest where the name says so).

        ``entropy`` says whether it was computed.
        """
        kinds = sorted(self._counts)
        sums = torch.tensor(
            [self._sums[n] for n in _SUMS] + [self._counts[k] for k in kinds], dtype=torch.float64, device=device
        )
        pairs_of = torch.tensor(
            [self._ratios[n] for n in sorted(self._ratios)], dtype=torch.float64, device=device
        ).reshape(-1, 2)
        names = sorted(self._plain)
        plain = torch.tensor([self._plain[n] for n in names], dtype=torch.float64, device=device)
        sign = torch.tensor([-1.0 if n in _SMALLEST else 1.0 for n in names], dtype=torch.float64, device=device)
        largest = plain * sign
        if ranks > 1:
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(pairs_of)
            torch.distributed.all_reduce(plain)
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        totals, counts = sums[: len(_SUMS)].tolist(), dict(zip(kinds, sums[len(_SUMS) :].tolist(), strict=True))
        pairs = zip(names, (plain / ranks).tolist(), (largest * sign).tolist(), strict=True)
        # A NaN of one rank is in the sum, but a maximum over ranks may lose it.
        extreme = {*_LARGEST, *_SMALLEST}
        result = {n: big if n in extreme and not math.isnan(mean) else mean for n, mean, big in pairs}
        for (name, denominator), total in zip(_SUMS.items(), totals, strict=True):
            if name.startswith("core/") and not self._coached:
                continue
            if denominator == "total":
                result[name] = total
            elif name.startswith("loss/"):  # each rank's loss is its share of one sum
                result[name] = total / max(1.0, counts[denominator] / ranks)
            elif counts[denominator] or not name.startswith(("core/", "mismatch/")):
                # Without a primed answer there is no rate of right ones: such a step has no value, not a zero.
                result[name] = total / max(1.0, counts[denominator])
        for name, (part, whole) in zip(sorted(self._ratios), pairs_of.tolist(), strict=True):
            if whole:  # a step without a single run has no pass ratio
                result[name] = part / whole
        for name in ("tool/latency_p50_s", "tool/latency_p95_s"):
            if result.get(name) == 0:  # nothing was run
                del result[name]
        if "rollout/tokens_per_s" in result:  # ranks sample side by side
            result["rollout/tokens_per_s"] *= ranks
        if not counts["compared tokens"]:
            for name in _EXTREMES:
                if name.startswith("mismatch/"):
                    del result[name]
        if self._coached and not counts["replaced tokens"]:
            del result["core/replaced_ratio_max"]
        if not entropy:  # it was not computed; a zero would read as a collapse
            del result["policy/entropy"]
        return result
