"""Guards the tiny tokenizer: any text comes back as it went in, and what quizzes are made of is one token each."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from core_torl.model.tiny_tokenizer import build_tokenizer


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet="What is = \\boxed{A}\n-12 \t\r é∑\U0001f600 </s>", max_size=60))
@example("  two  spaces \n\n and a tab\t, \r\n end ")
@example("\u0000 \u2028 \ufeff e\u0301 ﬁ \U0001f468\u200d\U0001f469")
@example("What is the sum of 12 and -34 ? = 5 * x ** 2 // 100 1234 -1234 007")
@example("<s> </s> <pad>")
def test_any_text_comes_back(tiny_tokenizer, text):
    # Two texts stand for something else inside pieces, as in every tokenizer of this family.
    assume("\u2581" not in text and not re.search(r"<0x[0-9A-F]{2}>|<unk>", text))
    assert tiny_tokenizer.decode(ids(tiny_tokenizer, text)) == text


def test_nothing_becomes_unknown(tiny_tokenizer):
    assert tiny_tokenizer.convert_tokens_to_ids("<unk>") not in ids(tiny_tokenizer, "Ωmega \U0001f600 zzz ~ \x07")


@pytest.mark.parametrize("before", ["", "x =", "What\n"])
def test_every_small_integer_after_a_space_is_one_token(tiny_tokenizer, before):
    head = ids(tiny_tokenizer, before)
    tokens = {}
    for n in range(-99, 100):
        found = ids(tiny_tokenizer, f"{before} {n}")
        assert found[: len(head)] == head and len(found) == len(head) + 1, n
        tokens[n] = found[-1]
    assert len(set(tokens.values())) == 199


@pytest.mark.parametrize("letter", "ABCDE")
def test_boxed_letters_are_one_token(tiny_tokenizer, letter):
    assert len(ids(tiny_tokenizer, f"\\boxed{{{letter}}}")) == len(ids(tiny_tokenizer, f" \\boxed{{{letter}}}")) == 1


def test_words_are_one_token_with_and_without_their_space(tiny_tokenizer):
    assert len(ids(tiny_tokenizer, "What is the trace of")) == 5
    assert len(ids(tiny_tokenizer, " trace\nmatrix")) == 3
    assert len(ids(tiny_tokenizer, "traces")) > 1


def test_the_start_token_comes_once_and_the_end_never(tiny_tokenizer):
    encoded = tiny_tokenizer("What is")["input_ids"]
    assert encoded[0] == tiny_tokenizer.bos_token_id == 1 and encoded.count(1) == 1
    assert tiny_tokenizer.eos_token_id not in encoded
    assert tiny_tokenizer.decode(encoded, skip_special_tokens=True) == "What is"
    assert tiny_tokenizer.padding_side == "left" and tiny_tokenizer.pad_token_id == 0


def test_it_survives_saving_and_loading(tiny_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "What is the trace 12 \\boxed{A} \U0001f600 ?"
    assert ids(loaded, text) == ids(tiny_tokenizer, text) and loaded.decode(ids(loaded, text)) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)


def test_the_same_words_give_the_same_tokens():
    one, two = (build_tokenizer(["a", "trace", "a"]).get_vocab() for _ in range(2))
    assert one == two and set(one.values()) == set(range(len(one)))


@pytest.fixture(scope="module")
def digits_tokenizer():
    return build_tokenizer(["What", "is", "print("], whole_integers=False)


@settings(max_examples=100, deadline=None)
@given(
    st.text() | st.text(alphabet="What is = print(12-3)\\boxed{}\n-12 \t\r \u00e9\u2211\U0001f600 </s>", max_size=60)
)
def test_without_whole_integers_any_text_comes_back_too(digits_tokenizer, text):
    assume("\u2581" not in text and not re.search(r"<0x[0-9A-F]{2}>|<unk>", text))
    assert digits_tokenizer.decode(ids(digits_tokenizer, text)) == text


@pytest.mark.parametrize("number", ["7", "57", "1071", "104181"])
def test_without_whole_integers_a_number_has_one_token_a_digit_wherever_it_stands(digits_tokenizer, number):
    digits = [digits_tokenizer.convert_tokens_to_ids(d) for d in number]
    for before, after in (("", ""), ("What is ", " ?"), ("print(", ")"), ("\n", "\n"), ("\\boxed{", "}")):
        found = ids(digits_tokenizer, f"{before}{number}{after}")
        start = next(i for i in range(len(found)) if found[i : i + len(digits)] == digits)
        assert digits_tokenizer.decode(found[:start]) == before


def test_the_vocabulary_of_the_concept_world_is_what_its_shipped_policy_was_trained_on():
    from transformers import AutoTokenizer

    from core_torl.data.prompt import PromptTemplate
    from core_torl.model.load import shipped_folder
    from core_torl.runs.warming_concept import vocabulary

    folder = shipped_folder("tiny")
    shipped = AutoTokenizer.from_pretrained(folder)
    template = PromptTemplate(
        "plain",
        "{concept}Question: {question}\n{options}Answer:",
        "{concept}Question: {question}\nAnswer:",
        "Definition: {text} .\n",
        "{letter}. {text}\n",
    )
    made = build_tokenizer(vocabulary(template.user_text), max_length=2048)
    assert len(shipped) == 763 and made.get_vocab() == shipped.get_vocab()
