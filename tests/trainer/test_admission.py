"""Admission of unknown items by their clicks, by value."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.admission import Admission


def clicked(admission: Admission, *items: int) -> list[bool]:
    return admission.admitted(np.array(items, np.uint64)).tolist()


def test_with_one_click_nothing_waits() -> None:
    admission = Admission()
    assert clicked(admission, 7, 8) == [True, True] and len(admission) == 0


def test_the_third_click_admits_wherever_it_comes() -> None:
    admission = Admission(3)
    assert clicked(admission, 7, 8) == [False, False]
    assert clicked(admission, 7, 9, 9, 9) == [False, True, True, True]
    assert clicked(admission, 7, 8) == [True, False]
    assert len(admission) == 1


def test_what_was_admitted_otherwise_waits_no_more() -> None:
    admission = Admission(3)
    clicked(admission, 7, 7, 8, 8)
    admission.forget(np.array([7, 99], np.uint64))
    assert clicked(admission, 7, 8) == [False, True]


@given(st.lists(st.lists(st.integers(0, 12), max_size=5), max_size=20), st.integers(2, 4), st.integers(1, 6))
def test_counts_are_those_of_the_items_clicked_last_also_after_a_restart(
    calls: list[list[int]], clicks: int, max_waiting: int
) -> None:
    admission = Admission(clicks, max_waiting)
    waiting: OrderedDict[int, int] = OrderedDict()
    for items in calls:
        wanted = set()
        for item in items:
            waiting[item] = waiting.pop(item, 0) + 1
            if waiting[item] >= clicks or item in wanted:
                wanted.add(item)
                del waiting[item]
        while len(waiting) > max_waiting:
            waiting.popitem(last=False)
        assert clicked(admission, *items) == [item in wanted for item in items]
        again = Admission(clicks, max_waiting)
        again.load_state_dict(admission.state_dict())
        admission = again
    assert len(admission) == len(waiting) <= max_waiting
