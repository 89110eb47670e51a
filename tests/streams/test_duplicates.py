"""A window over event ids, against an obvious one."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.duplicates import NO_EVENT, EventWindow


def slow_first_seen(events: list[int], size: int) -> list[bool]:
    window: OrderedDict[int, None] = OrderedDict()
    answers = []
    for event in events:
        answers.append(event == NO_EVENT or event not in window)
        if event != NO_EVENT and event not in window:
            window[event] = None
            if len(window) > size:
                window.popitem(last=False)
    return answers


# Few distinct ids, so that they come again; large ones too, so that they collide in the table and do not.
EVENTS = st.lists(st.integers(0, 12) | st.integers(0, 12).map(lambda n: n << 60 | 1), max_size=120)


@given(events=EVENTS, size=st.integers(1, 9), cuts=st.sets(st.integers(0, 120)))
def test_it_tells_what_an_obvious_window_tells_however_it_is_cut_put_away_and_restored(
    events: list[int], size: int, cuts: set[int]
) -> None:
    window, answers, low = EventWindow(size), [], 0
    for high in [*sorted(cut for cut in cuts if cut < len(events)), len(events)]:
        answers += window.first_seen(np.array(events[low:high], np.uint64)).tolist()
        again = EventWindow(size)
        again.restore(window.state())
        window, low = again, high
    assert answers == slow_first_seen(events, size)


def test_a_window_of_no_size_takes_everything() -> None:
    window = EventWindow(0)
    assert window.first_seen(np.array([5, 5, 5], np.uint64)).all()
    again = EventWindow(0)
    again.restore(window.state())


def test_sizes_out_of_range_and_states_of_another_size_are_refused() -> None:
    for size in (-1, 2**26 + 1):
        with pytest.raises(ValueError, match="0 … 2"):
            EventWindow(size)
    window = EventWindow(5)
    window.first_seen(np.arange(1, 9, dtype=np.uint64))
    with pytest.raises(ValueError, match="cannot hold"):
        EventWindow(4).restore(window.state())
