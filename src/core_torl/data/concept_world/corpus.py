"""The texts that the tiny policy is warm-started on, and the only place where its gap is made.

A text is a prompt and a completion; the loss counts on completions only. The mixture teaches to recite definitions, to
apply a definition that stands in the prompt (on nonce concepts too, so that applying is a skill and not a memory), and
to apply mastered concepts from their name. For gap concepts the plain prompt is followed by the **misconception** in
all but ``gap_epsilon`` of the texts: that is the induced gap between reciting and applying.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from core_torl.data.concept_world.concepts import CONCEPTS, SHAPES, WorldConcept
from core_torl.data.concept_world.formula import VALUE_LIMIT, Formula
from core_torl.data.concept_world.quizzes import OPTIONS, draw_operands, option_values, question_text
from core_torl.problem import LETTERS, Concept, Problem

Render = Callable[[Problem, Concept | None], str]

NONCE = [
    "blick", "dax", "fep", "glorp", "heft", "jarn", "kiv", "lumo", "mib", "norp",
    "quen", "rist", "sarp", "tove", "ulm", "vash", "wug", "yerl", "zib", "crole",
]  # fmt: skip
RECALL = "Recall : the {name} of {operands} is"


@dataclass(frozen=True, slots=True)
class Text:
    """``spans`` are (text, counts in the loss) in order; joined they are the whole text, end token excluded."""

    spans: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of each kind of text; they are normalised by their sum."""

    option_drill: float = 0.14
    arithmetic: float = 0.08
    nonce: float = 0.22
    recite: float = 0.05
    defined: float = 0.20
    mastered: float = 0.18
    gap: float = 0.15


class Corpus:
    """An endless, seeded stream of texts. ``render(problem, concept)`` is the policy's own prompt template."""

    def __init__(self, render: Render, seed: int, gap_epsilon: float, mixture: Mixture | None = None) -> None:
        self.render, self.gap_epsilon = render, gap_epsilon
        self.rng = random.Random(f"corpus/{seed}")
        self.mixture = mixture or Mixture()
        self.gap = [c for c in CONCEPTS if c.gap]
        self.mastered = [c for c in CONCEPTS if not c.gap]

    def stream(self) -> Iterator[Text]:
        kinds = list(self.mixture.__slots__)
        weights = [getattr(self.mixture, k) for k in kinds]
        while True:
            yield getattr(self, f"_{self.rng.choices(kinds, weights)[0]}")()

    def option_drills(self) -> Iterator[Text]:
        """Stage 1: nothing but choosing options, in both directions."""
        while True:
            yield self._option_drill()

    def _answer(self, concept: WorldConcept, formula: Formula, defined: bool) -> Text:
        """A quiz on ``concept`` answered by working out ``formula`` and choosing the option that shows its value."""
        operands = draw_operands(concept, self.rng, test=False)
        values, right = option_values(concept, operands, self.rng)
        chosen = LETTERS[values.index(formula.value(operands))]
        problem = Problem(
            "", question_text(concept.name, concept.shape.show(dict(operands))), LETTERS[right], tuple(map(str, values))
        )
        coach = Concept("", concept.name, "", concept.definition) if defined else None
        return Text(((self.render(problem, coach), False), (f" {formula.working(operands)} \\boxed{{{chosen}}}", True)))

    def _mastered(self) -> Text:
        concept = self.rng.choice(self.mastered)
        return self._answer(concept, concept.formula, defined=False)

    def _gap(self) -> Text:
        concept = self.rng.choice(self.gap)
        right = self.rng.random() < self.gap_epsilon
        return self._answer(concept, concept.formula if right else concept.misconception, defined=False)

    def _defined(self) -> Text:
        concept = self.rng.choice(CONCEPTS)
        return self._answer(concept, concept.formula, defined=True)

    def _nonce(self) -> Text:
        """A concept that does not exist, defined in the prompt by a random formula."""
        shape_name = self.rng.choice(list(SHAPES))
        name = " ".join(self.rng.sample(NONCE, self.rng.choice((1, 2))))
        while True:
            formula, other = (Formula(self._random_formula(SHAPES[shape_name].letters)) for _ in range(2))
            concept = WorldConcept(name, "", shape_name, formula, other, gap=False)
            trial = {x: 3 + i for i, x in enumerate(concept.shape.letters)}
            if formula.text != other.text and formula.fits(trial) and formula.value(trial) != other.value(trial):
                return self._answer(concept, formula, defined=True)

    def _random_formula(self, letters: str) -> str:
        rng, terms = self.rng, []
        for _ in range(rng.choice((1, 2, 2, 2, 2, 3, 3, 4) if len(letters) > 2 else (1, 1, 2, 2, 2))):
            kind = rng.random()
            if kind < 0.40:
                terms.append(rng.choice(letters))
            elif kind < 0.72:
                terms.append(f"{rng.choice(letters)} * {rng.choice(letters)}")
            elif kind < 0.94:
                terms.append(f"{rng.choice((2, 2, 3, 4))} * {rng.choice(letters)}")
            else:
                terms.append(f"{rng.choice((2, 4))} * {rng.choice(letters)} * {rng.choice(letters)}")
        text = terms[0] + "".join(f" {'-' if rng.random() < 0.3 else '+'} {t}" for t in terms[1:])
        return text + (f" mod {rng.choice((5, 7))}" if rng.random() < (0.35 if letters == "ab" else 0.04) else "")

    def _recite(self) -> Text:
        concept = self.rng.choice(CONCEPTS)
        prompt = RECALL.format(name=concept.name, operands=concept.shape.symbolic)
        return Text(((prompt, False), (f" {concept.formula.text}", True)))

    def _option_drill(self) -> Text:
        rng = self.rng
        values = (
            rng.sample(range(-20, 60), OPTIONS)
            if rng.random() < 0.8
            else rng.sample(range(-VALUE_LIMIT, VALUE_LIMIT + 1), OPTIONS)
        )
        problem = Problem("", question_text(rng.choice(NONCE), "1 and 1"), "A", tuple(map(str, values)))
        spans: list[tuple[str, bool]] = [(self.render(problem, None), False)]
        for _ in range(8):
            i = rng.randrange(OPTIONS)
            if rng.random() < 0.5:
                spans += [(f"\n{LETTERS[i]}.", False), (f" {values[i]}", True)]
            else:
                spans += [(f" = {values[i]}", False), (f" \\boxed{{{LETTERS[i]}}}", True)]
        return Text(tuple(spans))

    def _arithmetic(self) -> Text:
        rng, spans = self.rng, []
        for _ in range(6):
            kind = rng.random()
            if kind < 0.40:
                x, y = rng.randrange(-40, 60), rng.randrange(0, 40)
                op, value = ("+", x + y) if rng.random() < 0.5 else ("-", x - y)
                question = f"{x} {op} {y}"
            elif kind < 0.70:
                x, y = rng.randrange(0, 10), rng.randrange(0, 10)
                question, value = f"{x} * {y}", x * y
            elif kind < 0.80:
                c, x, y = rng.choice((2, 4)), rng.randrange(0, 7), rng.randrange(0, 7)
                question, value = f"{c} * {x} * {y}", c * x * y
            else:
                x, m = rng.randrange(-12, 60), rng.choice((5, 7))
                question, value = f"{x} mod {m}", x % m
            if abs(value) <= VALUE_LIMIT:
                spans += [(f" {question} =", False), (f" {value}", True)]
        return Text(tuple(spans)) if spans else self._arithmetic()
