"""Slots of keys that are added at the end."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streams.hash_table import SlotIndex


@given(st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=2_000), st.lists(st.integers(0, 2_000), max_size=5))
def test_every_key_is_found_in_its_slot_and_no_other_key_is_found(numbers: list[int], stops: list[int]) -> None:
    keys, known = np.array(numbers, np.uint64), SlotIndex()
    keys.flags.writeable = False
    for stop in [*sorted(min(stop, len(keys)) for stop in stops), len(keys)]:
        known.add(keys, stop)
        wanted = np.where(np.arange(len(keys)) < stop, np.arange(len(keys)), -1)
        np.testing.assert_array_equal(known.find(keys, keys), wanted)


def test_keys_that_begin_at_the_same_place_are_told_apart() -> None:
    keys = (np.arange(500, dtype=np.uint64) << np.uint64(52)) | np.uint64(1)  # alike in the bits that choose the place
    known = SlotIndex()
    known.add(keys, 500)
    assert known.find(keys[::-1], keys).tolist() == list(range(499, -1, -1))
    assert known.find(keys + np.uint64(1), keys).tolist() == [-1] * 500
