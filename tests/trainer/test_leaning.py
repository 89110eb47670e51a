"""How popular items were before a micro-batch, against the whole catalogue's features at that moment."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import hash_ids
from tests.trainer.test_catalogue import click, new_catalogue
from trainer.leaning import PopularityBefore


@given(st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=4), st.lists(st.integers(0, 15)))
def test_what_items_were_before_they_are_counted_is_known_afterwards(
    batches: list[list[int]], counted: list[int]
) -> None:
    catalogue = new_catalogue(half_life_clicks=20, further_half_lives=[3.0, math.inf], max_items=12)
    for step, batch in enumerate(batches):
        click(catalogue, [str(item) for item in batch], step)
    everyone = hash_ids([str(item) for item in range(17)])
    before = np.full((17, 3), np.float32(math.log(0.02 / max(catalogue.num_items, 1))))
    rows = catalogue.find(everyone)
    before[rows >= 0] = catalogue.popularity_features()[rows[rows >= 0]]
    features_before = PopularityBefore(catalogue, hash_ids([str(item) for item in counted]))
    for item in counted:
        click(catalogue, [str(item)], 9)
    # Whoever has made room for others since has what an item without clicks has.
    dropped = (catalogue.find(everyone) < 0) & ~np.isin(everyone, hash_ids([str(item) for item in counted]))
    before[dropped] = math.log(0.02 / max(len(set(rows[rows >= 0])), 1))
    np.testing.assert_allclose(features_before(everyone), before, rtol=1e-6)
    assert features_before(everyone[:0]).shape == (0, 3)
