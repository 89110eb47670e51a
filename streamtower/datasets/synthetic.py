"""Invented clicks with planted tastes, Zipf popularity and one popularity shock half-way. Needs no download.

Station: a source of clicks beside files and public data. What is planted is what a good model can find: each user
likes few tastes, each item has one, and within a taste popularity falls as 1 / rank. At half of the clicks every
taste's ranks are dealt anew: yesterday's favourites are nobody's, and a model that only counts from the start is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from streams.contract import ItemEvent
from streamtower.datasets.clicks import PIECE_ROWS, Clicks, Dataset

NUM_TASTES = 40
TASTES_PER_USER = 2
ZIPF_EXPONENT = 1.0
STRAY_SHARE = 0.1
"""Share of clicks on any taste's items, whoever clicks."""
CLICKS_PER_SECOND = 100.0
"""Of the invented event times."""
EPOCH = 1_700_000_000.0
DEVICES = ("phone", "tablet", "desktop")
_ADJECTIVES = ("amber", "brisk", "coral", "dusky", "early", "faint", "grand", "hazel", "ivory", "jolly")
_NOUNS = ("kettle", "ladder", "mirror", "napkin", "orchard", "pillow", "quilt", "ribbon", "saddle", "teapot")


def synthetic_dataset(
    num_clicks: int = 600_000, *, num_users: int = 4_000, num_items: int = 4_000, seed: int = 0
) -> Dataset:
    """The data set; the same for the same arguments.

    Args:
        num_clicks: ≥ 1; the shock comes at half of them.
        num_users: ≥ 1.
        num_items: ≥ NUM_TASTES.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    taste_of_item = np.arange(num_items) % NUM_TASTES
    tastes_of_user = np.stack([rng.permutation(NUM_TASTES)[:TASTES_PER_USER] for _ in range(num_users)])
    user_share = rng.permutation(1.0 / np.arange(1, num_users + 1) ** 0.5)
    user_edges = np.cumsum(user_share / user_share.sum())
    per_taste = num_items // NUM_TASTES
    zipf_edges = np.cumsum(1.0 / np.arange(1, per_taste + 1) ** ZIPF_EXPONENT)
    zipf_edges /= zipf_edges[-1]
    # ranked[era, taste, rank]: the item at that rank of that taste's popularity
    ranked = np.stack(
        [
            np.stack(
                [rng.permutation(np.flatnonzero(taste_of_item == taste)[:per_taste]) for taste in range(NUM_TASTES)]
            )
            for _ in range(2)
        ]
    )
    user_names = pa.array([f"user-{n}" for n in range(num_users)])
    item_names = pa.array([f"item-{n}" for n in range(num_items)])

    def clicks() -> Iterator[Clicks]:
        piece_rng = np.random.default_rng([seed, 1])
        for start in range(0, num_clicks, PIECE_ROWS):
            rows = np.arange(start, min(start + PIECE_ROWS, num_clicks))
            n = len(rows)
            users = np.searchsorted(user_edges, piece_rng.random(n)).clip(max=num_users - 1)
            tastes = tastes_of_user[users, piece_rng.integers(TASTES_PER_USER, size=n)]
            stray = piece_rng.random(n) < STRAY_SHARE
            tastes = np.where(stray, piece_rng.integers(NUM_TASTES, size=n), tastes)
            ranks = np.searchsorted(zipf_edges, piece_rng.random(n)).clip(max=per_taste - 1)
            items = ranked[(rows >= num_clicks // 2).astype(int), tastes, ranks]
            devices = piece_rng.integers(len(DEVICES), size=n)
            yield Clicks(
                user_names.take(pa.array(users)),
                item_names.take(pa.array(items)),
                EPOCH + rows / CLICKS_PER_SECOND,
                context={"device": pa.array(DEVICES).take(pa.array(devices))},
            )

    def items() -> Iterator[ItemEvent]:
        item_rng = np.random.default_rng([seed, 2])
        prices = np.round(np.exp(item_rng.normal(2.5, 0.8, num_items)), 2).tolist()
        for number, (taste, price) in enumerate(zip(taste_of_item.tolist(), prices, strict=True)):
            title = f"{_ADJECTIVES[item_rng.integers(10)]} {_NOUNS[taste % 10]} {number}"
            category = f"category-{taste}"
            yield ItemEvent(
                f"item-{number}",
                features={"category": category, "title": title, "price": price},
                payload={"title": title, "category": category, "price": price},
            )

    return Dataset(
        name="synthetic",
        num_clicks=num_clicks,
        clicks=clicks,
        items=items,
        context_features={"device": "categorical"},
        item_features={"category": "categorical", "title": "text", "price": "number"},
        item_name="title",
        num_items=num_items,
    )
