"""Guards the table of growing answers: every row stands in exactly one living place, beside rows of its own prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core_torl.sampler.protocol import SampleRequest, SamplingConfig
from core_torl.sampler.rows import Rows, pack
from core_torl.sampler.stops import StopFinder

groups = st.dictionaries(st.integers(0, 50), st.integers(1, 40), min_size=1, max_size=12)


def numbered(counts: dict[int, int]) -> dict[int, list[int]]:
    """Rows numbered through the requests, as ``Rows.active`` gives them."""
    rows, start = {}, 0
    for request in sorted(counts):
        rows[request] = list(range(start, start + counts[request]))
        start += counts[request]
    return rows


@given(groups, st.integers(0, 20))
def test_every_row_has_one_living_place_in_a_block_of_its_request(counts, extra):
    rows = numbered(counts)
    packing = pack(rows, max(counts.values()) + extra)
    assert len(packing.places) == len(packing.live) == len(packing.blocks) * packing.per_block
    living = packing.places[packing.live].tolist()
    assert sorted(living) == [row for part in rows.values() for row in part]
    for block, request in enumerate(packing.blocks.tolist()):
        own = slice(block * packing.per_block, (block + 1) * packing.per_block)
        assert set(packing.places[own].tolist()) <= set(rows[request]), "a filler must be a row of the same prompt"
        assert packing.live[own].any(), "no block is only fillers"


@given(groups)
def test_packing_never_costs_more_than_one_row_a_block(counts):
    packing = pack(numbered(counts), max(counts.values()))
    assert len(packing.places) + 0.5 * len(packing.blocks) <= 1.5 * sum(counts.values())


@pytest.mark.parametrize(
    ("counts", "per_block", "blocks"),
    [
        ([8, 8, 8], 8, 3),  # whole groups: each prompt once
        ([7, 7], 7, 2),  # a size that is no power of two
        ([1, 1, 1, 1], 1, 4),  # one survivor a group: no empty places
        ([1, 1, 8], 1, 10),  # blocks of 8 would leave 14 of 24 places empty
        ([16, 15, 16], 16, 3),  # one empty place is cheaper than more copies of the prompt
    ],
)
def test_block_sizes(counts, per_block, blocks):
    packing = pack(numbered(dict(enumerate(counts))), max(counts))
    assert (packing.per_block, len(packing.blocks)) == (per_block, blocks)


def test_rows_record_what_was_drawn_and_forget_who_has_ended(tiny_tokenizer):
    requests = [SampleRequest((5,), 2, 0), SampleRequest((6,), 1, 0)]
    rows = Rows(requests, SamplingConfig(3), StopFinder(tiny_tokenizer), [2])
    assert rows.active() == {0: [0, 1], 1: [2]}
    ended = rows.record(torch.tensor([0, 1, 2]), torch.tensor([9, 2, 8]), torch.tensor([-1.0, -2.0, -3.0]))
    assert ended == [1] and rows.running.tolist() == [True, False, True]
    assert rows.active() == {0: [0, 1], 1: [2]}  # a row that waits may be resumed
    rows.gone[1] = True
    assert rows.active() == {0: [0], 1: [2]}
    rows.record(torch.tensor([2, 0]), torch.tensor([7, 6]), torch.tensor([-4.0, -5.0]))
    rows.record(torch.tensor([0, 2]), torch.tensor([5, 2]), torch.tensor([-6.0, -7.0]))
    (first, second), (third,) = rows.samples(requests, "v")
    assert (first.token_ids, first.logprobs, first.finish, first.stop) == (
        (9, 6, 5),
        (-1.0, -5.0, -6.0),
        "length",
        None,
    )
    assert (second.token_ids, second.logprobs, second.finish, second.stop) == ((2,), (-2.0,), "eos", 2)
    assert (third.token_ids, third.finish, third.weight_version) == ((8, 7, 2), "eos", "v")


def test_a_stop_string_of_many_bytes_is_found_across_tokens(tiny_tokenizer):
    """Characters outside the vocabulary are spelled in bytes; the end is found on the last byte, not before."""
    text = "x \U0001f600é"
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) >= 7
    rows = Rows([SampleRequest((5,), 1, 0)], SamplingConfig(20, stop=("é",)), StopFinder(tiny_tokenizer), [2])
    for step, i in enumerate(ids):
        ended = rows.record(torch.tensor([0]), torch.tensor([i]), torch.tensor([-1.0]))
        assert ended == ([0] if step == len(ids) - 1 else [])
    assert rows.finish[0] == ("stop", "é")
