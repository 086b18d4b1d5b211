"""Guards the layout of a batch: what goes in comes out at its place, and selecting rows cuts nothing but padding."""

from __future__ import annotations

import pytest
import torch

from core_torl.objective.token_batch import TokenBatch

PROMPTS, ANSWERS = [(5, 6, 7), (8,)], [(9, 10), (11, 12, 13)]
LOGPROBS, MASKS = [(-1.0, -2.0), (-3.0, -4.0, -5.0)], [(True, True), (True, False, True)]


def build(**changes) -> TokenBatch:
    parts = {"prompts": PROMPTS, "answers": ANSWERS, "logprobs": LOGPROBS, "masks": MASKS} | changes
    return TokenBatch.build(**parts, advantages=torch.tensor([1, -1]), pad_id=99)


def test_the_layout():
    batch = build()
    assert batch.ids.tolist() == [[5, 6, 7, 9, 10, 99], [99, 99, 8, 11, 12, 13]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert batch.positions[0, :5].tolist() == [0, 1, 2, 3, 4] and batch.positions[1, 2:].tolist() == [0, 1, 2, 3]
    assert batch.answer_ids.tolist() == [[9, 10, 99], [11, 12, 13]]
    assert batch.train_mask.tolist() == [[True, True, False], [True, False, True]]
    assert batch.sampled_logprobs.tolist() == [[-1, -2, 0], [-3, -4, -5]]
    assert batch.advantages.tolist() == [1, -1] and batch.advantages.dtype == torch.float32
    assert (batch.rows, batch.answer_length) == (2, 3)
    assert batch.old_logprobs is None and batch.reference_logprobs is None


def test_behaviours_say_which_rows_came_from_another_prompt():
    for behaviours, foreign, guided in (
        (None, [False, False], [False, False]),
        (["policy", "recompute"], [False, True], [False, False]),
        (["guided", "policy"], [True, False], [True, False]),
    ):
        batch = build(behaviours=behaviours)
        assert (batch.foreign.tolist(), batch.guided.tolist()) == (foreign, guided)


def row(batch: TokenBatch, i: int) -> dict[str, list]:
    """What row ``i`` says once its padding is taken off."""
    real, width = batch.attention_mask[i].bool(), batch.ids.shape[1] - batch.answer_length
    answer = real[width:]
    sides = {"train": batch.train_mask, "sampled": batch.sampled_logprobs, "old": batch.old_logprobs}
    return {
        "prompt": batch.ids[i, :width][real[:width]].tolist(),
        "answer": batch.answer_ids[i][answer].tolist(),
        "positions": batch.positions[i][real].tolist(),
        "advantage": batch.advantages[i].item(),
        "prompt of another": (batch.foreign[i].item(), batch.guided[i].item()),
        **{name: None if side is None else side[i][answer].tolist() for name, side in sides.items()},
    }


@pytest.mark.parametrize("rows", [[0], [3], [4, 1], [6, 5, 4, 3, 2, 1, 0], [2, 2], slice(1, 4), slice(0, 7)], ids=str)
def test_selected_rows_are_the_same_rows_with_less_padding(make_batch, rows):
    batch = make_batch()
    batch.old_logprobs = batch.sampled_logprobs - 1
    batch.foreign, batch.guided = torch.tensor([[0, 1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 1]]).bool()
    part = batch.select(torch.tensor(rows) if isinstance(rows, list) else rows)
    chosen = list(range(7))[rows] if isinstance(rows, slice) else rows
    assert [row(part, i) for i in range(part.rows)] == [row(batch, i) for i in chosen]
    prompts, answers = [3, 11, 6, 1, 8, 5, 9], [5, 2, 12, 7, 1, 9, 4]
    assert part.answer_length == max(answers[i] for i in chosen)
    assert part.ids.shape[1] == part.answer_length + max(prompts[i] for i in chosen)
    assert part.reference_logprobs is None
    assert row(batch, 2)["positions"] == list(range(18)), "the whole batch is left as it was"


def test_rows_by_mask_and_by_number_are_the_same(make_batch):
    batch = make_batch()
    keep = batch.advantages != 0
    by_mask, by_number = batch.select(keep), batch.select(keep.nonzero().flatten())
    assert by_mask.rows == 5 and torch.equal(by_mask.ids, by_number.ids)


def test_answers_without_a_token_still_make_a_batch():
    batch = TokenBatch.build([(5,), (6,)], [(), ()], [(), ()], [(), ()], torch.zeros(2), pad_id=0)
    assert batch.ids.tolist() == [[5, 0], [6, 0]] and not batch.train_mask.any()
    assert batch.select(slice(0, 1)).ids.tolist() == [[5, 0]]


@pytest.mark.parametrize(
    "changes",
    [
        {"logprobs": [(-1.0,), (-3.0, -4.0, -5.0)]},
        {"masks": [(True, True, True), (True, False, True)]},
    ],
)
def test_a_row_whose_lengths_disagree_is_named(changes):
    with pytest.raises(ValueError, match="row 0: 2 ids") as error:
        build(**changes)
    assert "\n" not in str(error.value)


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        build(masks=MASKS[:1])
