"""The one training step: sample, reward, intervene, weigh, learn.

    groups = self.sample(problems, step)    # N trajectories a problem
    self.reward(groups)                     # named parts, policy-written text only
    groups = self.intervene(groups)         # identity, unless a variant coaches
    batch  = self.weigh(groups)             # advantages -> TokenBatch
    self.learn(batch)                       # minibatches: policy loss + auxiliary loss, clip, step (learning.py)
    self._hand_over()                       # the sampler gets the new weights, and proves that it has them

A variant overrides ``intervene`` and ``auxiliary_losses``, nothing else. One Lightning batch is one RL step with manual
optimization; every random number of a step comes from (seed, step, rank), so a run that was killed and resumed
continues bit for bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from core_torl.config.errors import UserError
from core_torl.data.stream import PromptStream, StepIndices
from core_torl.model.load import Policy
from core_torl.objective.token_batch import TokenBatch
from core_torl.problem import Concept, Problem
from core_torl.sampler.protocol import Sampler, SampleRequest
from core_torl.trajectory import Group, Sample, Trajectory
from core_torl.variant.ahead import Ahead, Answers
from core_torl.variant.judging import Judging
from core_torl.variant.learning import Learning
from core_torl.variant.step_metrics import StepMetrics, group_metrics
from core_torl.variant.sync_check import check_sync, has_own_weights, probe_of, retries, room

Encode = Callable[[Problem, Concept | None], tuple[int, ...]]


def stream_seed(*parts: int | str) -> int:
    """A 62-bit seed for one named random stream; equal parts give equal seeds on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 2


