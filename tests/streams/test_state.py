"""A partition's state is a function of its clicks alone: not of cuts, nor of how often it was put away and restored."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import CANARY_ID, ClickEvent, encode_event
from streams.state import PartitionState, StateConfig
from streams.validate import Clicks, validate
from tests.streams.stand_ins import random_clicks

SMALL = StateConfig(
    num_buckets=64, num_hashes=2, max_users=10, history_length=3, drift_fast_clicks=10, drift_slow_clicks=50
)


def clicks_of(num_clicks: int, first_offset: int = 0) -> Clicks:
    values = random_clicks(num_clicks, 3)
    clicks, _ = validate(values, np.arange(first_offset, first_offset + num_clicks), np.zeros(num_clicks))
    return clicks


def assert_equal_states(first: PartitionState, second: PartitionState) -> None:
    expected, came = first.state(), second.state()
    assert expected.keys() == came.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(came[name], array, err_msg=name)


@given(cuts=st.sets(st.integers(1, 199)), restored_at=st.integers(0, 199))
def test_the_state_after_n_clicks_is_the_same_however_it_came_there(cuts: set[int], restored_at: int) -> None:
    clicks = clicks_of(200)
    whole = PartitionState(SMALL)
    whole.learn(clicks, 200)
    pieces = PartitionState(SMALL)
    for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), 200], strict=True):
        pieces.learn(clicks.rows(low, high), high)
        if low <= restored_at < high:
            again = PartitionState(SMALL)
            again.restore(pieces.state())
            pieces = again
    assert_equal_states(pieces, whole)
    assert pieces.next_offset == 200


def test_histories_are_from_before_each_click_and_probabilities_from_after_the_last() -> None:
    clicks = clicks_of(100)
    state = PartitionState(SMALL)
    learnt = state.learn(clicks, 100)
    assert learnt.history_offsets[1] == 0
    assert len(learnt.history_offsets) == 101
    np.testing.assert_array_equal(
        learnt.sampling_probability, state.estimator.sampling_probability(clicks.item_hash, in_batch=True)
    )


def test_clicks_that_do_not_follow_change_nothing() -> None:
    state = PartitionState(SMALL, next_offset=50)
    state.learn(clicks_of(10, 50), 60)
    before = state.state()
    for clicks, next_offset in ((clicks_of(10, 55), 70), (clicks_of(10, 60), 65), (clicks_of(0), 59)):
        with pytest.raises(ValueError, match="do not follow"):
            state.learn(clicks, next_offset)
    for name, array in state.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_offsets_without_clicks_only_move_the_offset() -> None:
    state = PartitionState(SMALL)
    state.learn(clicks_of(0), 12)
    assert (state.next_offset, state.estimator.step, len(state.histories)) == (12, 0, 0)


@given(st.sets(st.integers(0, 119)), st.sets(st.integers(1, 119)))
def test_canaries_leave_no_trace_in_the_state_and_none_in_what_others_are_told(
    places: set[int], cuts: set[int]
) -> None:
    values = random_clicks(120, 3)
    with_canaries = [
        encode_event(ClickEvent(CANARY_ID, CANARY_ID, 1.0)) if n in places else value for n, value in enumerate(values)
    ]
    clicks, _ = validate(values, np.arange(120), np.zeros(120))
    mixed, _ = validate(with_canaries, np.arange(120), np.zeros(120))
    others = np.array([n for n in range(120) if n not in places], np.int64)
    state, without = PartitionState(SMALL), PartitionState(SMALL)
    for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), 120], strict=True):
        learnt = state.learn(mixed.rows(low, high), high)
        rows = others[(others >= low) & (others < high)]
        wanted = without.learn(clicks.take(rows), high)
        lengths = np.diff(learnt.history_offsets)
        assert len(lengths) == high - low
        np.testing.assert_array_equal(lengths[rows - low], np.diff(wanted.history_offsets))
        np.testing.assert_array_equal(learnt.history_values, wanted.history_values)
        np.testing.assert_array_equal(learnt.sampling_probability[rows - low], wanted.sampling_probability)
        canaries = np.setdiff1d(np.arange(high - low), rows - low)
        assert (lengths[canaries] == 0).all() and (learnt.sampling_probability[canaries] == 1).all()
    assert_equal_states(state, without)
