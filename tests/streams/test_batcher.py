"""Where micro-batches are cut, what closes them, and how their columns come together."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.batcher import Batcher, CloseReason, Cut, context_columns, encode_within, micro_batch
from streams.contract import MicroBatch, Scalar
from streams.state import PartitionState, StateConfig
from streams.validate import Clicks, validate
from tests.streams.stand_ins import Clock, click, random_clicks

SMALL = StateConfig(num_buckets=256, max_users=50)


def taken(batcher: Batcher, values: list[bytes | None], offsets: list[int], next_offset: int) -> list[Cut]:
    clicks, _ = validate(values, np.array(offsets, np.int64), np.zeros(len(values)))
    return batcher.add(clicks, np.array(offsets, np.int64), next_offset)


def spans(cuts: list[Cut]) -> list[tuple[int, int, list[int]]]:
    return [(cut.first_offset, cut.next_offset, cut.clicks.offset.tolist()) for cut in cuts]


def test_it_closes_at_offsets_that_are_multiples_of_the_size() -> None:
    batcher = Batcher(5, 4, math.inf, Clock())
    cuts = taken(batcher, [click()] * 9, list(range(5, 14)), 14)
    assert spans(cuts) == [(5, 8, [5, 6, 7]), (8, 12, [8, 9, 10, 11])]
    assert {cut.reason for cut in cuts} == {CloseReason.SIZE}
    assert (batcher.first_offset, batcher.next_offset) == (12, 14)


def test_a_micro_batch_closes_with_the_record_before_the_multiple() -> None:
    batcher = Batcher(0, 4, math.inf, Clock())
    assert spans(taken(batcher, [click()] * 3, [0, 1, 2], 3)) == []
    assert spans(taken(batcher, [click()], [3], 4)) == [(0, 4, [0, 1, 2, 3])]
    assert batcher.due_in() is None


def test_rejected_records_count_for_the_size_and_may_leave_a_micro_batch_empty() -> None:
    batcher = Batcher(0, 2, math.inf, Clock())
    cuts = taken(batcher, [None, b"no", click(), None], [0, 1, 2, 3], 4)
    assert spans(cuts) == [(0, 2, []), (2, 4, [2])]


def test_a_stretch_without_records_makes_no_micro_batches_of_its_own() -> None:
    batcher = Batcher(0, 4, math.inf, Clock())
    cuts = taken(batcher, [click()] * 2, [1, 1_000_002], 1_000_003)
    assert spans(cuts) == [(0, 1_000_000, [1])]
    assert spans(taken(batcher, [], [], 2_000_001)) == [(1_000_000, 2_000_000, [1_000_002])]


def test_it_closes_when_its_oldest_click_is_old_enough() -> None:
    clock = Clock()
    batcher = Batcher(0, 4, 0.25, clock)
    assert (batcher.due_in(), batcher.close()) == (None, None)
    taken(batcher, [click()], [0], 1)
    clock.now += 0.2
    taken(batcher, [click()], [1], 2)
    assert batcher.due_in() == pytest.approx(0.05)
    clock.now += 0.1
    assert batcher.due_in() == 0
    cut = batcher.close()
    assert cut is not None
    assert (spans([cut]), cut.reason) == ([(0, 2, [0, 1])], CloseReason.AGE)
    assert (batcher.due_in(), batcher.close()) == (None, None)


def test_what_is_left_over_by_a_close_by_size_is_as_old_as_its_own_clicks() -> None:
    clock = Clock()
    batcher = Batcher(0, 4, 0.25, clock)
    taken(batcher, [click()] * 3, [0, 1, 2], 3)
    clock.now += 0.2
    taken(batcher, [click()] * 2, [3, 4], 5)
    assert batcher.due_in() == pytest.approx(0.25)


def test_rejected_records_alone_are_passed_on_by_age_too() -> None:
    """Otherwise nothing would ever allow their offsets to be committed."""
    batcher = Batcher(0, 4, 0.0, Clock())
    taken(batcher, [None], [0], 1)
    cut = batcher.close()
    assert cut is not None
    assert spans([cut]) == [(0, 1, [])]


def test_records_that_do_not_follow_are_refused() -> None:
    batcher = Batcher(5, 4, math.inf, Clock())
    with pytest.raises(ValueError, match="do not follow upon 5"):
        taken(batcher, [click()], [4], 5)
    with pytest.raises(ValueError, match="do not follow upon 5"):
        taken(batcher, [], [], 4)


@given(
    present=st.lists(st.booleans(), min_size=1, max_size=60),
    chunk_lengths=st.lists(st.integers(1, 9), min_size=60),
    batch_size=st.integers(1, 9),
    redelivered_from=st.integers(0, 60),
)
def test_cuts_lie_in_the_same_places_however_and_from_wherever_clicks_are_delivered(
    present: list[bool], chunk_lengths: list[int], batch_size: int, redelivered_from: int
) -> None:
    offsets = [offset for offset, is_there in enumerate(present) if is_there]
    end = -(-len(present) // batch_size) * batch_size

    def delivered(first: int, lengths: list[int]) -> list[tuple[int, int, list[int]]]:
        batcher = Batcher(first, batch_size, math.inf, Clock())
        cuts, left, start = [], [offset for offset in offsets if offset >= first], first
        for length in lengths:
            part, left = [o for o in left if o < start + length], [o for o in left if o >= start + length]
            start = min(start + length, end)
            cuts += taken(batcher, [click()] * len(part), part, start)
        return spans(cuts + taken(batcher, [click()] * len(left), left, end))

    whole = delivered(0, [])
    assert [row for cut in whole for row in cut[2]] == offsets
    assert [cut[0] for cut in whole] == [0, *(cut[1] for cut in whole[:-1])]
    assert whole[-1][1] == end
    pieces = delivered(0, chunk_lengths)
    assert rows_by_cut(pieces) == rows_by_cut(whole)
    if all(present):
        assert pieces == whole
    first = min(redelivered_from, end - 1)
    boundary = -(-first // batch_size) * batch_size
    again = [cut for cut in delivered(first, []) if cut[0] >= boundary]
    assert rows_by_cut(again) == [rows for rows in rows_by_cut(whole) if rows[0] >= boundary]


def rows_by_cut(cuts: list[tuple[int, int, list[int]]]) -> list[list[int]]:
    return [rows for _, _, rows in cuts if rows]


def a_micro_batch(values: list[bytes | None], first_offset: int = 0) -> MicroBatch:
    clicks, _ = validate(values, np.arange(first_offset, first_offset + len(values)), np.full(len(values), 5.0))
    state = PartitionState(SMALL, first_offset)
    next_offset = first_offset + len(values)
    return micro_batch(3, Cut(first_offset, next_offset, clicks, CloseReason.SIZE), state.learn(clicks, next_offset))


def test_a_micro_batch_holds_clicks_histories_and_probabilities_row_by_row() -> None:
    batch = MicroBatch.decode(
        a_micro_batch([click("a", "x", 1, reward=2), None, click("b", "x", 2), click("a", "y", 3)], 40).encode()
    )
    assert (batch.partition, batch.first_offset, batch.next_offset) == (3, 40, 44)
    assert batch.offset.tolist() == [40, 42, 43]
    assert (batch.user_id.to_pylist(), batch.item_id.to_pylist()) == (["a", "b", "a"], ["x", "x", "y"])
    assert [batch.history(row).tolist() for row in range(3)] == [[], [], [batch.item_hash[0]]]
    assert (batch.reward.tolist(), batch.event_time.tolist()) == ([2, 1, 1], [1, 2, 3])
    assert batch.ingest_time.tolist() == [5, 5, 5]
    # x: its one gap is 1 click; y: once in three clicks
    np.testing.assert_allclose(batch.sampling_probability, [1, 1, 1 / 3], rtol=1e-6)


def test_a_micro_batch_without_rows_is_one() -> None:
    batch = MicroBatch.decode(a_micro_batch([None, b"no"], 7).encode())
    assert (len(batch), batch.first_offset, batch.next_offset) == (0, 7, 9)


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ([1, 2.5, None], pa.array([1.0, 2.5, None])),
        (["a", None, "b"], pa.array(["a", None, "b"])),
        ([True, False, None], pa.array(["true", "false", None])),
        ([1, "a", 2.5], pa.array(["1", "a", "2.5"])),
        ([3.0, True, -0.5], pa.array(["3", "true", "-0.5"])),
        ([2**53, -(2**53), 0], pa.array([2.0**53, -(2.0**53), 0.0])),
        ([2**53 + 1, 1, 1.5], pa.array([str(2**53 + 1), "1", "1.5"])),
        ([10**400, 1e22, 1], pa.array(["1" + "0" * 400, "1e+22", "1"])),
    ],
)
def test_a_context_feature_is_a_column_of_doubles_or_of_strings(values: list[Scalar], column: pa.Array) -> None:
    assert context_columns([{"f": value} for value in values]) == {"f": column}


def test_a_click_without_a_feature_has_a_null_and_a_feature_without_values_no_column() -> None:
    assert context_columns([{}, {"a": 1, "gone": None}, {"b": "x"}]) == {
        "a": pa.array([None, 1.0, None]),
        "b": pa.array([None, None, "x"]),
    }
    assert context_columns([]) == {}


def test_a_micro_batch_too_long_for_a_record_is_sent_in_halves() -> None:
    batch = a_micro_batch([click(f"user {n}", context={f"f{n}": "x" * 900}) for n in range(40)], 120)
    parts = [MicroBatch.decode(part) for part in encode_within(batch, 16_000)]
    assert len(parts) > 2
    assert all(len(part) <= 16_000 for part in encode_within(batch, 16_000))
    assert [part.first_offset for part in parts] == [120, *(part.next_offset for part in parts[:-1])]
    assert parts[-1].next_offset == 160
    for name in ("offset", "item_hash", "sampling_probability", "history_values"):
        whole = getattr(batch, name)
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == whole.tolist()
    assert [list(part.context) for part in parts] == [
        sorted(f"f{offset - 120}" for offset in part.offset.tolist()) for part in parts
    ]
    assert encode_within(batch, 10**9) == [batch.encode()]


def test_one_row_is_not_cut_further() -> None:
    assert len(encode_within(a_micro_batch([click("u" * 500)]), 10)) == 1


def test_random_clicks_keep_their_rows_in_the_columns() -> None:
    values = random_clicks(300, 5)
    batch = a_micro_batch(values)
    assert batch.context["hour"].to_pylist() == [None if n % 3 == 0 else n % 24 for n in range(300)]


def test_a_click_list_can_be_joined_from_one_part() -> None:
    clicks, _ = validate([click()], np.arange(1), np.zeros(1))
    assert Clicks.concatenated([clicks]) is clicks
