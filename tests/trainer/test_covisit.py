"""Co-visitation against an exact counter by value, within its bound; its sparse vectors against its scores."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.contract import hash_ids
from trainer.contract import Manifest, covisit_query
from trainer.covisit import Covisit

Click = tuple[int, list[int]]


def count(covisit: Covisit, clicks: list[Click], num_rows: int) -> None:
    covisit.extend(num_rows)
    rows = np.array([row for row, _ in clicks], dtype=np.int64)
    values = np.array([row for _, history in clicks for row in history], dtype=np.int64)
    covisit.count(rows, values, np.cumsum([0, *(len(history) for _, history in clicks)]))


class ExactCounts:
    """Every pair, one click after the other."""

    def __init__(self, window: int, half_life: float = math.inf) -> None:
        self.window, self.decay = window, 0.5 ** (1 / half_life)
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.clicks: Counter[int] = Counter()

    def count(self, clicks: list[Click]) -> None:
        """Clicks of one call weigh the same; then all fade."""
        for clicked, history in clicks:
            newest = list(dict.fromkeys(item for item in reversed(history) if item not in (-1, clicked)))[: self.window]
            for item in newest:
                self.pairs[clicked, item] += 1
                self.pairs[item, clicked] += 1
            self.clicks[clicked] += 1
        for counts in (self.pairs, self.clicks):
            for key in counts:
                counts[key] *= self.decay ** len(clicks)

    def partners(self, row: int) -> dict[int, float]:
        return {item: number for (of, item), number in self.pairs.items() if of == row}

    def score(self, history: list[int], row: int, num_items: int, length: int, decay: float) -> float:
        newest = history[::-1][:length]
        weights = [decay**age for age in range(len(newest))]
        lift = (sum(self.clicks.values()) + num_items) / (self.clicks[row] + 1)
        return sum(
            weight / sum(weights) * self.pairs[item, row] / (10 * self.clicks[item] + 10) * lift
            for item, weight in zip(newest, weights, strict=True)
            if item >= 0
        )


rows = st.integers(0, 11)
clicks_of_rows = st.lists(st.tuples(rows, st.lists(st.one_of(rows, st.just(-1)), max_size=8)), max_size=20)


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(clicks_of_rows, max_size=5), half_life=st.sampled_from([math.inf, 7.0, 0.5]))
def test_while_an_item_has_room_its_counts_are_exact(parts: list[list[Click]], half_life: float) -> None:
    covisit, exact = Covisit(16, window=3, half_life_clicks=half_life), ExactCounts(3, half_life)
    for clicks in parts:
        count(covisit, clicks, 12)
        exact.count(clicks)
    for row in range(12):
        mine, wanted = covisit.partners(row) if len(covisit) else {}, exact.partners(row)
        assert mine.keys() == wanted.keys()
        assert mine == pytest.approx(wanted, rel=1e-4)


@settings(deadline=None, max_examples=100)
@given(clicks=clicks_of_rows, histories=st.lists(st.lists(st.one_of(rows, st.just(-1)), max_size=6), max_size=4))
def test_scores_are_the_formula_by_value(clicks: list[Click], histories: list[list[int]]) -> None:
    covisit, exact = Covisit(16, window=4, history_length=3, history_decay=0.7), ExactCounts(4)
    count(covisit, clicks, 12)
    exact.count(clicks)
    values = np.array([row for history in histories for row in history], dtype=np.int64)
    scores = covisit.scores(values, np.cumsum([0, *map(len, histories)]), 12)
    wanted = [[exact.score(history, row, 12, 3, 0.7) for row in range(12)] for history in histories]
    np.testing.assert_allclose(scores, np.array(wanted).reshape(-1, 12), rtol=1e-5, atol=1e-7)


def test_sparse_item_and_query_vectors_multiply_to_the_score() -> None:
    random = np.random.default_rng(3)
    clicks = [(int(random.integers(30)), random.integers(30, size=6).tolist()) for _ in range(400)]
    covisit = Covisit(8, window=5, history_length=4, history_decay=0.9)
    count(covisit, clicks, 30)
    hashes = hash_ids([f"item {row}" for row in range(30)])
    history = [3, 17, 3, 29, 8]
    manifest = Manifest(
        model_version=1, collection="", embedding_dim=1, popularity_dims=1, popularity_scale=1.0,
        popularity_weights=[1.0], temperature=1.0, towers={}, num_items=30, step=1, source_offsets={}, settings_hash="",
        created_at=0.0, covisit_weight=1.0, covisit_scale=0.3 / 10, covisit_decay=0.9, history_length=4,
    )  # fmt: skip
    query = dict(zip(*covisit_query(manifest, hashes[history].tolist()), strict=True))
    vectors = covisit.item_vectors(np.arange(30), hashes)
    scores = 0.3 * covisit.scores(np.array(history), np.array([0, 5]), 30)[0]
    for row in range(30):
        part = slice(vectors.offsets[row], vectors.offsets[row + 1])
        assert len(set(vectors.indices[part])) == len(vectors.indices[part]) <= 8
        entries = zip(vectors.indices[part].tolist(), vectors.values[part].tolist(), strict=True)
        assert sum(value * query.get(index, 0.0) for index, value in entries) == pytest.approx(scores[row], rel=1e-4)


def test_of_two_partners_with_the_same_index_the_stronger_is_published() -> None:
    covisit = Covisit(8)
    count(covisit, [(0, [1]), (0, [2]), (0, [2])], 3)
    hashes = np.array([5, 7, 7 + 2**32], dtype=np.uint64)
    vectors = covisit.item_vectors(np.array([0]), hashes)
    # Two of three clicks on row 0 with row 2 before; (3 clicks + 3 items) / ((3 + 1) · (0 + 1))
    assert vectors.indices.tolist() == [7] and vectors.values.tolist() == [2 * 6 / 4]


def stream(num_items: int, num_clicks: int, seed: int) -> list[Click]:
    """Users with tastes: the items of a group of ten are clicked together, some groups more often."""
    random = np.random.default_rng(seed)
    group = np.minimum(random.geometric(0.15, num_clicks) - 1, num_items // 10 - 1)

    def items(number: int) -> list[int]:
        own = 10 * group[number] + random.integers(10, size=7)
        return np.where(random.random(7) < 0.25, random.integers(num_items, size=7), own).tolist()  # type: ignore[no-any-return]

    return [(drawn[0], drawn[1:]) for drawn in map(items, range(num_clicks))]


def test_a_full_items_counts_are_never_above_the_exact_ones_and_keep_its_strongest_partners() -> None:
    clicks, exact, covisit = stream(300, 20_000, 5), ExactCounts(10), Covisit(16)
    exact.count(clicks)
    for start in range(0, len(clicks), 256):
        count(covisit, clicks[start : start + 256], 300)
    found = strong = 0
    for row in range(300):
        mine, wanted = covisit.partners(row), exact.partners(row)
        assert len(mine) <= 16
        assert all(number <= wanted[partner] for partner, number in mine.items())
        if row < 60:  # the groups that are clicked often
            strongest = Counter(wanted).most_common(9)
            strong += sum(number for _, number in strongest)
            found += sum(mine.get(partner, 0.0) for partner, _ in strongest)
    assert found / strong > 0.97


def test_the_same_clicks_give_the_same_counts_also_after_a_resume() -> None:
    clicks = stream(200, 4_000, 6)
    whole, first = Covisit(8, half_life_clicks=500.0), Covisit(8, half_life_clicks=500.0)
    for start in range(0, 4_000, 100):
        count(whole, clicks[start : start + 100], 200)
        if start < 2_000:
            count(first, clicks[start : start + 100], 200)
    second = Covisit(8, half_life_clicks=500.0)
    second.load_state_dict(first.state_dict())
    for start in range(2_000, 4_000, 100):
        count(second, clicks[start : start + 100], 200)
    for name, array in whole.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[name], array, err_msg=name)


def test_a_state_of_another_number_of_partners_is_refused() -> None:
    with pytest.raises(ValueError, match="of 8 partners, not of 16"):
        covisit = Covisit(8)
        covisit.extend(1)
        Covisit(16).load_state_dict(covisit.state_dict())


def test_dropped_items_are_no_partners_any_more_and_the_others_keep_theirs() -> None:
    covisit = Covisit(8)
    count(covisit, [(0, [1]), (2, [0]), (2, [1]), (3, [2])], 5)
    covisit.keep(np.array([1, 2, 3]))
    assert len(covisit) == 3
    assert [covisit.partners(row) for row in range(3)] == [{1: 1.0}, {0: 1.0, 2: 1.0}, {1: 1.0}]
    covisit.extend(4)
    assert covisit.partners(3) == {}


def test_counts_of_a_short_half_life_outlive_the_range_of_a_number() -> None:
    covisit = Covisit(8, half_life_clicks=1.0)
    for _ in range(1_000):
        count(covisit, [(0, [1])] * 10, 2)
    assert covisit.partners(0) == pytest.approx({1: sum(10 * 0.5 ** (10 * k) for k in range(1, 50))}, rel=1e-3)
