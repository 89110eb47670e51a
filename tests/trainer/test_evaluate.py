"""Ranks and recall against a slow reference by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluate import Prequential, Ranks, excluded_pairs, expected_ranks, popularity_ranks


def slow_rank(scores: list[float], target: int, excluded: set[int]) -> float:
    """Mean rank of the target over all orders of equal scores, one item after the other."""
    if target < 0 or target in excluded or scores[target] == -math.inf:
        return math.inf
    better = equal = 0
    for item, score in enumerate(scores):
        if item != target and item not in excluded:
            better += score > scores[target]
            equal += score == scores[target]
    return 1 + better + equal / 2


def observe(evaluation: Prequential, batch: dict[str, np.ndarray], weight: float = 1.0, exclude: bool = True) -> Ranks:
    """Shows a batch, scored by cosine / 0.5 + weight · popularity."""
    popularity = batch["popularity"]
    scores = batch["query_embedding"] @ batch["item_embedding"].T / np.float32(0.5)
    scores = np.where(popularity > -np.inf, scores + weight * np.maximum(popularity, -1e30), -np.inf).astype(np.float32)
    excluded = excluded_pairs(batch["history_values"], batch["history_offsets"])[: None if exclude else 0]
    scores[excluded[:, 0], excluded[:, 1]] = -np.inf
    return evaluation.observe(scores, popularity, batch["target"], excluded)


# Small integers: every product is exact in float32, and ties abound.
small = st.integers(-2, 2)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, np.ndarray]:
    num_items, dim = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    num_rows = draw(st.integers(1, 8))
    number = st.integers(-1, num_items - 1)
    histories = draw(st.lists(st.lists(number, max_size=6), min_size=num_rows, max_size=num_rows))
    popularity = draw(st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.0]), min_size=num_items, max_size=num_items))

    def matrix(rows: int) -> np.ndarray:
        values = draw(st.lists(small, min_size=rows * dim, max_size=rows * dim))
        return np.array(values, dtype=np.float32).reshape(rows, dim)

    return {
        "query_embedding": matrix(num_rows),
        "item_embedding": matrix(num_items),
        "popularity": np.array(popularity, dtype=np.float32),
        "target": np.array(draw(st.lists(number, min_size=num_rows, max_size=num_rows)), dtype=np.int64),
        "history_values": np.array([item for history in histories for item in history], dtype=np.int64),
        "history_offsets": np.cumsum([0, *map(len, histories)]),
    }


def slow_ranks(batch: dict[str, np.ndarray], weight: float, exclude: bool) -> tuple[list[float], list[float]]:
    ranks, popularity_ranks = [], []
    popularity = batch["popularity"].tolist()
    for row, target in enumerate(batch["target"].tolist()):
        history = batch["history_values"][batch["history_offsets"][row] : batch["history_offsets"][row + 1]]
        excluded = set(history.tolist()) - {-1} if exclude else set()
        affinity = batch["item_embedding"] @ batch["query_embedding"][row] / 0.5
        scores = [
            value + weight * log_q if log_q > -math.inf else -math.inf
            for value, log_q in zip(affinity.tolist(), popularity, strict=True)
        ]
        ranks.append(slow_rank(scores, target, excluded))
        popularity_ranks.append(slow_rank(popularity, target, excluded))
    return ranks, popularity_ranks


@settings(deadline=None, max_examples=200)
@given(batch=batches(), weight=st.sampled_from([0.0, 1.0, 2.0]), exclude=st.booleans())
def test_ranks_are_those_of_the_slow_reference(batch: dict[str, np.ndarray], weight: float, exclude: bool) -> None:
    result = observe(Prequential(), batch, weight, exclude)
    ranks, by_popularity = slow_ranks(batch, weight, exclude)
    assert result.rank.tolist() == ranks
    assert result.popularity_rank.tolist() == by_popularity


def test_the_best_candidates_are_told_best_first() -> None:
    scores = np.array([[1.0, 4.0, 3.0, -np.inf], [1.0, -np.inf, 3.0, -np.inf]], dtype=np.float32)
    log_q = np.array([0.0, 0.0, 0.0, -np.inf], dtype=np.float32)
    told = Prequential(num_best=3).observe(scores, log_q, np.array([0, -1]), np.array([[1, 1]]))
    assert told.best.tolist() == [[1, 2, 0], [2, 0, -1]]
    assert told.rank.tolist() == [3.0, np.inf]


def test_equal_scores_count_by_their_expected_rank() -> None:
    """A model that gives every item the same score is no better than chance."""
    nothing = np.zeros((0, 2), dtype=np.int64)
    ranks = expected_ranks(np.zeros((100, 100), dtype=np.float32), np.arange(100))
    assert ranks.tolist() == [50.5] * 100
    assert popularity_ranks(np.zeros(100, np.float32), np.arange(100), nothing).tolist() == [50.5] * 100
    assert Ranks(ranks, ranks).recall(10) == 0.0


def batch_of(num_items: int, target: list[int], seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "query_embedding": random.normal(size=(len(target), 3)).astype(np.float32),
        "item_embedding": random.normal(size=(num_items, 3)).astype(np.float32),
        "popularity": random.normal(size=num_items).astype(np.float32),
        "target": np.array(target, dtype=np.int64),
        "history_values": random.integers(-1, num_items, 2 * len(target)),
        "history_offsets": 2 * np.arange(len(target) + 1),
    }


def test_an_item_that_is_not_known_is_a_miss_and_lowers_the_ceiling() -> None:
    evaluation = Prequential()
    ranks = observe(evaluation, batch_of(20, [3, -1, 7, -1], seed=0), exclude=False)
    assert np.isinf(ranks.rank).tolist() == [False, True, False, True]
    assert np.isinf(ranks.popularity_rank).tolist() == [False, True, False, True]
    assert evaluation.recall(100) == evaluation.popularity_recall(100) == evaluation.ceiling() == ranks.ceiling() == 0.5


def test_with_no_items_at_all_every_click_is_a_miss() -> None:
    batch = batch_of(1, [-1, -1], seed=0) | {
        "item_embedding": np.zeros((0, 3), np.float32),
        "popularity": np.zeros(0, np.float32),
        "history_values": np.full(4, -1),
    }
    ranks = observe(Prequential(), batch)
    assert np.all(np.isinf(ranks.rank))
    assert np.all(np.isinf(ranks.popularity_rank))


def test_recall_over_all_and_over_the_window_is_that_of_the_ranks() -> None:
    evaluation = Prequential(ks=(1, 5), window=10)
    random = np.random.default_rng(1)
    seen = []
    for seed, num_rows in enumerate([3, 7, 4, 25, 2]):
        seen.append(observe(evaluation, batch_of(30, random.integers(-1, 30, num_rows).tolist(), seed)))
        rank, popularity_rank = (
            np.concatenate([getattr(ranks, name) for ranks in seen]) for name in ("rank", "popularity_rank")
        )
        for k in (1, 5):
            assert evaluation.recall(k) == np.mean(rank <= k)
            assert evaluation.popularity_recall(k) == np.mean(popularity_rank <= k)
            assert evaluation.window().recall(k) == np.mean(rank[-10:] <= k)
            assert evaluation.window().popularity_recall(k) == np.mean(popularity_rank[-10:] <= k)
        assert evaluation.ceiling() == np.mean(np.isfinite(rank))
        assert evaluation.window().ceiling() == np.mean(np.isfinite(rank[-10:]))
        assert evaluation.num_evaluated == len(rank)


@pytest.mark.parametrize("num_rows", [0, 4, 10, 27])
@pytest.mark.parametrize("window", [3, 10, 40])
def test_an_evaluation_goes_on_with_the_window_of_the_one_before_and_counts_its_own_clicks(
    num_rows: int, window: int
) -> None:
    random, before, after = np.random.default_rng(2), Prequential(window=10), Prequential(window=window)
    seen = [np.zeros((0, 2))]

    def note(evaluation: Prequential, num_rows: int, seed: int) -> None:
        ranks = observe(evaluation, batch_of(30, random.integers(-1, 30, num_rows).tolist(), seed))
        seen.append(np.stack([ranks.rank, ranks.popularity_rank], axis=1))

    for start in range(0, num_rows, 9):
        note(before, min(9, num_rows - start), start)
    after.load_state_dict(before.state_dict())
    assert after.num_evaluated == 0 and np.isnan(after.recall(10))
    kept = min(num_rows, 10, window)
    for more in (0, 2, 5):
        if more:
            note(after, more, 100 + more)
        kept = min(kept + more, window)
        wanted = np.concatenate(seen)[-kept:] if kept else np.zeros((0, 2))
        np.testing.assert_array_equal(after.state_dict()["window"], wanted)
        assert sorted(after.window().rank.tolist()) == sorted(wanted[:, 0].tolist())
        assert sorted(after.window().popularity_rank.tolist()) == sorted(wanted[:, 1].tolist())
    assert after.num_evaluated == 7


def test_before_the_first_click_nothing_is_claimed() -> None:
    evaluation = Prequential()
    assert np.isnan(
        [evaluation.recall(10), evaluation.popularity_recall(10), evaluation.ceiling(), evaluation.window().recall(10)]
    ).all()


@pytest.mark.parametrize("wrong", [{"ks": ()}, {"ks": (0,)}, {"window": 0}])
def test_a_setting_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Prequential(**wrong)  # type: ignore[arg-type]
