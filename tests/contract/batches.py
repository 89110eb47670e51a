"""Micro-batches for the contract's tests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from streams.contract import MicroBatch, hash_ids

FIXED = MicroBatch(
    partition=1,
    first_offset=100,
    next_offset=110,
    offset=np.array([101, 104, 109]),
    user_id=pa.array(["ann", "böb", "ann"]),
    item_id=pa.array(["shoe", "hat", "hat"]),
    user_hash=hash_ids(["ann", "böb", "ann"]),
    item_hash=hash_ids(["shoe", "hat", "hat"]),
    history_values=hash_ids(["sock", "hat", "shoe"]),
    history_offsets=np.array([0, 1, 1, 3]),
    reward=np.array([1.0, 0.0, 2.5], np.float32),
    event_time=np.array([1_790_000_000.125, 1_790_000_001.0, 1_790_000_002.0]),
    ingest_time=np.array([1_790_000_000.5, 1_790_000_001.5, 1_790_000_002.5]),
    sampling_probability=np.array([0.5, 0.001, 1.0], np.float32),
    context={"device": pa.array(["phone", None, "desk"]), "hour": pa.array([7.0, 23.5, None])},
)
"""The micro-batch whose bytes are kept in golden/."""


@st.composite
def micro_batches(draw: st.DrawFn) -> MicroBatch:
    """Any micro-batch that keeps the contract."""
    gaps = draw(st.lists(st.integers(1, 5), max_size=6))
    first_offset = draw(st.integers(0, 2**60))
    offset = first_offset + np.cumsum([0, *gaps])[1:] - 1 if gaps else np.zeros(0, np.int64)
    n = len(gaps)
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    users, items = (draw(st.lists(text, min_size=n, max_size=n)) for _ in range(2))
    histories = draw(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=4), min_size=n, max_size=n))
    times = st.floats(-1e10, 1e12)
    column = st.lists(st.none() | text, min_size=n, max_size=n).map(lambda v: pa.array(v, pa.string())) | st.lists(
        st.none() | st.floats(allow_nan=False), min_size=n, max_size=n
    ).map(lambda v: pa.array(v, pa.float64()))
    return MicroBatch(
        partition=draw(st.integers(0, 1000)),
        first_offset=first_offset,
        next_offset=first_offset + sum(gaps) + draw(st.integers(0 if gaps else 1, 3)),
        offset=offset.astype(np.int64),
        user_id=pa.array(users, pa.string()),
        item_id=pa.array(items, pa.string()),
        user_hash=hash_ids(users),
        item_hash=hash_ids(items),
        history_values=np.array([value for history in histories for value in history], np.uint64),
        history_offsets=np.cumsum([0, *map(len, histories)]).astype(np.int64),
        reward=np.array(draw(st.lists(st.floats(0, 1e6, width=32), min_size=n, max_size=n)), np.float32),
        event_time=np.array(draw(st.lists(times, min_size=n, max_size=n)), np.float64),
        ingest_time=np.array(draw(st.lists(times, min_size=n, max_size=n)), np.float64),
        sampling_probability=np.array(
            draw(st.lists(st.floats(2**-30, 1, width=32), min_size=n, max_size=n)), np.float32
        ),
        context=draw(st.dictionaries(text, column, max_size=3)),
    )


def assert_same(came: MicroBatch, expected: MicroBatch) -> None:
    """Every field by value, and the arrays by dtype."""
    for name in ("partition", "first_offset", "next_offset"):
        assert getattr(came, name) == getattr(expected, name), name
    for name in (
        "offset", "user_hash", "item_hash", "history_values", "history_offsets",
        "reward", "event_time", "ingest_time", "sampling_probability",
    ):  # fmt: skip
        np.testing.assert_array_equal(getattr(came, name), getattr(expected, name), err_msg=name)
        assert getattr(came, name).dtype == getattr(expected, name).dtype, name
    assert came.user_id.equals(expected.user_id)
    assert came.item_id.equals(expected.item_id)
    assert came.context.keys() == expected.context.keys()
    for name, column in expected.context.items():
        assert came.context[name].equals(column), name
