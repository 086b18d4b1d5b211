"""CORE-KL: the policy under the plain prompt is drawn towards itself under the primed one (CORE, its method KL).

On a failed group, answers ``y*`` are sampled with the concept before the question. Beside the GRPO loss stands
``lambda * sum_t KL(p(.|p_c, y*_<t) || p(.|q, y*_<t))``, over the whole vocabulary; nothing is replaced. The teacher,
the primed side, gives no gradient. In the released code this term has no gradient at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from core_torl.config.coach_checks import check_choice
from core_torl.objective.distillation import Divergence, divergence
from core_torl.objective.head import Head
from core_torl.objective.hidden import answer_hidden, answer_read, check_head, head_of
from core_torl.objective.token_batch import TokenBatch
from core_torl.trajectory import Group, Trajectory
from core_torl.variant.coached import Coached, Primed, judged
from core_torl.variant.microbatches import Lengths, cut


@dataclass(frozen=True)
class Lesson:
    """One primed answer to learn from: its owner's first row in the batch, both prompts, and its lambda."""

    row: int
    plain_prompt: tuple[int, ...]
    answer: Trajectory
    weight: float


class CoreKL(Coached):
    """GRPO with a KL from primed to plain; the keys stand in ``conf/variant/core_kl.yaml``.

    Raises:
        ValueError: a value is unknown; the message names its key. A model that caps its logits is refused.
    """

    def __init__(
        self,
        *,
        references: int = 2,
        kl_lambda: float = 0.01,
        lambda_right: float = 3.0,
        lambda_wrong: float = 0.5,
        teacher: str = "current",
        direction: str = "forward",
        reduction: str = "token_mean",
        average_over: str = "triggered",
        only_correct_teacher: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        for key, value in (
            ("teacher", teacher), ("direction", direction), ("reduction", reduction), ("average_over", average_over),
        ):  # fmt: skip
            check_choice(key, value)
        self.references, self.kl_lambda = references, kl_lambda
        self.lambda_right, self.lambda_wrong = lambda_right, lambda_wrong
        self.teacher, self.direction, self.reduction = teacher, direction, reduction
        self.average_over, self.only_correct_teacher = average_over, only_correct_teacher
        self._lessons: list[Lesson] = []
        self._answers = 1.0  # what the sum over lessons is divided by
        check_head(self.model, torch.tensor([self.encode(self.problems[0], None)], device=self.model.device))
        # Outside the module tree, like the objective's reference: neither trained nor stored.
        object.__setattr__(self, "_shadow", self._make_shadow())

    def _make_shadow(self) -> Any:
        """A frozen teacher of its own, where this model is not it: made before any training."""
        if self.teacher == "reference":  # with LoRA the policy itself, without its adapters
            return self._frozen if self._frozen is not None else self.policy.frozen_copy()
        moves = self.minibatch_size < self.group_size * self.stream.per_step or self.update_epochs > 1
        # With a single optimizer step the old policy is the current one.
        return self.policy.shadow() if self.teacher == "old" and moves else None

    def _frozen_models(self) -> list[Any]:
        models = super()._frozen_models()
        return models if self._shadow is None or self._shadow is self._frozen else [*models, self._shadow]

    def intervene(self, groups: list[Group]) -> list[Group]:
        primed = self.coach(groups, dict.fromkeys(self.triggered(groups), self.references))
        self.keep(groups, primed)
        return groups

    def keep(self, groups: Sequence[Group], primed: Sequence[Primed]) -> None:
        """Remember the primed answers for the optimizer steps of this RL step. Every rank has to call it."""
        self._lessons = [
            Lesson(found.group * self.group_size, groups[found.group].trajectories[0].prompt_ids, answer, weight)
            for found in primed
            for answer in judged(found.trajectories)
            if (weight := self.weight_of(answer)) > 0
        ]
        count = len(self._lessons) if self.average_over == "triggered" else len(groups) * self.references
        total = self._sum_over_ranks(torch.tensor(float(count), device=self.device))
        self._answers = max(1.0, float(total))
        if self.teacher == "old" and self._shadow is not None:
            self.policy.refresh(self._shadow)

    def weight_of(self, answer: Trajectory) -> float:
        """lambda of one primed answer: the base times 3 if it is right and times 0.5 if not (CORE, App. B.1)."""
        assert answer.score is not None
        if self.only_correct_teacher and not answer.score.correct:
            return 0.0
        return self.kl_lambda * (self.lambda_right if answer.score.correct else self.lambda_wrong)

    def auxiliary_losses(self, rows: Tensor) -> Iterator[Tensor]:
        """Each lesson counts in the one optimizer step that has its group's first row.

        A step's lessons are weighed as an estimate of the whole batch's mean, so that neither the cut into minibatches
        nor the number of ranks changes how strong the term is beside the policy loss.
        """
        taken = set(rows.tolist())
        lessons = [x for x in self._lessons if x.row in taken]
        share = self.group_size * self.stream.per_step // self.minibatch_size / self._answers
        # Each lesson is read under both prompts; the longer one says what it takes.
        sizes = [
            Lengths(max(len(x.plain_prompt), len(x.answer.prompt_ids)), len(x.answer.token_ids), i)
            for i, x in enumerate(lessons)
        ]
        parts = [[lessons[i] for i in p.rows] for p in cut(sizes, self.microbatch_size, self.microbatch_tokens, False)]
        idle = self._idle_rounds(len(parts))
        with self.policy.at_hand(self._shadow):
            for part in parts:
                yield self._divergence(part) * share
            for _ in range(idle):
                yield self._divergence([self._idle()]) * 0.0

    def _idle(self) -> Lesson:
        """A lesson without weight, for a rank that keeps step with others: the shortest answer of this RL step."""
        answer = min((t for g in self.last_sampled for t in g.trajectories), key=lambda t: len(t.token_ids))
        return Lesson(-1, answer.prompt_ids, replace(answer, train_mask=(False,) * len(answer.token_ids)), 0.0)

    def _divergence(self, lessons: Sequence[Lesson]) -> Tensor:
        """Sum over these lessons of lambda times the mean (or sum) over tokens of the divergence."""
        student = self._batch([x.plain_prompt for x in lessons], lessons)
        teacher = self._batch([x.answer.prompt_ids for x in lessons], lessons)
        mask = student.train_mask
        weights = torch.tensor([x.weight for x in lessons], device=self.device)
        if self.reduction == "token_mean":
            weights = weights / mask.sum(dim=1).clamp(min=1)
        with torch.no_grad(), self._teaching() as coach:
            primed_states = answer_hidden(coach, teacher)[mask]  # [tokens, hidden size]
        found: list[Divergence] = []

        def read(states: Tensor, head: Head) -> Tensor:
            found.append(divergence(
                states[mask], primed_states, student.answer_ids[mask], weights[:, None].expand_as(mask)[mask],
                head, self._teacher_head(head), direction=self.direction, temperature=self.temperature,
            ))  # fmt: skip
            return found[-1].total.view(1, 1, 1)

        total = answer_read(self.model, student, read).view(())
        self._now.add("core/kl_per_token", float(found[0].per_token.sum()))
        self._now.count("kl tokens", len(found[0].per_token))
        self._now.add_primed_gap(float(found[0].gap.sum()), len(found[0].gap))
        return total

    @contextmanager
    def _teaching(self) -> Iterator[Any]:
        """The teacher, for a pass under the primed prompt."""
        if self.teacher == "reference" and self._shadow is None:
            with self.policy.reference(None) as coach:
                yield coach
        else:
            yield self.model if self._shadow is None else self._shadow

    def _teacher_head(self, head: Head) -> Head:
        """The teacher's own head; ``head``: the policy's, adapters included."""
        if self._shadow is not None:
            return head_of(self._shadow)
        return getattr(head_of(self.model), "base_layer", head) if self.teacher == "reference" else head

    def _batch(self, prompts: Sequence[tuple[int, ...]], lessons: Sequence[Lesson]) -> TokenBatch:
        answers = [x.answer for x in lessons]
        return TokenBatch.build(
            prompts, [a.token_ids for a in answers], [a.sample.logprobs for a in answers],
            [a.train_mask for a in answers], torch.zeros(len(answers)), self.policy.pad_id, self.device,
        )  # fmt: skip
