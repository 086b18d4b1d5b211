"""Guards prompts: a primed prompt differs from the plain one by the concept alone, and questions survive as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core_torl.data.concept_world.source import ConceptWorld
from core_torl.data.prompt import PromptTemplate
from core_torl.problem import Concept, Problem

CONF = Path(__file__).parents[2] / "conf" / "model" / "prompt"
SHIPPED = sorted(p.stem for p in CONF.glob("*.yaml"))
CONCEPT = Concept("s/c", "norm", "s", r"the norm $\|x\|$ is \sqrt{{x}^2} {question}")
QUIZ = Problem("q", r"What is $\frac{1}{2}$ {options} {concept} {last} {0} {}?", "B", ("{text}", r"\{1\}", "{letter}"))
OPEN = Problem("o", "Compute {1, 2} {question}.", "3")


def shipped(name: str) -> PromptTemplate:
    fields = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    return PromptTemplate(**{k: v for k, v in fields.items() if k != "defaults"})


def template(**changes) -> PromptTemplate:
    parts = {
        "style": "plain",
        "choice": "{concept}Q {question} ({options}) up to {last}",
        "open": "{concept}Q {question}",
        "concept": "[{name}: {text}] ",
        "option": "{letter}={text};",
    }
    return PromptTemplate(**parts | changes)


def test_both_layouts_are_filled_in():
    assert template().user_text(QUIZ) == "Q " + QUIZ.question + r" (A={text};B=\{1\};C={letter};) up to C"
    assert template().user_text(OPEN) == "Q Compute {1, 2} {question}."
    assert template().user_text(OPEN, CONCEPT) == "[norm: " + CONCEPT.text + "] Q Compute {1, 2} {question}."


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("problem", [QUIZ, OPEN], ids=["choice", "open"])
def test_only_the_concept_differs_between_plain_and_primed(name, problem):
    shipped_template = shipped(name)
    plain, primed = shipped_template.user_text(problem), shipped_template.user_text(problem, CONCEPT)
    inserted = shipped_template.concept.format(text=CONCEPT.text, name=CONCEPT.name)
    assert CONCEPT.text in inserted and CONCEPT.text not in plain
    assert primed.count(inserted) == 1 and primed.replace(inserted, "") == plain


@pytest.mark.parametrize("name", SHIPPED)
def test_questions_and_options_survive_as_they_are(name):
    text = shipped(name).user_text(QUIZ, CONCEPT)
    assert text.count(QUIZ.question) == 1
    assert all(option in text for option in QUIZ.options)
    assert "\x00" not in text and text.index(CONCEPT.text) < text.index(QUIZ.question)


def test_plain_style_is_the_text_with_the_tokenizers_own_start(tiny_tokenizer):
    ids = template().encode(tiny_tokenizer, OPEN)
    assert isinstance(ids, tuple) and ids[0] == tiny_tokenizer.bos_token_id
    assert ids.count(tiny_tokenizer.bos_token_id) == 1 and tiny_tokenizer.eos_token_id not in ids
    assert tiny_tokenizer.decode(list(ids[1:])) == template().user_text(OPEN)


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}|{{ m.content }}#{% endfor %}"
    "{% if add_generation_prompt %}assistant|{% endif %}"
)


@pytest.mark.parametrize(("system", "start"), [("", "user|"), ("Be brief.", "system|Be brief.#user|")])
def test_chat_style_goes_through_the_tokenizers_template_once(tiny_tokenizer, monkeypatch, system, start):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    ids = template(style="chat", system=system).encode(tiny_tokenizer, QUIZ, CONCEPT)
    assert ids.count(tiny_tokenizer.bos_token_id) == 1, "the template writes the start token; it must not come twice"
    text = template().user_text(QUIZ, CONCEPT)
    assert tiny_tokenizer.decode(list(ids[1:])) == f"{start}{text}#assistant|"


@pytest.fixture(scope="module")
def shipped_tokenizer():
    from transformers import AutoTokenizer

    from core_torl.model.load import shipped_folder

    return AutoTokenizer.from_pretrained(shipped_folder("tiny"), local_files_only=True)


def test_a_given_answer_follows_its_prompt_as_if_both_were_one_text(shipped_tokenizer):
    """Prompt ids and answer ids together are the ids of the whole text, so a solution is trained as it is sampled."""
    tiny, problems = shipped("tiny"), ConceptWorld(train_per_concept=1, test_per_concept=1).load().train
    for problem in problems:
        for concept in (None, problem.concept):
            ids = tiny.encode(shipped_tokenizer, problem, concept)
            answer = tiny.encode_answer(shipped_tokenizer, problem.solution)
            whole = shipped_tokenizer(f"{tiny.user_text(problem, concept)} {problem.solution}")["input_ids"]
            assert ids + answer == tuple(whole)
            assert not set(answer) & {shipped_tokenizer.bos_token_id, shipped_tokenizer.eos_token_id}


def test_a_given_answer_in_a_chat_starts_where_the_assistant_does(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT.replace("assistant|", "assistant|\n"))
    chat = template(style="chat")
    ids, answer = chat.encode(tiny_tokenizer, QUIZ), chat.encode_answer(tiny_tokenizer, "the sum is 3")
    assert tiny_tokenizer.decode(list(answer)) == "the sum is 3"
    assert tiny_tokenizer.decode(list(ids[1:] + answer)).endswith("assistant|\nthe sum is 3")
    assert tiny_tokenizer.bos_token_id not in answer


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_the_concept_is_the_only_difference_in_token_ids(tiny_tokenizer, monkeypatch, style):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    layout = template(style=style, choice="{concept}\nQ {question} {options}", concept="\nknow: {text}")
    plain, primed = layout.encode(tiny_tokenizer, QUIZ), layout.encode(tiny_tokenizer, QUIZ, CONCEPT)
    text = tuple(tiny_tokenizer(f"\nknow: {CONCEPT.text}", add_special_tokens=False)["input_ids"])
    (start,) = [i for i in range(len(primed)) if primed[i : i + len(text)] == text]
    assert primed[:start] + primed[start + len(text) :] == plain


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"style": "raw"}, "model.prompt.style='raw': use plain, bare or chat"),
        ({"choice": "{question} {options}"}, "model.prompt.choice lacks {concept}"),
        ({"choice": "{concept} {options}"}, "model.prompt.choice lacks {question}"),
        ({"choice": "{concept} {question}"}, "model.prompt.choice lacks {options}"),
        ({"open": "{question}"}, "model.prompt.open lacks {concept}"),
        ({"open": "{concept}"}, "model.prompt.open lacks {question}"),
    ],
)
def test_a_template_that_would_lose_something_is_refused(changes, text):
    with pytest.raises(ValueError) as error:
        template(**changes)
    assert text in str(error.value) and "\n" not in str(error.value)


# ToRL, Figure 3 and template tir_base_0309 of the released code, in which the text ends with a line feed.
TORL_0309 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
    "User: Please integrate natural language reasoning with programs to solve the problem above, and put your final "
    "answer within \\boxed{}.\n"
    "Let $S = \\{1, \\frac{1}{2}, {question}\\}$.\nFind {} and {concept}.\n"
    "Assistant:\n"
)


def test_torls_template_is_the_published_one_byte_for_byte(tiny_tokenizer):
    problem = Problem("t", "Let $S = \\{1, \\frac{1}{2}, {question}\\}$.\nFind {} and {concept}.", "3")
    torl = shipped("torl_0309")
    assert torl.user_text(problem).encode() == TORL_0309.encode()
    assert torl.style == "bare" and not torl.system
    assert torl.encode(tiny_tokenizer, problem) == tuple(
        tiny_tokenizer(TORL_0309, add_special_tokens=False)["input_ids"]
    )


def test_bare_style_adds_no_token_at_all(tiny_tokenizer):
    plain, bare = template().encode(tiny_tokenizer, OPEN), template(style="bare").encode(tiny_tokenizer, OPEN)
    assert plain == (tiny_tokenizer.bos_token_id, *bare), "this tokenizer starts a text with a token of its own"
    answer = template(style="bare").encode_answer(tiny_tokenizer, "the sum is 3")
    assert tiny_tokenizer.decode(list(answer)) == "the sum is 3"


def test_cores_template_is_the_published_one_byte_for_byte():
    """Every prompt of the published training file, from the published quizzes: none of 1,110 differs by a byte."""
    import os

    shared = Path(os.environ.get("CORE_TORL_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data/core"
    if not (shared / "train.parquet").exists():
        pytest.skip(f"the published files are not at {shared}; set CORE_TORL_SHARED to the folder that holds data/core")
    import pyarrow.parquet

    from core_torl.data.core_quizzes import read_rows

    prompts = pyarrow.parquet.read_table(shared / "train.parquet")["prompt"].to_pylist()
    core, rows = shipped("core"), read_rows(str(shared / "concept_quizzes.jsonl"))
    for row, (system, user) in zip(rows, prompts, strict=True):
        problem = Problem(f"row-{row.index}", row.stem, "A", tuple(row.option_texts))
        assert (core.system, core.user_text(problem)) == (system["content"], user["content"])
    concept = Concept("c", "C", "s", rows[0].concept_text)
    quoted = f"---\nRelated Concept: {concept.text}\n\nQuestion: {rows[0].stem}"
    assert quoted in core.user_text(Problem("q", rows[0].stem, "A", ("1", "2")), concept)


def test_the_end_of_a_turn_is_the_special_token_behind_an_answer(tiny_tokenizer, monkeypatch):
    assert template().end_of_turn(tiny_tokenizer) is None, "only a chat has turns"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT)
    assert template(style="chat").end_of_turn(tiny_tokenizer) is None, "a plain character ends no answer"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHAT.replace("#", "{{ eos_token }}"))
    assert template(style="chat").end_of_turn(tiny_tokenizer) == tiny_tokenizer.eos_token
