"""A replayed state is the state of an undisturbed run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.frequency import EstimatorMode
from streams.replay import replay
from streams.state import PartitionState, StateConfig
from streams.validate import validate
from tests.streams.stand_ins import ClicksInMemory, random_clicks

VALUES: list[bytes | None] = [b"no" if n % 13 == 0 else value for n, value in enumerate(random_clicks(300, 9))]


def config(mode: EstimatorMode) -> StateConfig:
    return StateConfig(64, 2, mode=mode, max_users=10, history_length=3, drift_fast_clicks=10, drift_slow_clicks=50)


def undisturbed(stop: int, mode: EstimatorMode, batch_size: int) -> PartitionState:
    state = PartitionState(config(mode))
    for low in range(0, stop, batch_size):
        high = min(low + batch_size, stop)
        clicks, _ = validate(VALUES[low:high], np.arange(low, high), np.zeros(high - low))
        state.learn(clicks, high)
    return state


@pytest.mark.parametrize("mode", ["click", "batch"])
@given(stop=st.integers(0, 300), at_a_time=st.integers(1, 300), batch_size=st.sampled_from([1, 7, 64]))
def test_it_ends_in_the_state_of_an_undisturbed_run(
    mode: EstimatorMode, stop: int, at_a_time: int, batch_size: int
) -> None:
    expected = undisturbed(stop, mode, batch_size)
    replayed = PartitionState(config(mode))
    in_memory = ClicksInMemory(VALUES, at_a_time)
    num_records = replay(
        replayed, in_memory, 0, stop, batch_size=batch_size, max_click_bytes=1000, cancelled=lambda: False
    )
    assert num_records == stop
    for name, array in expected.state().items():
        np.testing.assert_array_equal(replayed.state()[name], array, err_msg=name)


def test_it_goes_on_from_where_the_state_is() -> None:
    state = undisturbed(128, "click", 64)
    in_memory = ClicksInMemory(VALUES)
    assert replay(state, in_memory, 0, 250, batch_size=64, max_click_bytes=1000, cancelled=lambda: False) == 122
    assert in_memory.reads == [(128, 250)]
    for name, array in undisturbed(250, "click", 64).state().items():
        np.testing.assert_array_equal(state.state()[name], array, err_msg=name)


def test_what_retention_has_deleted_is_passed_over() -> None:
    state = PartitionState(config("click"))
    in_memory = ClicksInMemory(VALUES, first_offset=200)
    assert replay(state, in_memory, 0, 300, batch_size=64, max_click_bytes=1000, cancelled=lambda: False) == 100
    assert (state.next_offset, state.estimator.step) == (300, sum(n % 13 != 0 for n in range(200, 300)))
    empty = PartitionState(config("click"))
    in_memory = ClicksInMemory(VALUES, first_offset=300)
    assert replay(empty, in_memory, 0, 300, batch_size=64, max_click_bytes=1000, cancelled=lambda: False) == 0
    assert empty.next_offset == 300


def test_when_cancelled_it_stops_where_it_is() -> None:
    state = PartitionState(config("click"))
    asked = iter([False, False, True, True])
    replay(
        state,
        ClicksInMemory(VALUES, at_a_time=50),
        0,
        300,
        batch_size=50,
        max_click_bytes=1000,
        cancelled=lambda: next(asked),
    )
    assert state.next_offset == 100