class PolicyGradient(Learning):
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
        microbatch_tokens: int | None = None,
        update_epochs: int = 1,
        skip_zero_advantage: bool = True,
        share_prompts: bool = True,
        first_step_gap: float | None = 1e-4,
        sync_gap: float | None = 1e-4,
        overlap: bool = False,
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
        self.microbatch_size, self.microbatch_tokens = microbatch_size, microbatch_tokens
        self.skip_zero_advantage = skip_zero_advantage
        self.share_prompts = share_prompts
        self.first_step_gap, self.max_excluded, self.max_aborted = first_step_gap, max_excluded, max_aborted
        self.sync_gap, self.overlap, self._ahead = sync_gap, overlap, Ahead()
        self.fingerprint, self.augment, self.token_budget = fingerprint, augment, token_budget
        self.rl_step = 0  # completed RL steps
        self.samples_seen = self.tokens_seen = self.updates = 0
        self.settled = True  # between two steps, where a checkpoint is that of a whole number of steps
        self._first_checked = False  # since this process started: a resumed run checks its sampler again
        self.last_metrics: dict[str, float] = {}
        self.last_sampled: list[Group] = []  # as the policy answered, before a coach replaced anything
        self.last_groups: list[Group] = []
        self.check_problems(self.problems)
        if overlap and not has_own_weights(sampler):
            raise ValueError(
                "variant.overlap=true: this sampler works with the trainer's own weights, which move while it samples; "
                "set sampler.copy_weights=true, or use sampler=vllm_server"
            )
        self._probe = probe_of([encode(p, None) for p in self.problems[:8]], room(sampler, self.model.config))

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
        ahead = self._ahead.take(step)
        self._stale = ahead is not None
        with self._now.timed("time/sample_s"):
            groups = self.sample(self._problems_of(step), step, ahead)
        self._now.update(retries(self.sampler))
        if self._stale:  # they were sampled while the step before trained
            self._now.update({"time/sample_s": self._ahead.seconds})
        with self._now.timed("time/reward_s"):
            self.reward(groups)
        self.last_sampled = groups
        self._now.update(group_metrics(groups) | {"rollout/staleness": float(self._stale)})
        self._now.per_second(
            "rollout/tokens_per_s", sum(t.sample.drawn for g in groups for t in g.trajectories), "time/sample_s"
        )
        if self.coached:
            with self._now.timed("time/intervene_s"):
                groups = self.intervene(groups)
        else:
            groups = self.intervene(groups)
        token_batch = self.weigh(groups)
        counted = self.samples_seen, self.tokens_seen
        self._count_drawn()
        if self.overlap and step + 1 < self.rl_steps and not self._budget_spent:
            self._ahead.start(step + 1, lambda: self._sampled_ahead(step + 1))
        else:
            self.sampler.sleep()
        try:
            with self._now.timed("time/learn_s"):
                self.learn(token_batch)
        except Exception:
            if self.settled:  # no weight has moved: the step is as if it had not begun
                self.samples_seen, self.tokens_seen = counted
            raise
        # From here on the step is done, whatever becomes of the sampler: a run that stops now has lost nothing.
        self.rl_step, self.settled, self.last_groups = step + 1, True, groups
        self._ahead.forget(step)
        try:
            self._prepare_next()
        except Exception:
            if self._ranks == 1:  # the others may be well, and would wait in vain for this one to report
                self._report(started)
            raise
        self._report(started)
        self.trainer.should_stop |= self.finished

    def _sampled_ahead(self, step: int) -> Answers:
        with self.trainer.precision_plugin.train_step_context():  # autocast is a thread's own
            return self.answers(self._problems_of(step), step)

    def _prepare_next(self) -> None:
        """Wait for answers in the making, then give the sampler the new weights."""
        if self.overlap:
            with self._now.timed("time/wait_s"):
                self._ahead.wait()
        with self._now.timed("time/sync_s"):
            gap = self._hand_over()
        self._now.update({} if gap is None else {"policy/sync_gap": gap})

    def sample(self, problems: Sequence[Problem], step: int, answers: Answers | None = None) -> list[Group]:
        """N trajectories for each problem, under the plain prompt; ``answers``: where they were sampled ahead."""
        if answers is None:
            answers = self.answers(problems, step)
        self._count(answers)
        return [
            Group(p, [self.trajectory(p, self.encode(p, None), s) for s in samples])
            for p, samples in zip(problems, answers, strict=True)
        ]

    def answers(self, problems: Sequence[Problem], step: int) -> Answers:
        """N answers to each problem: [problem][answer]. They depend on the weights, the seed and the step alone."""
        # The place among all ranks, so that a problem's answers do not depend on the number of ranks.
        places = [self.global_rank + i * self._ranks for i in range(len(problems))]
        return self.sampler.generate(
            [
                SampleRequest(
                    self.encode(p, None), self.group_size, stream_seed(self.seed, "sample", step, p.uid, place)
                )
                for p, place in zip(problems, places, strict=True)
            ]
        )

    def draw(self, requests: Sequence[SampleRequest]) -> Answers:
        """One call of the sampler, counted."""
        answers = self.sampler.generate(requests)
        self._count(answers)
        return answers

    def _count(self, answers: Answers) -> None:
        self._drawn[0] += sum(len(samples) for samples in answers)
        self._drawn[1] += sum(s.drawn for samples in answers for s in samples)

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

    # ---- small parts ---------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all RL steps are done, or the token budget is spent."""
        return self.rl_step >= self.rl_steps or self._budget_spent

    @property
    def _budget_spent(self) -> bool:
        return self.token_budget is not None and self.tokens_seen >= self.token_budget

    def _problems_of(self, step: int) -> list[Problem]:
        """This rank's share of the step's problems, varied if the run varies them."""
        places = list(enumerate(self.stream.at(step)))[self.global_rank :: self._ranks]
        if self.augment is None:
            return [self.problems[i] for _, i in places]
        seeds = [stream_seed(self.seed, "augment", step, place) for place, _ in places]
        return [self.augment(self.problems[i], seed) for (_, i), seed in zip(places, seeds, strict=True)]

    def _count_drawn(self) -> None:
        totals = torch.tensor(self._drawn, dtype=torch.float64, device=self.device)
        samples, tokens = self._sum_over_ranks(totals).tolist()
        self.samples_seen += int(samples)
        self.tokens_seen += int(tokens)

    def _hand_over(self) -> float | None:
        """Give the sampler the weights of now, and make sure that it has them. Returns the gap that was found."""
        version = str(self.updates)
        self.sampler.sync(self.policy, version)
        if not has_own_weights(self.sampler):
            return None
        return check_sync(self.sampler, self.model, self._probe, version, self.sync_gap)

    def _report(self, started: float) -> None:
        self._now.update({"time/step_s": time.perf_counter() - started})
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
            "ahead": self._ahead.state(self._ranks),
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["core_torl"]
        self.rl_step, self.updates = state["rl_step"], state["updates"]
        self.samples_seen, self.tokens_seen = state["samples"], state["tokens"]
        self._ahead.restore(state.get("ahead"), self.global_rank, self._ranks)
        # Lightning would take a checkpoint of a finished epoch for the end of all training and run no further step.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False

    def on_train_start(self) -> None:
        # Not in on_load_checkpoint, which runs before the weights are loaded. In the precision of the steps.
        with self.trainer.precision_plugin.train_step_context():
            self._hand_over()
