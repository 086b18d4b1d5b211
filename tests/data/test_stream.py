"""Guards the order of problems: every pass meets each of them once, and any step can be computed without the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_torl.data.stream import PromptStream, StepIndices


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**31))
def test_every_pass_is_a_permutation(size, per_step, seed):
    stream = PromptStream(size, per_step, seed)
    steps = -(-3 * size // per_step)
    drawn = [i for step in range(steps) for i in stream.at(step)]
    assert len(drawn) == steps * per_step
    for start in range(0, 3 * size, size):
        assert sorted(drawn[start : start + size]) == list(range(size))


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_step_is_the_same_whenever_it_is_asked_for(steps):
    used = PromptStream(23, 5, 7)
    for step in [*steps, *steps[::-1]]:
        assert used.at(step) == PromptStream(23, 5, 7).at(step)


def test_a_run_resumed_in_the_middle_meets_the_same_problems():
    whole = PromptStream(10, 4, 3)
    straight = [whole.at(s) for s in range(20)]
    resumed = PromptStream(10, 4, 3)
    assert [resumed.at(s) for s in range(7, 20)] == straight[7:]


def test_the_number_of_problems_a_step_only_cuts_the_same_order():
    by_four, by_six = PromptStream(50, 4, 0), PromptStream(50, 6, 0)
    assert [i for s in range(30) for i in by_four.at(s)] == [i for s in range(20) for i in by_six.at(s)]


def test_passes_and_seeds_differ():
    orders = [tuple(PromptStream(20, 20, seed).at(step)) for seed in (0, 1, 2) for step in (0, 1, 2)]
    assert len(set(orders)) == 9 and tuple(range(20)) not in orders


def test_indices_are_plain_integers_and_epochs_count_passes():
    stream = PromptStream(10, 4, 0)
    assert {type(i) for i in stream.at(0)} == {int}
    assert [stream.epoch(s) for s in (0, 5, 10)] == [0, 2, 4]


@pytest.mark.parametrize(("size", "per_step"), [(0, 1), (3, 0)])
def test_nothing_to_draw_is_a_one_line_error(size, per_step):
    with pytest.raises(ValueError, match=f"prompts_per_step={per_step} of {size}") as error:
        PromptStream(size, per_step, 0)
    assert "\n" not in str(error.value)


def test_step_numbers_go_on_where_they_stopped_and_count_the_whole_run():
    assert list(StepIndices(0, 4)) == [0, 1, 2, 3] and list(StepIndices(3, 5)) == [3, 4]
    assert len(StepIndices(3, 5)) == 5
