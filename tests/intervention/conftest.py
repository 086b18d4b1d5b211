"""Quizzes of the embedded world and two ways to encode them: as plain text and through a chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from core_torl.data.concept_world.source import ConceptWorld
from core_torl.data.prompt import PromptTemplate
from core_torl.model.tiny_tokenizer import build_tokenizer
from core_torl.problem import Concept, Problem

PLAIN = PromptTemplate(
    "plain", "{concept}Question: {question}\n{options}Answer:", "{concept}{question}", "Definition: {text} .\n",
    "{letter}. {text}\n",
)  # fmt: skip
CHAT = replace(PLAIN, style="chat", system="Be brief.")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}|{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant|{% endif %}"
)
NAMES = (
    "expert_prefix", "filler", "generic_hint", "none", "random_concept", "same_section_concept", "true_concept",
    "worked_solution",
)  # fmt: skip


def quiz(uid: str, concept: Concept | None, solution: str | None = "one , so \\boxed{A}") -> Problem:
    """Every quiz has the same stem: only its uid tells it from the others."""
    return Problem(uid, "What is it ?", "A", ("1", "2"), concept, solution)


def concept(uid: str, section: str = "s", text: str = "") -> Concept:
    return Concept(uid, f"name of {uid}", section, text or f"text of {uid}")


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    return ConceptWorld(train_per_concept=2, test_per_concept=1).load().train


@pytest.fixture(scope="session")
def tokenizer(problems: list[Problem]) -> Any:
    """Each word of the quizzes, of a filler and of a hint is one token."""
    texts = [PLAIN.user_text(p, p.concept) for p in problems] + [p.solution or "" for p in problems]
    more = ["the answer is one of the options and Recall the definition first ."]
    words = {w for text in [*texts, *more] for w in text.split() if not w.lstrip("-").isdigit()}
    made = build_tokenizer(sorted(words))
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session", params=[PLAIN, CHAT], ids=["plain", "chat"])
def template(request: pytest.FixtureRequest) -> PromptTemplate:
    return request.param


@pytest.fixture(scope="session")
def encode(template: PromptTemplate, tokenizer: Any) -> Callable[[Problem, Concept | None], tuple[int, ...]]:
    return partial(template.encode, tokenizer)


@pytest.fixture(scope="session")
def encode_answer(template: PromptTemplate, tokenizer: Any) -> Callable[[str], tuple[int, ...]]:
    return partial(template.encode_answer, tokenizer)


def no_answer(text: str) -> tuple[int, ...]:
    raise AssertionError("this intervention has no business with answers")
