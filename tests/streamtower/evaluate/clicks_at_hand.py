"""Small data sets for the evaluation's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from streams.contract import ItemEvent
from streams.settings import StreamsSettings
from streams.state import StateConfig
from streamtower.datasets.clicks import Clicks, Dataset
from streamtower.evaluate.replay import Stream, read_clicks, stream
from trainer.settings import TrainerSettings

STATE = StateConfig(num_buckets=1024, num_hashes=2, max_users=1000, history_length=5)
STREAMS = StreamsSettings(batch_size=16, num_buckets=1024, num_hashes=2, history_length=5, history_users=1000)
TRAINER = TrainerSettings(
    embedding_dim=8, row_dim=8, item_rows=512, user_rows=64, feature_rows=64, history_length=5, rows_per_step=8,
    recent_negatives=8, recent_window=100, max_items=1000,
    refresh_clicks=8,
)  # fmt: skip


def dataset(
    users: Sequence[str], items: Sequence[str], times: Sequence[float], events: Sequence[ItemEvent] = ()
) -> Dataset:
    """These clicks, which must be in time order."""
    clicks = Clicks(pa.array(users, pa.string()), pa.array(items, pa.string()), np.array(times, np.float64))
    return Dataset(
        "at hand",
        len(clicks),
        clicks.pieces,
        lambda: iter(events),
        item_features={"brand": "categorical"} if events else {},
        num_items=len(events),
    )


def random_dataset(
    num_clicks: int, *, num_users: int = 12, num_items: int = 40, seconds_a_click: float = 1.0, seed: int = 0
) -> Dataset:
    """Users of two tastes; several clicks of one moment, and of one user in it, happen."""
    random = np.random.default_rng(seed)
    user = random.integers(num_users, size=num_clicks)
    item = (user % 2) * (num_items // 2) + (num_items // 2 * random.random(num_clicks) ** 2).astype(int)
    time = np.sort(random.integers(num_clicks // 3, size=num_clicks)) * 3 * seconds_a_click
    return dataset([f"u{u}" for u in user], [f"i{i}" for i in item], time.tolist())


def random_stream(num_clicks: int, **options: int) -> Stream:
    """The same as micro-batches."""
    cuts, _ = read_clicks(random_dataset(num_clicks, **options), STREAMS)
    return stream(cuts, STATE, TRAINER.refresh_clicks)
