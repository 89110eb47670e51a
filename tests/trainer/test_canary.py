"""Canary queries: invented users of a version, and the recall of what was found for them."""

from __future__ import annotations

import numpy as np
import pytest

from streams.contract import hash_ids
from tests.trainer.small_trainer import CONFIG
from trainer.canary import invent_users, recall_of
from trainer.contract import Manifest, query_vector
from trainer.towers import build_towers, query_inputs

MANIFEST = Manifest(
    model_version=7, collection="items__v7", embedding_dim=8, popularity_dims=2, popularity_scale=20.0,
    popularity_weights=[0.7, 0.1], popularity_slopes=[0.2, 0.0], temperature=0.1, towers=CONFIG.to_dict(), num_items=9,
    step=1, source_offsets={}, settings_hash="", created_at=1.0,
)  # fmt: skip


def test_recall_is_the_share_of_the_exact_best_that_were_found() -> None:
    best = [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    assert recall_of([best], [best]) == 1.0
    assert recall_of([[(1, 3.0), (3, 1.0), (9, 0.2), (8, 0.1)]], [best]) == 0.5
    assert recall_of([best, []], [best, best]) == 0.5
    assert recall_of([[]], [[]]) == 1.0


def test_another_item_that_is_as_good_as_the_last_one_counts() -> None:
    assert recall_of([[(1, 3.0), (7, 1.0)]], [[(1, 3.0), (2, 1.0)]]) == 1.0
    assert recall_of([[(1, 3.0), (7, 0.99)]], [[(1, 3.0), (2, 1.0)]]) == 0.5


def test_the_queries_are_those_of_the_version_for_users_of_one_to_five_items() -> None:
    tower, _ = build_towers(CONFIG)
    items = hash_ids([f"i{n}" for n in range(9)])
    users, again = (invent_users(CONFIG, items, 10, seed=7) for _ in range(2))
    assert users.lengths.tolist() == [1, 2, 3, 4, 5] * 2
    queries = users.queries(MANIFEST, tower(users.inputs).detach().numpy())
    np.testing.assert_array_equal(queries, again.queries(MANIFEST, tower(again.inputs).detach().numpy()))
    assert queries.shape == (10, 10)
    first = np.random.default_rng(7).choice(items, 30)[:1]  # 2 · (1 + … + 5) items
    embedding = tower(query_inputs(CONFIG, None, first, np.array([0, 1])))[0].tolist()
    assert queries[0].tolist() == pytest.approx(query_vector(MANIFEST, embedding, 1.0, 1), rel=1e-5)
