"""Histories by value: against a dictionary of deques that forgets the user who has been away the longest."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from streams.history import UserHistories
from tests.streams.references import SlowHistories


def joined(histories: UserHistories, users: list[int], items: list[int]) -> list[list[int]]:
    values, offsets = histories.join(np.array(users, np.uint64), np.array(items, np.uint64))
    assert values.dtype == np.uint64
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    assert len(values) == offsets[-1]
    return [values[low:high].tolist() for low, high in pairwise(offsets.tolist())]


def test_a_click_sees_the_users_clicks_before_it_newest_last() -> None:
    histories = UserHistories(10, 3)
    assert joined(histories, [1, 2, 1, 1], [10, 20, 11, 12]) == [[], [], [10], [10, 11]]
    assert joined(histories, [1, 2, 1], [13, 21, 14]) == [[10, 11, 12], [20], [11, 12, 13]]


def test_an_item_clicked_again_stands_there_again() -> None:
    histories = UserHistories(10, 3)
    assert joined(histories, [1, 1, 1], [7, 7, 7]) == [[], [7], [7, 7]]


def test_no_clicks_are_no_histories() -> None:
    assert joined(UserHistories(1, 1), [], []) == []


# Few users that meet in the table (equal low and high bits), and any at all.
user_hashes = st.integers(0, 12).map(lambda n: n << 44) | st.integers(0, 12) | st.sampled_from([2**64 - 1, 2**63])


class HistoriesAgainstADictionary(RuleBasedStateMachine):
    @initialize(max_users=st.integers(1, 9), length=st.integers(1, 4))
    def begin(self, max_users: int, length: int) -> None:
        self.histories, self.slow = UserHistories(max_users, length), SlowHistories(max_users, length)

    @rule(clicks=st.lists(st.tuples(user_hashes, st.integers(0, 2**64 - 1)), max_size=30))
    def clicks_come(self, clicks: list[tuple[int, int]]) -> None:
        users, items = [user for user, _ in clicks], [item for _, item in clicks]
        expected = [self.slow.click(user, item) for user, item in clicks]
        assert joined(self.histories, users, items) == expected

    @rule()
    def it_goes_on_from_its_state(self) -> None:
        again = UserHistories(self.histories.max_users, self.histories.length)
        joined(again, [3, 4, 5], [1, 1, 1])  # what it held before must leave no trace
        again.restore(self.histories.state())
        self.histories = again

    @invariant()
    def the_number_of_users_is_bounded(self) -> None:
        if hasattr(self, "histories"):
            assert len(self.histories) == len(self.slow.items) <= self.histories.max_users


TestHistoriesAgainstADictionary = HistoriesAgainstADictionary.TestCase
TestHistoriesAgainstADictionary.settings = settings(deadline=None, max_examples=60, stateful_step_count=12)


def test_many_users_come_and_go() -> None:
    rng = np.random.default_rng(1)
    histories, slow = UserHistories(1_000, 5), SlowHistories(1_000, 5)
    for _ in range(20):
        users = [int(user) * 0x9E3779B97F4A7C15 % 2**64 for user in rng.zipf(1.2, 1_000) % 5_000]
        items = rng.integers(0, 2**63, 1_000).tolist()
        expected = [slow.click(user, item) for user, item in zip(users, items, strict=True)]
        assert joined(histories, users, items) == expected


@given(st.lists(st.lists(user_hashes, max_size=10), max_size=8))
def test_the_state_after_n_clicks_does_not_depend_on_how_they_were_cut(batches: list[list[int]]) -> None:
    cut, whole = UserHistories(4, 2), UserHistories(4, 2)
    clicks = [user for batch in batches for user in batch]
    items = list(range(len(clicks)))
    taken = 0
    for batch in batches:
        joined(cut, batch, items[taken : taken + len(batch)])
        taken += len(batch)
    joined(whole, clicks, items)
    for name, array in whole.state().items():
        np.testing.assert_array_equal(cut.state()[name], array)


def test_a_state_is_a_copy_and_fits_only_its_shape() -> None:
    histories = UserHistories(4, 2)
    joined(histories, [1, 2], [1, 2])
    before = histories.state()
    joined(histories, [1, 3], [5, 5])
    assert before["items"].tolist() == [[1, 0], [2, 0]]
    with pytest.raises(ValueError, match="shape"):
        UserHistories(4, 3).restore(before)
    with pytest.raises(ValueError, match="shape"):
        UserHistories(1, 2).restore(before)


@pytest.mark.parametrize("arguments", [(0, 1), (2**26 + 1, 1), (1, 0), (1, 256)])
def test_arguments_outside_their_range_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be in"):
        UserHistories(*arguments)
