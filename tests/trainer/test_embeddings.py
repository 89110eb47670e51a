"""Embeddings by row, and whose turn it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.embeddings import Embeddings


def of(*values: float) -> np.ndarray:
    return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)


def test_rows_are_zeros_until_they_are_set_and_stay_when_more_come() -> None:
    embeddings = Embeddings(2)
    embeddings.extend(3)
    embeddings.set(np.array([2, 0]), of(2, 1))
    embeddings.extend(2_000)
    assert len(embeddings) == 2_000
    np.testing.assert_array_equal(embeddings.array[:4], of(1, 0, 2, 0))


def test_kept_rows_have_their_embeddings_in_the_new_order() -> None:
    embeddings = Embeddings(2)
    embeddings.extend(4)
    embeddings.set(np.arange(4), of(0, 1, 2, 3))
    embeddings.keep(np.array([1, 3]))
    np.testing.assert_array_equal(embeddings.array, of(1, 3))
    embeddings.extend(3)
    np.testing.assert_array_equal(embeddings.array, of(1, 3, 0))


@given(st.integers(1, 50), st.lists(st.integers(0, 20), min_size=1, max_size=20))
def test_it_is_each_rows_turn_equally_often_and_in_their_order(num_rows: int, turns: list[int]) -> None:
    embeddings = Embeddings(2)
    embeddings.extend(num_rows)
    found = np.concatenate([embeddings.take_turn(turn) for turn in turns])
    asked = sum(min(turn, num_rows) for turn in turns)
    np.testing.assert_array_equal(found, np.arange(asked) % num_rows)


def test_nobodys_turn_comes_where_there_is_nobody() -> None:
    assert Embeddings(2).take_turn(5).tolist() == []


def test_a_loaded_one_goes_on_as_the_one_that_was_saved() -> None:
    one, two = Embeddings(2), Embeddings(2)
    one.extend(5)
    one.set(np.arange(5), of(0, 1, 2, 3, 4))
    one.take_turn(3)
    two.load_state_dict(one.state_dict())
    for embeddings in (one, two):
        embeddings.extend(6)
        assert embeddings.take_turn(4).tolist() == [3, 4, 5, 0]
    np.testing.assert_array_equal(one.array, two.array)
    with pytest.raises(ValueError, match="embeddings have 2 dimensions, not 3"):
        Embeddings(3).load_state_dict(one.state_dict())


def test_what_was_set_or_is_new_has_changed() -> None:
    embeddings = Embeddings(2)
    embeddings.extend(5)
    changes = embeddings.changes["array"]
    assert changes.take(5) is None
    embeddings.set(np.array([3, 1]), of(1, 1))
    embeddings.extend(6)
    rows = changes.take(6)
    assert rows is not None and rows.tolist() == [1, 3, 5]
    embeddings.keep(np.array([0]))
    assert changes.take(1) is None
