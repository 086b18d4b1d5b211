"""CORE-CR: concept-primed answers take the place of failed ones (CORE, its method CR).

When all N answers to a quiz are wrong, K answers are sampled with the concept before the question. They replace K of
the failed ones, earn a bonus, and the advantages are taken over the group as it is then. The row that is trained is
built anew from token ids, the plain prompt and the primed answer with its end token, before any log-prob is computed;
in the released code the primed text never reaches the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from core_torl.config.coach_checks import check_choice
from core_torl.trajectory import Behaviour, Group, Trajectory
from core_torl.variant.coached import Coached, Primed, judged
from core_torl.variant.policy_gradient import stream_seed
from core_torl.variant.replacement import choose, with_bonus


class CoreCR(Coached):
    """GRPO on groups in which primed answers stand for failed ones; the keys stand in ``conf/variant/core_cr.yaml``.

    Raises:
        ValueError: a value is unknown or two of them contradict each other; the message names the keys.
    """

    def __init__(
        self,
        *,
        replaced: int = 2,
        bonus: float = 0.4,
        bonus_when: str = "always",
        replace_policy: str = "random",
        train_prompt: str = "plain",
        behaviour: Behaviour = "recompute",
        require_success: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        for key, value in (
            ("bonus_when", bonus_when), ("replace_policy", replace_policy), ("train_prompt", train_prompt),
            ("behaviour", behaviour),
        ):  # fmt: skip
            check_choice(key, value)
        self.replaced, self.bonus, self.bonus_when = replaced, bonus, bonus_when
        self.replace_policy, self.train_prompt, self.behaviour = replace_policy, train_prompt, behaviour
        self.require_success = require_success

    def intervene(self, groups: list[Group]) -> list[Group]:
        primed = self.coach(groups, dict.fromkeys(self.triggered(groups), self.replaced))
        return self.replace(groups, primed)

    def replace(self, groups: list[Group], primed: Sequence[Primed]) -> list[Group]:
        """The groups with primed answers in the place of failed ones; the others stay as they are."""
        groups = list(groups)
        for found in primed:
            answers = judged(found.trajectories)
            group = groups[found.group]
            seed = stream_seed(self.seed, "replace", self.rl_step, group.problem.uid, self.place(found.group))
            places = choose(group.trajectories, len(answers), self.replace_policy, seed)
            answers = answers[: len(places)]
            if self.require_success and not any(t.score and t.score.correct for t in answers):
                continue
            rows = list(group.trajectories)
            for place, answer in zip(places, answers, strict=True):
                rows[place] = self._row(rows[place], answer)
                self._now.add("core/replaced_tokens", len(answer.token_ids))
            groups[found.group] = Group(group.problem, rows)
        return groups

    def _row(self, failed: Trajectory, answer: Trajectory) -> Trajectory:
        """The primed answer as a row of the group: its own token ids behind the prompt that is to be trained."""
        assert answer.score is not None
        score = with_bonus(answer.score, self.bonus, self.bonus_when)
        if self.train_prompt == "primed":
            return replace(answer, score=score)
        return replace(answer, prompt_ids=failed.prompt_ids, score=score, behaviour=self.behaviour)
