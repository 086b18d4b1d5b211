"""``data=concept_world``: training quizzes and test sets drawn from the embedded world."""

from __future__ import annotations

import random
from collections.abc import Sequence

from core_torl.config.errors import nearest
from core_torl.data.base import ProblemSets
from core_torl.data.concept_world.concepts import CONCEPTS, SECTIONS, WorldConcept
from core_torl.data.concept_world.quizzes import make_quizzes, redraw_quiz
from core_torl.problem import Problem

TAGS = ("gap", "mastered")


class ConceptWorld:
    """Quizzes on the concepts of the embedded world.

    ``split``: "operands" trains on every concept and tests on operands that no training quiz has; "concepts" also keeps
    a seeded share ``hold_out_concepts`` of the concepts out of training. Sections in ``hold_out_sections`` are out
    either way. Test sets are named ``gap`` and ``mastered`` and, for held-out concepts, ``gap_unseen`` and
    ``mastered_unseen``. ``mastered_share`` of the training quizzes are on mastered concepts where both are trained on.
    """

    def __init__(
        self,
        split: str = "operands",
        hold_out_sections: Sequence[str] = (),
        hold_out_concepts: float = 0.2,
        train_tags: Sequence[str] = TAGS,
        mastered_share: float = 0.25,
        train_per_concept: int = 200,
        test_per_concept: int = 8,
        seed: int = 0,
    ) -> None:
        if split not in ("operands", "concepts"):
            raise ValueError(f"data.split={split!r}: use operands or concepts")
        for section in hold_out_sections:
            if section not in SECTIONS:
                raise ValueError(f"data.hold_out_sections: no section {section!r}.{nearest(section, SECTIONS)}")
        if not train_tags or any(t not in TAGS for t in train_tags):
            raise ValueError(f"data.train_tags={list(train_tags)}: name gap, mastered or both")
        if not 0 < hold_out_concepts < 1:
            raise ValueError(f"data.hold_out_concepts={hold_out_concepts}: must lie between 0 and 1")
        if not 0 <= mastered_share < 1:
            raise ValueError(f"data.mastered_share={mastered_share}: must lie in [0, 1)")
        if train_per_concept < 1 or test_per_concept < 1:
            raise ValueError("data.train_per_concept and data.test_per_concept must be at least 1")
        self.split, self.hold_out_sections, self.hold_out_concepts = split, tuple(hold_out_sections), hold_out_concepts
        self.train_tags, self.mastered_share, self.seed = tuple(train_tags), mastered_share, seed
        self.train_per_concept, self.test_per_concept = train_per_concept, test_per_concept

    def _held_out(self) -> set[str]:
        out = {c.uid for c in CONCEPTS if c.section in self.hold_out_sections}
        if self.split == "concepts":
            rng = random.Random(f"{self.seed}/held-out")
            for gap in (True, False):  # the same share of either kind
                kind = [c.uid for c in CONCEPTS if c.gap is gap]
                out.update(rng.sample(kind, max(1, round(self.hold_out_concepts * len(kind)))))
        return out

    def load(self) -> ProblemSets:
        out = self._held_out()
        known = [c for c in CONCEPTS if c.uid not in out]
        train = self._train([c for c in known if c.gap], [c for c in known if not c.gap])
        if not train:
            raise ValueError("data: no concept is left to train on; hold out fewer sections or widen data.train_tags")
        test: dict[str, list[Problem]] = {}
        for suffix, concepts in (("", known), ("_unseen", [c for c in CONCEPTS if c.uid in out])):
            for tag, gap in (("gap", True), ("mastered", False)):
                chosen = [c for c in concepts if c.gap is gap]
                if chosen:
                    test[tag + suffix] = make_quizzes(chosen, self.test_per_concept, self.seed, "test", test=True)
        report = {
            "concepts": len(CONCEPTS), "held_out_concepts": sorted(out), "train": len(train),
            **{f"test/{name}": len(quizzes) for name, quizzes in test.items()},
        }  # fmt: skip
        return ProblemSets(train=train, test=test, report=report, redraw=redraw_quiz)

    def _train(self, gap: list[WorldConcept], mastered: list[WorldConcept]) -> list[Problem]:
        wanted = {
            "gap": gap if "gap" in self.train_tags else [],
            "mastered": mastered if "mastered" in self.train_tags else [],
        }
        quizzes = {
            tag: make_quizzes(c, self.train_per_concept, self.seed, "train", test=False) for tag, c in wanted.items()
        }
        if quizzes["gap"] and quizzes["mastered"]:
            count = round(len(quizzes["gap"]) * self.mastered_share / (1 - self.mastered_share))
            rng = random.Random(f"{self.seed}/mastered-share")
            quizzes["mastered"] = rng.sample(quizzes["mastered"], min(count, len(quizzes["mastered"])))
        return [*quizzes["gap"], *quizzes["mastered"]]
