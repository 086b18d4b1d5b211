"""The one training step: sample, reward, intervene, weigh, learn.

    groups = self.sample(problems)          # N trajectories a problem
    self.reward(groups)                     # named parts, policy-written text only
    groups = self.intervene(groups)         # identity, unless a variant coaches
    batch  = self.weigh(groups)             # advantages -> TokenBatch
    self.learn(batch)                       # minibatches: policy loss + auxiliary loss, clip, step

A variant overrides ``intervene`` and ``auxiliary_losses``, nothing else. One Lightning batch is one RL step with manual
optimization; every random number of a step comes from (seed, step, rank), so a run that was killed and resumed
continues bit for bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from core_torl.config.errors import UserError
from core_torl.data.stream import PromptStream, StepIndices
from core_torl.model.load import Policy
from core_torl.objective.logprobs import answer_logprobs
from core_torl.objective.shared_prompts import prompt_groups
from core_torl.objective.token_batch import TokenBatch
from core_torl.problem import Concept, Problem
from core_torl.sampler.protocol import Sampler, SampleRequest
from core_torl.trajectory import Group, Sample, Trajectory
from core_torl.variant.gradients import (
    add_gradients,
    check_first_update,
    sum_gradients,
    sum_over_ranks,
    take_gradients,
)
from core_torl.variant.judging import Judging
from core_torl.variant.step_metrics import StepMetrics, group_metrics

Encode = Callable[[Problem, Concept | None], tuple[int, ...]]


def stream_seed(*parts: int | str) -> int:
    """A 62-bit seed for one named random stream; equal parts give equal seeds on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 2


