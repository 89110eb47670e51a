"""HistoryTable against a slow obvious reference, click by click; eviction; redelivery."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever.histories import HistoryTable
from streams.contract import MicroBatch, hash_id, hash_ids

Click = tuple[str, str]


def make_batch(
    clicks: Sequence[Click], histories: Sequence[Sequence[str]], *, first_offset: int = 0, partition: int = 0
) -> MicroBatch:
    """A micro-batch of these clicks, at consecutive offsets."""
    lengths = [len(history) for history in histories]
    users, items = [user for user, _ in clicks], [item for _, item in clicks]
    n = len(clicks)
    return MicroBatch(
        partition=partition,
        first_offset=first_offset,
        next_offset=first_offset + n,
        offset=np.arange(first_offset, first_offset + n),
        user_id=pa.array(users),
        item_id=pa.array(items),
        user_hash=hash_ids(users),
        item_hash=hash_ids(items),
        history_values=hash_ids([item for history in histories for item in history]),
        history_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        reward=np.ones(n, np.float32),
        event_time=np.arange(n, dtype=np.float64),
        ingest_time=np.arange(n, dtype=np.float64),
        sampling_probability=np.full(n, 0.5, np.float32),
    )


def make_batches(clicks: Sequence[Click], cuts: Sequence[int], length: int) -> list[MicroBatch]:
    """The clicks of one partition as streams would send them: histories of `length`, from before each click."""
    seen: dict[str, list[str]] = {}
    rows = []
    for user, item in clicks:
        history = seen.setdefault(user, [])
        rows.append(list(history))
        history.append(item)
        del history[:-length]
    bounds = [0, *sorted(set(cuts)), len(clicks)]
    return [
        make_batch(clicks[low:high], rows[low:high], first_offset=low)
        for low, high in itertools.pairwise(bounds)
        if low < high
    ]


def last_items(clicks: Sequence[Click], length: int) -> dict[int, list[int]]:
    """The reference: every user's last items."""
    seen: dict[str, list[str]] = {}
    for user, item in clicks:
        seen.setdefault(user, []).append(item)
    return {hash_id(user): hash_ids(items[-length:]).tolist() for user, items in seen.items()}


def contents(table: HistoryTable, clicks: Sequence[Click]) -> dict[int, list[int]]:
    found = {hash_id(user): table.get(hash_id(user)) for user, _ in clicks}
    return {user: history.tolist() for user, history in found.items() if history is not None}


some_clicks = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("uvwxyz")), min_size=1, max_size=60)
some_cuts = st.lists(st.integers(1, 59), max_size=8)


@settings(deadline=None)
@given(clicks=some_clicks, cuts=some_cuts, length=st.integers(1, 8))
def test_every_user_has_the_items_clicked_last(clicks: list[Click], cuts: list[int], length: int) -> None:
    table = HistoryTable(max_users=100, history_length=length)
    cuts = [cut for cut in cuts if cut < len(clicks)]
    rows = [table.apply(MicroBatch.decode(batch.encode()))[0] for batch in make_batches(clicks, cuts, length)]
    assert contents(table, clicks) == last_items(clicks, length)
    assert sum(rows) == len(clicks)


@settings(deadline=None)
@given(clicks=some_clicks, cuts=some_cuts, again=some_cuts, back=st.integers(0, 59), length=st.integers(1, 8))
def test_redelivery_cut_in_any_way_changes_nothing(
    clicks: list[Click], cuts: list[int], again: list[int], back: int, length: int
) -> None:
    table = HistoryTable(max_users=100, history_length=length)
    for batch in make_batches(clicks, [cut for cut in cuts if cut < len(clicks)], length):
        table.apply(batch)
    before = contents(table, clicks)
    for batch in make_batches(clicks, [cut for cut in [*again, back] if cut < len(clicks)], length):
        if batch.first_offset >= back:
            assert table.apply(batch) == (0, 0)
    assert contents(table, clicks) == before


def test_a_batch_half_of_which_was_seen_counts_with_its_other_half() -> None:
    table = HistoryTable(max_users=10, history_length=5)
    clicks = [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]
    first, *_ = make_batches(clicks, [2], 5)
    whole, *_ = make_batches(clicks, [], 5)
    assert table.apply(first) == (2, 0)
    assert table.apply(whole) == (2, 0)
    assert contents(table, clicks) == last_items(clicks, 5)


def test_offsets_of_one_partition_say_nothing_about_another() -> None:
    table = HistoryTable(max_users=10, history_length=5)
    table.apply(make_batch([("a", "1")], [[]], first_offset=1_000, partition=0))
    assert table.apply(make_batch([("b", "2")], [[]], first_offset=3, partition=1)) == (1, 0)


def test_a_row_is_trusted_with_the_whole_history_that_it_carries() -> None:
    """One that follows from the middle of the stream knows what came before."""
    table = HistoryTable(max_users=10, history_length=3)
    table.apply(make_batch([("a", "9")], [["5", "6", "7", "8"]], first_offset=77))
    assert table.get(hash_id("a")) is not None
    assert contents(table, [("a", "9")]) == {hash_id("a"): hash_ids(["7", "8", "9"]).tolist()}


def test_the_users_who_clicked_last_are_kept() -> None:
    table = HistoryTable(max_users=2, history_length=3)
    clicks = [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]
    evicted = [table.apply(batch)[1] for batch in make_batches(clicks, [1, 2, 3], 3)]
    assert evicted == [0, 0, 0, 1]
    assert len(table) == 2
    assert set(contents(table, clicks)) == {hash_id("a"), hash_id("c")}


def test_within_one_micro_batch_too_the_users_who_clicked_last_are_kept() -> None:
    table = HistoryTable(max_users=2, history_length=3)
    users = [str(number) for number in range(50)]
    clicks = [(user, "1") for user in users] + [("7", "2")]
    assert table.apply(make_batches(clicks, [], 3)[0]) == (51, 48)
    assert set(contents(table, clicks)) == {hash_id("49"), hash_id("7")}


def test_nothing_is_known_of_others() -> None:
    assert HistoryTable(max_users=2, history_length=3).get(hash_id("a")) is None
