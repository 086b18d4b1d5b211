"""A stop string is found at the very token in which it ends, and skipping tokens never hides one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from core_torl.sampler.stops import StopFinder

STOPS = ("```output", "\n\n", "é!", " the", "e")


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="`output \né!the1", max_size=30), stops=st.sets(st.sampled_from(STOPS), min_size=1))
def test_nothing_is_missed(tiny_tokenizer, text, stops):
    """Against decoding everything after every token."""
    finder, chosen = StopFinder(tiny_tokenizer), tuple(sorted(stops))
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    for n in range(1, len(ids) + 1):
        whole = tiny_tokenizer.decode(ids[:n])
        expected = next((s for s in chosen if s in whole), None)
        assert finder.find(ids[:n], chosen) == expected
        if expected:
            break


def test_most_tokens_need_no_look(tiny_tokenizer):
    finder = StopFinder(tiny_tokenizer)
    looks = sum(finder.may_end(i, ("```output",)) for i in range(len(tiny_tokenizer)))
    assert looks < len(tiny_tokenizer) / 2
    assert finder.may_end(tiny_tokenizer("```output", add_special_tokens=False)["input_ids"][0], ("```output",))
