"""CORE-KL: the policy under the plain prompt is drawn towards itself under the primed one (CORE, its method KL).

On a failed group, answers ``y*`` are sampled with the concept before the question. Beside the GRPO loss stands
``lambda * sum_t KL(p(.|p_c, y*_<t) || p(.|q, y*_<t))``, over the whole vocabulary; nothing is replaced. The teacher,
the primed side, gives no gradient. In the released code this term has no gradient at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core_torl.config.coach_checks import check_choice
from core_torl.objective.distillation import divergence
from core_torl.objective.hidden import answer_hidden, check_head, head_of
from core_torl.objective.token_batch import TokenBatch
from core_torl.trajectory import Group, Trajectory
from core_torl.variant.coached import Coached, Primed, judged


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
        """A frozen teacher of its own, where the current policy is not it: made before any training."""
        if self.teacher == "reference":
            return self._frozen if self._frozen is not None else self.policy.shadow(adapters=False)
        moves = self.minibatch_size < self.group_size * self.stream.per_step or self.update_epochs > 1
        # With a single optimizer step the old policy is the current one.
        return self.policy.shadow() if self.teacher == "old" and moves else None

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
        lessons = sorted((x for x in self._lessons if x.row in taken), key=lambda x: len(x.answer.token_ids))
        cuts = self.group_size * self.stream.per_step // self.minibatch_size
        for start in range(0, len(lessons), self.microbatch_size):
            yield self._divergence(lessons[start : start + self.microbatch_size]) * (cuts / self._answers)

    def _divergence(self, lessons: Sequence[Lesson]) -> Tensor:
        """Sum over these lessons of lambda times the mean (or sum) over tokens of the divergence."""
        student = self._batch([x.plain_prompt for x in lessons], lessons)
        teacher = self._batch([x.answer.prompt_ids for x in lessons], lessons)
        mask = student.train_mask
        weights = torch.tensor([x.weight for x in lessons], device=self.device)
        if self.reduction == "token_mean":
            weights = weights / mask.sum(dim=1)
        model, coach = self.model, self.model if self._shadow is None else self._shadow
        with torch.no_grad():
            primed_states = answer_hidden(coach, teacher)[mask]  # [tokens, hidden size]
        states = answer_hidden(model, student)[mask]
        found = divergence(
            states, primed_states, student.answer_ids[mask], weights[:, None].expand_as(mask)[mask],
            head_of(model), head_of(coach), direction=self.direction, temperature=self.temperature,
        )  # fmt: skip
        self._now.add("core/kl_per_token", float(found.per_token.sum()))
        self._now.count("kl tokens", len(found.per_token))
        self._now.add_primed_gap(float(found.gap.sum()), len(found.gap))
        return found.total

    def _batch(self, prompts: Sequence[tuple[int, ...]], lessons: Sequence[Lesson]) -> TokenBatch:
        answers = [x.answer for x in lessons]
        return TokenBatch.build(
            prompts, [a.token_ids for a in answers], [a.sample.logprobs for a in answers],
            [a.train_mask for a in answers], torch.zeros(len(answers)), self.policy.pad_id, self.device,
        )  # fmt: skip
