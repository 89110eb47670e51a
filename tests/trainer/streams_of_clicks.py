"""Micro-batches for the trainer's tests: random clicks with histories, as streams would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from streams.contract import MicroBatch, hash_ids


def micro_batch(
    item_ids: Sequence[str],
    *,
    partition: int = 0,
    first_offset: int = 0,
    next_offset: int | None = None,
    user_ids: Sequence[str] | None = None,
    histories: Sequence[Sequence[str]] | None = None,
    reward: float = 1.0,
    ingest_time: float = 1_000.0,
    context: Mapping[str, pa.Array] | None = None,
) -> MicroBatch:
    """One click for each item id, at consecutive offsets."""
    n = len(item_ids)
    user_ids = [f"u{i}" for i in range(n)] if user_ids is None else user_ids
    histories = [[] for _ in range(n)] if histories is None else histories
    return MicroBatch(
        partition=partition,
        first_offset=first_offset,
        next_offset=first_offset + n if next_offset is None else next_offset,
        offset=np.arange(first_offset, first_offset + n),
        user_id=pa.array(user_ids, pa.string()),
        item_id=pa.array(item_ids, pa.string()),
        user_hash=hash_ids(user_ids),
        item_hash=hash_ids(item_ids),
        history_values=hash_ids([item for history in histories for item in history]),
        history_offsets=np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64),
        reward=np.full(n, reward, np.float32),
        event_time=np.full(n, ingest_time),
        ingest_time=np.full(n, ingest_time),
        sampling_probability=np.full(n, 0.01, np.float32),
        context=dict(context or {}),
    )


def click_stream(
    num_batches: int, *, partition: int = 0, rows: int = 16, num_items: int = 60, num_users: int = 12, seed: int = 0
) -> list[MicroBatch]:
    """Micro-batches of one partition without a gap: users of two tastes, with histories of their last five clicks."""
    random = np.random.default_rng([seed, partition])
    last: dict[int, list[str]] = {user: [] for user in range(num_users)}
    batches = []
    for number in range(num_batches):
        users = random.integers(num_users, size=rows)
        items, histories = [], []
        for user in users.tolist():
            low = 0 if user % 2 else num_items // 2
            item = f"item-{low + int(random.integers(num_items // 2) * random.random())}"
            histories.append(list(last[user]))
            items.append(item)
            last[user] = [*last[user], item][-5:]
        batches.append(
            micro_batch(
                items,
                partition=partition,
                first_offset=number * rows,
                user_ids=[f"user-{partition}-{user}" for user in users],
                histories=histories,
            )
        )
    return batches