class PolicyGradient(pl.LightningModule):
    """GRPO on problems with verifiable answers; the base of every variant.

    The keyword arguments of the second line come from the program, those after them from ``conf/variant``; their
    meaning stands there. ``fingerprint`` goes into checkpoints, to refuse one that another configuration wrote;
    ``augment(problem, seed)`` varies a training problem each time it is drawn; training ends after the step in which
    ``token_budget`` sampled tokens are reached.
    """

    #: Whether every training problem must have a concept.
    needs_concepts = False
    #: Whether a coach intervenes: such a variant has metrics ``core/*``.
    coached = False

    def __init__(
        self,
        *,
        policy: Policy, sampler: Sampler, reward_function: Any, objective: Any, problems: Sequence[Problem],
        encode: Encode, rl_steps: int, group_size: int, prompts_per_step: int, seed: int, temperature: float,
        fingerprint: dict[str, Any], augment: Callable[[Problem, int], Problem] | None = None,
        token_budget: int | None = None, encode_answer: Callable[[str], tuple[int, ...]] | None = None,
        lr: float = 1e-6,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        grad_clip: float = 1.0,
        minibatch_size: int | None = None,
        microbatch_size: int = 64,
        update_epochs: int = 1,
        skip_zero_advantage: bool = True,
        share_prompts: bool = True,
        first_step_gap: float | None = 1e-4,
        max_excluded: float = 0.5,
        max_aborted: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.model = policy.model.train()
        # Plain objects, kept out of the module tree so that they stay out of checkpoints and of DDP.
        self._parts: dict[str, Any] = {
            "policy": policy, "sampler": sampler, "reward": reward_function, "objective": objective,
            "encode_answer": encode_answer,
        }  # fmt: skip
        object.__setattr__(self, "_frozen", policy.frozen_copy() if objective.needs_reference else None)
        self.problems, self.encode, self.seed = list(problems), encode, seed
        self.rl_steps, self.group_size, self.temperature = rl_steps, group_size, temperature
        self.stream = PromptStream(len(self.problems), prompts_per_step, seed)
        self.lr, self.betas, self.weight_decay = lr, (betas[0], betas[1]), weight_decay
        self.warmup_steps, self.grad_clip, self.update_epochs = warmup_steps, grad_clip, update_epochs
        self.minibatch_size = minibatch_size or group_size * prompts_per_step
        self.microbatch_size, self.skip_zero_advantage = microbatch_size, skip_zero_advantage
        self.share_prompts = share_prompts
        self.first_step_gap, self.max_excluded, self.max_aborted = first_step_gap, max_excluded, max_aborted
        self.fingerprint, self.augment, self.token_budget = fingerprint, augment, token_budget
        self.rl_step = 0  # completed RL steps
        self.samples_seen = self.tokens_seen = self.updates = 0
        self._first_checked = False  # since this process started: a resumed run checks its sampler again
        self.last_metrics: dict[str, float] = {}
        self.last_sampled: list[Group] = []  # as the policy answered, before a coach replaced anything
        self.last_groups: list[Group] = []
        self.check_problems(self.problems)

    @classmethod
    def check_problems(cls, problems: Sequence[Problem]) -> None:
        """Raises UserError if this variant cannot train on such problems; needs no weights."""
        missing = next((p for p in problems if p.concept is None), None)
        if cls.needs_concepts and missing is not None:
            raise UserError(
                f"variant: problem {missing.uid} has no concept, which this variant needs; use data with concepts"
            )

    # ---- the algorithm -------------------------------------------------------------------------------------------

    def training_step(self, batch: int, batch_idx: int) -> None:
        step = int(batch)
        if step != self.rl_step:
            raise RuntimeError(f"the loader is at RL step {step}, the policy at {self.rl_step}")
        torch.manual_seed(stream_seed(self.seed, "step", step, self.global_rank) % 2**63)
        self._now, started = StepMetrics(self.coached), time.perf_counter()
        self._drawn = [0, 0]  # trajectories and tokens sampled in this step, primed ones included
        self._judging = Judging(step, self.max_excluded, self.max_aborted, self._sum_over_ranks, self.device)
        with self._now.timed("time/sample_s"):
            groups = self.sample(self._problems_of(step))
        with self._now.timed("time/reward_s"):
            self.reward(groups)
        self.last_sampled = groups
        self._now.update(group_metrics(groups))
        self._now.per_second(
            "rollout/tokens_per_s", sum(t.sample.drawn for g in groups for t in g.trajectories), "time/sample_s"
        )
        if self.coached:
            with self._now.timed("time/intervene_s"):
                groups = self.intervene(groups)
        else:
            groups = self.intervene(groups)
        token_batch = self.weigh(groups)
        with self._now.timed("time/learn_s"):
            self.learn(token_batch)
        self._now.update({"time/step_s": time.perf_counter() - started})
        self.rl_step = step + 1
        self._report(groups)
        self.trainer.should_stop |= self.finished

    def sample(self, problems: Sequence[Problem]) -> list[Group]:
        """N trajectories for each problem, under the plain prompt."""
        requests = [
            SampleRequest(
                self.encode(p, None),
                self.group_size,
                # The place among all ranks, so that a problem's answers do not depend on the number of ranks.
                stream_seed(self.seed, "sample", self.rl_step, p.uid, self.global_rank + i * self._ranks),
            )
            for i, p in enumerate(problems)
        ]
        groups = self.draw(requests)
        return [
            Group(p, [self.trajectory(p, r.prompt_ids, s) for s in samples])
            for p, r, samples in zip(problems, requests, groups, strict=True)
        ]

    def draw(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One call of the sampler, counted."""
        groups = self.sampler.generate(requests)
        self._drawn[0] += sum(len(samples) for samples in groups)
        self._drawn[1] += sum(s.drawn for samples in groups for s in samples)
        return groups

    def trajectory(self, problem: Problem, prompt_ids: tuple[int, ...], sample: Sample) -> Trajectory:
        """A sampled answer as a trajectory."""
        return Trajectory.of(problem, prompt_ids, sample, self.policy.decode)

    def reward(self, groups: Sequence[Group]) -> None:
        """Score every trajectory in place; one whose sandbox failed gets no score. Raises RuntimeError, see Judging."""
        self._judging.score(self._parts["reward"], [t for g in groups for t in g.trajectories])

    def intervene(self, groups: list[Group]) -> list[Group]:
        """What is changed between scoring and learning: a coach adds answers, a filter drops some. Here: nothing."""
        return groups

    def weigh(self, groups: Sequence[Group]) -> TokenBatch:
        """Group advantages, and everything padded into one batch of token ids."""
        scores = [[t.score.value if t.score else None for t in g.trajectories] for g in groups]
        values = torch.tensor([[float("nan") if v is None else v for v in row] for row in scores])
        valid = ~values.isnan()
        advantages = self.objective.advantages(values, valid).flatten()
        flat = [t for g in groups for t in g.trajectories]
        masks = [
            t.train_mask if ok else (False,) * len(t.train_mask)
            for t, ok in zip(flat, valid.flatten().tolist(), strict=True)
        ]
        return TokenBatch.build(
            [t.prompt_ids for t in flat], [t.token_ids for t in flat], [t.sample.logprobs for t in flat], masks,
            advantages, self.policy.pad_id, self.device, [t.behaviour for t in flat],
        )  # fmt: skip

    def auxiliary_losses(self, rows: Tensor) -> Iterator[Tensor]:
        """A variant's own loss for the rows of one optimizer step, in parts that add up to it, already scaled.

        Each part is back-propagated before the next one is asked for: that is what bounds the memory.
        """
        yield from ()

    def learn(self, batch: TokenBatch) -> None:
        """Optimizer steps over the batch, ``minibatch_size`` trajectories each, ``update_epochs`` times."""
        share = self.minibatch_size // self._ranks
        cuts = [torch.arange(s, min(s + share, batch.rows), device=self.device) for s in range(0, batch.rows, share)]
        self.model.train()
        if self.objective.needs_reference:
            with self.policy.reference(self._frozen) as reference:
                batch.reference_logprobs = self._forward_only(reference, batch)
        if len(cuts) * self.update_epochs > 1:
            # The policy moves between the optimizer steps: keep where it stood before the first one.
            batch.old_logprobs = self._forward_only(self.model, batch)
            self._compare_with_sampler(batch.old_logprobs, batch)
        for _ in range(self.update_epochs):
            for rows in cuts:
                self._optimizer_step(batch, rows)

    # ---- one optimizer step --------------------------------------------------------------------------------------

    def _optimizer_step(self, batch: TokenBatch, rows: Tensor) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad(set_to_none=False)
        denominator = self._sum_over_ranks(self.objective.denominator(batch.train_mask[rows])).clamp(min=1)
        with self._own_gradient_sync():
            held = self._auxiliary_gradient(rows)
            for part in self._microbatches(batch, rows):
                logprobs, entropies = answer_logprobs(
                    self.model, part, self.temperature, self.objective.needs_entropy, self.share_prompts
                )
                if batch.old_logprobs is None:
                    self._compare_with_sampler(logprobs.detach(), part)
                loss = self.objective.loss(logprobs, entropies, part, denominator)
                self.manual_backward(loss.total)
                self._now.add_loss(loss, entropies, part.train_mask)
        self._check_first_update()
        sum_gradients(self._trained(), self._ranks)
        if held is not None:
            auxiliary, own = add_gradients(self._trained(), held)
            self._now.count("auxiliary updates", 1)
            self._now.add("core/auxiliary_grad_norm", auxiliary)
            self._now.add("core/auxiliary_grad_share", auxiliary / max(auxiliary + own, 1e-12))
        norm = self._clip()
        if not torch.isfinite(norm):
            raise FloatingPointError(f"RL step {self.rl_step}: the gradient norm is {norm.item()}; lower variant.lr")
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.updates + 1) / self.warmup_steps) if self.warmup_steps else self.lr
        optimizer.step()
        self.updates += 1
        self.sampler.sync(self.model.named_parameters(), str(self.updates))
        self._now.optimizer_step(float(norm), optimizer.param_groups[0]["lr"])

    def _auxiliary_gradient(self, rows: Tensor) -> list[Tensor] | None:
        """The gradient of the variant's own loss over all ranks, taken off the parameters so that it can be measured.

        None where the variant has no such loss. Every rank takes part, also one without a row of its own.
        """
        if type(self).auxiliary_losses is PolicyGradient.auxiliary_losses:
            return None
        for part in self.auxiliary_losses(rows):
            self.manual_backward(part)
            self._now.add("loss/auxiliary", float(part.detach()))
            self._now.add("loss/total", float(part.detach()))
        sum_gradients(self._trained(), self._ranks)
        return take_gradients(self._trained())

    def _microbatches(self, batch: TokenBatch, rows: Tensor) -> Iterator[TokenBatch]:
        """The rows of one optimizer step in memory-sized parts of like length; rows without gradient are left out."""
        useful = batch.train_mask[rows].any(dim=1)
        if self.skip_zero_advantage and not (self.objective.needs_reference or self.objective.needs_entropy):
            useful &= batch.advantages[rows] != 0
        rows = rows[useful]
        if self.share_prompts and len(rows):  # answers to one prompt side by side
            rows = rows[prompt_groups(batch.select(rows)).argsort(stable=True)]
        else:
            rows = rows[batch.attention_mask[rows].sum(dim=1).argsort(stable=True)]
        for start in range(0, len(rows), self.microbatch_size):
            yield batch.select(rows[start : start + self.microbatch_size])

    @torch.no_grad()
    def _forward_only(self, model: Any, batch: TokenBatch) -> Tensor:
        """Log-probs of all answers under ``model``: [rows, answer length]; zeros right of each row's answer."""
        result = torch.zeros_like(batch.sampled_logprobs)
        for start in range(0, batch.rows, self.microbatch_size):
            part = batch.select(slice(start, start + self.microbatch_size))
            logprobs, _ = answer_logprobs(model, part, self.temperature, share_prompts=self.share_prompts)
            result[start : start + part.rows, : part.answer_length] = logprobs
        return result

    def _compare_with_sampler(self, logprobs: Tensor, part: TokenBatch) -> None:
        """Record the log-prob gap between trainer and sampler on trained tokens that both saw behind one prompt."""
        compared = part.train_mask & ~part.foreign[:, None]
        gap = torch.where(compared, (logprobs - part.sampled_logprobs).abs(), 0.0)
        self._now.add_gap(float(gap.max()), float(gap.sum()), int(compared.sum()))

    def _check_first_update(self) -> None:
        # Before an RL step's first update, that is: afterwards ratios are meant to move.
        if self.first_step_gap is not None and not self._first_checked and not self._now.updates:
            self._first_checked = check_first_update(
                self._now, self.updates == 0, self.first_step_gap, self._ranks, self.device
            )

    def _clip(self) -> Tensor:
        limit = self.grad_clip if self.grad_clip > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(self._trained(), limit)

    def _own_gradient_sync(self) -> Any:
        """Ranks may have different numbers of parts, so gradients are summed here, once, not by DDP each time."""
        strategy: Any = self.trainer.strategy
        return strategy.block_backward_sync() if self._ranks > 1 else nullcontext()

    # ---- small parts ---------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all RL steps are done, or the token budget is spent."""
        return self.rl_step >= self.rl_steps or (
            self.token_budget is not None and self.tokens_seen >= self.token_budget
        )

    @property
    def policy(self) -> Policy:
        return self._parts["policy"]

    @property
    def sampler(self) -> Sampler:
        return self._parts["sampler"]

    @property
    def objective(self) -> Any:
        return self._parts["objective"]

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size

    def _trained(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _problems_of(self, step: int) -> list[Problem]:
        """This rank's share of the step's problems, varied if the run varies them."""
        places = list(enumerate(self.stream.at(step)))[self.global_rank :: self._ranks]
        if self.augment is None:
            return [self.problems[i] for _, i in places]
        seeds = [stream_seed(self.seed, "augment", step, place) for place, _ in places]
        return [self.augment(self.problems[i], seed) for (_, i), seed in zip(places, seeds, strict=True)]

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return sum_over_ranks(value, self._ranks)

    def _report(self, groups: list[Group]) -> None:
        totals = torch.tensor(self._drawn, dtype=torch.float64, device=self.device)
        samples, tokens = self._sum_over_ranks(totals).tolist()
        self.samples_seen += int(samples)
        self.tokens_seen += int(tokens)
        self.last_groups = groups
        self.last_metrics = self._now.finish(self._ranks, self.device, self.objective.needs_entropy) | {
            "train/rl_step": self.rl_step,
            "train/samples": self.samples_seen,
            "train/sampled_tokens": self.tokens_seen,
            "train/optimizer_steps": self.updates,
            "train/epoch": self.stream.epoch(self.rl_step),
        }
        if self.logger is not None:
            self.logger.log_metrics(self.last_metrics, step=self.rl_step)

    # ---- Lightning -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self._trained(), lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def train_dataloader(self) -> Any:
        return StepIndices(self.rl_steps if self.finished else self.rl_step, self.rl_steps)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All weights, or only the adapters when training through LoRA."""
        return {f"model.{name}": tensor for name, tensor in self.policy.trainable_state().items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        self.policy.load_state({name.removeprefix("model."): tensor for name, tensor in state_dict.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["core_torl"] = {
            "rl_step": self.rl_step, "samples": self.samples_seen, "tokens": self.tokens_seen, "updates": self.updates,
            "fingerprint": self.fingerprint, "run_id": str(self.logger.version) if self.logger else None,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["core_torl"]
        self.rl_step, self.updates = state["rl_step"], state["updates"]
        self.samples_seen, self.tokens_seen = state["samples"], state["tokens"]
        # Lightning would take a checkpoint of a finished epoch for the end of all training and run no further step.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False

    def on_train_start(self) -> None:
        # Not in on_load_checkpoint, which runs before the weights are loaded.
        self.sampler.sync(self.model.named_parameters(), str(self.updates))
