"""The replay: the micro-batches that streams would write, histories by value, what is held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contract import hash_ids
from streams.history import UserHistories
from streams.state import PartitionState
from streamtower.datasets.clicks import DatasetError
from streamtower.evaluate.replay import (
    has_ties,
    histories_before,
    hold_out,
    read_clicks,
    stream,
    with_strict_histories,
)
from tests.streamtower.evaluate.clicks_at_hand import STATE, STREAMS, dataset, random_dataset, random_stream


def test_clicks_come_as_micro_batches_cut_at_multiples_of_the_batch_size() -> None:
    cuts, rejected = read_clicks(random_dataset(40), STREAMS)
    batches = stream(cuts, STATE).batches
    assert not rejected
    assert [(batch.first_offset, batch.next_offset, len(batch)) for batch in batches] == [
        (0, 16, 16), (16, 32, 16), (32, 40, 8),
    ]  # fmt: skip


def test_micro_batches_hold_what_the_state_of_a_partition_says() -> None:
    clicks, state = random_stream(100), PartitionState(STATE)
    for batch in clicks.batches:
        expected_values, expected_offsets = state.histories.join(batch.user_hash, batch.item_hash)
        state.estimator.update(batch.item_hash)
        assert batch.history_values.tolist() == expected_values.tolist()
        assert batch.history_offsets.tolist() == expected_offsets.tolist()
        assert np.array_equal(
            batch.sampling_probability, state.estimator.sampling_probability(batch.item_hash, in_batch=True)
        )


def test_clicks_that_streams_does_not_accept_are_counted_and_left_out() -> None:
    data = dataset(["a", "b" * 600, "c"], ["x", "y", "z"], [1.0, 2.0, 3.0])
    cuts, rejected = read_clicks(data, STREAMS)
    assert rejected == {"bad_id": 1}
    assert [batch.item_id.to_pylist() for batch in stream(cuts, STATE).batches] == [["x", "z"]]
    with pytest.raises(DatasetError, match="no click that streams accepts"):
        read_clicks(dataset(["b" * 600], ["y"], [2.0]), STREAMS)


def test_items_are_numbered_by_their_first_click_and_known_from_the_next_block_on() -> None:
    data = dataset(["a"] * 18, ["p", "q", "p", *["r"] * 13, "s", "q"], [float(i) for i in range(18)])
    clicks = stream(read_clicks(data, STREAMS)[0], STATE)
    assert clicks.item_hash.tolist() == hash_ids(["p", "q", "r", "s"]).tolist()
    first, second = clicks.blocks
    assert first.target.tolist() == [0, 1, 0, *[2] * 13]
    assert (first.num_known, second.num_known) == (0, 3)
    assert second.target.tolist() == [3, 1]
    assert second.history_values.tolist() == [2, 2, 2, 2, 2, 2, 2, 2, 2, 3]
    assert clicks.is_candidate.tolist() == [*[False] * 17, True]
    assert clicks.earlier_clicks.tolist() == [*[0] * 17, 1]


def test_blocks_are_cut_where_the_model_renews_its_counts() -> None:
    clicks = stream(read_clicks(random_dataset(40), STREAMS)[0], STATE, refresh_clicks=6)
    assert [(block.batch.first_offset, len(block)) for block in clicks.blocks] == [
        (0, 6), (6, 6), (12, 4), (16, 6), (22, 6), (28, 4), (32, 6), (38, 2),
    ]  # fmt: skip
    whole = stream(read_clicks(random_dataset(40), STREAMS)[0], STATE)
    for name in ("target", "history_values"):
        joined = [np.concatenate([getattr(block, name) for block in cut.blocks]).tolist() for cut in (clicks, whole)]
        assert joined[0] == joined[1]
    assert [block.num_known for block in clicks.blocks] == [
        len(set(clicks.target[: block.batch.first_offset].tolist())) for block in clicks.blocks
    ]


small_streams = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 1)), max_size=40)


def slow_histories(rows: list[tuple[int, int, int]], length: int, strict: bool, known: list[bool]) -> list[list[int]]:
    moments = np.cumsum([step for _, _, step in rows]).tolist()
    return [
        [
            other_item
            for other, (other_user, other_item, _) in enumerate(rows[:number])
            if other_user == user and known[other] and (not strict or moments[other] < moments[number])
        ][-length:]
        for number, (user, _, _) in enumerate(rows)
    ]


@settings(deadline=None)
@given(rows=small_streams, length=st.integers(1, 6), strict=st.booleans(), data=st.data())
def test_histories_of_a_whole_stream_are_those_of_the_slow_reference(
    rows: list[tuple[int, int, int]], length: int, strict: bool, data: st.DataObject
) -> None:
    known = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    user, item = (np.array([row[k] for row in rows], np.uint64) for k in (0, 1))
    moment = np.cumsum([row[2] for row in rows]).astype(np.float64) if rows else np.zeros(0)
    values, offsets = histories_before(
        user, item, length, moment=moment if strict else None, is_known=np.array(known, bool)
    )
    found = [values[offsets[i] : offsets[i + 1]].tolist() for i in range(len(rows))]
    assert found == slow_histories(rows, length, strict, known)


@settings(deadline=None)
@given(rows=small_streams, length=st.integers(1, 6))
def test_without_conditions_they_are_the_histories_of_streams(rows: list[tuple[int, int, int]], length: int) -> None:
    user, item = (np.array([row[k] for row in rows], np.uint64) for k in (0, 1))
    expected = UserHistories(100, length).join(user, item)
    for found, wanted in zip(histories_before(user, item, length), expected, strict=True):
        assert found.tolist() == wanted.tolist()


def test_strict_histories_hold_earlier_moments_alone() -> None:
    data = dataset(["a", "a", "b", "a", "a"], ["p", "q", "p", "r", "s"], [1.0, 1.0, 1.0, 2.0, 2.0])
    clicks = stream(read_clicks(data, STREAMS)[0], STATE)
    [batch] = with_strict_histories(clicks, STATE.history_length).batches
    p_and_q = hash_ids(["p", "q"]).tolist()
    assert [batch.history(row).tolist() for row in range(5)] == [[], [], [], p_and_q, p_and_q]
    assert has_ties(clicks)


def test_without_ties_strict_histories_are_the_same() -> None:
    data = dataset(["a", "b", "a", "b"], ["p", "q", "r", "s"], [1.0, 1.0, 2.0, 3.0])
    clicks = stream(read_clicks(data, STREAMS)[0], STATE)
    assert not has_ties(clicks)
    [strict], [batch] = with_strict_histories(clicks, STATE.history_length).batches, clicks.batches
    assert strict.history_values.tolist() == batch.history_values.tolist()


def test_held_out_clicks_are_in_no_history_and_no_frequency() -> None:
    cuts, _ = read_clicks(random_dataset(120), STREAMS)
    is_held_out = np.random.default_rng(1).random(120) < 0.3
    pairs = hold_out(cuts, is_held_out, STATE)
    state = PartitionState(STATE)
    last: dict[int, list[int]] = {}
    for number, (train, test) in enumerate(pairs):
        rows = np.arange(16 * number, min(16 * number + 16, 120))
        assert train is not None
        assert train.offset.tolist() == rows[~is_held_out[rows]].tolist()
        expected = state.histories.join(train.user_hash, train.item_hash)
        state.estimator.update(train.item_hash)
        assert train.history_values.tolist() == expected[0].tolist()
        assert np.array_equal(
            train.sampling_probability, state.estimator.sampling_probability(train.item_hash, in_batch=True)
        )
        merged = sorted(
            [(int(offset), batch, row) for batch in (train, test) if batch for row, offset in enumerate(batch.offset)],
            key=lambda entry: entry[0],
        )
        assert [offset for offset, _, _ in merged] == rows.tolist()
        for offset, batch, row in merged:
            user = int(batch.user_hash[row])
            assert batch.history(row).tolist() == last.get(user, [])[-STATE.history_length :]
            if not is_held_out[offset]:
                last.setdefault(user, []).append(int(batch.item_hash[row]))
