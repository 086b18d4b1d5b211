"""What one RL step measured: sums while it runs, means when it ends, the same over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from core_torl.reward.base import outcome_rates
from core_torl.trajectory import Group

# Metrics of which ranks report the largest value instead of the mean.
_LARGEST = ("policy/ratio_max", "policy/sampler_logprob_gap_max", "rollout/length_max")


def group_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, outcomes and lengths of sampled groups, before any intervention."""
    flat = [t for g in groups for t in g.trajectories]
    scores = [t.score for t in flat if t.score is not None]
    judged = [s for s in scores if s.value is not None]
    lengths = [len(t.token_ids) for t in flat]
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
        "rollout/truncated": sum(t.truncated for t in flat) / len(flat),
    }


class StepMetrics:
    """Collects one RL step's metrics; names and units stand in core_torl.tracking.metrics."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._plain: dict[str, float] = {}
        self._tokens = self._gap_tokens = self._updates = 0.0

    def update(self, metrics: dict[str, float]) -> None:
        self._plain.update(metrics)

    def add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def _largest(self, name: str, value: float) -> None:
        self._plain[name] = max(self._plain.get(name, 0.0), value)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._plain[name] = time.perf_counter() - started

    def per_second(self, name: str, count: float, clock: str) -> None:
        """``count`` divided by what ``timed(clock)`` measured."""
        self._plain[name] = count / self._plain[clock]

    def add_loss(self, loss: Any, entropies: Tensor, mask: Tensor) -> None:
        """Sums of one part's loss (see objective.grpo.Loss); entropies: [rows, answer length], zeros if not asked for."""
        self.add("loss/policy", float(loss.policy))
        self.add("loss/total", float(loss.total.detach()))
        self.add("loss/reference_kl", float(loss.reference_kl))
        self.add("policy/ratio_mean", float(loss.ratio_sum))
        self.add("policy/clip_fraction", float(loss.clipped))
        self.add("policy/old_kl", float(loss.old_kl))
        self.add("policy/entropy", float((entropies.detach() * mask).sum()))
        self._largest("policy/ratio_max", float(loss.ratio_max))
        self._tokens += float(loss.tokens)

    def add_gap(self, largest: float, total: float, tokens: int) -> None:
        self._largest("policy/sampler_logprob_gap_max", largest)
        self.add("policy/sampler_logprob_gap_mean", total)
        self._gap_tokens += tokens

    def optimizer_step(self, grad_norm: float, lr: float) -> None:
        self.add("policy/grad_norm", grad_norm)
        self._plain["policy/lr"] = lr
        self._updates += 1

    def finish(self, ranks: int, device: torch.device) -> dict[str, float]:
        """All metrics of the step, averaged over ranks (the largest where the name says so)."""
        result = dict(self._plain)
        for name, value in self._sums.items():
            if name.startswith("loss/") or name == "policy/grad_norm":
                result[name] = value / max(1.0, self._updates)
            elif name == "policy/sampler_logprob_gap_mean":
                result[name] = value / max(1.0, self._gap_tokens)
            else:
                result[name] = value / max(1.0, self._tokens)
        if ranks > 1:
            names = sorted(result)
            mean = torch.tensor([result[n] for n in names], dtype=torch.float64, device=device)
            largest = mean.clone()
            torch.distributed.all_reduce(mean)
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
            pairs = zip(names, (mean / ranks).tolist(), largest.tolist(), strict=True)
            result = {n: big if n in _LARGEST else average for n, average, big in pairs}
        return result
