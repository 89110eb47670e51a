"""How far what is served lags: cosines, and the recall lost, by value."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.staleness import Sample, lag_of

ITEMS = np.arange(20, dtype=np.uint64)


def on_circle(degrees: np.ndarray) -> np.ndarray:
    """Items [n, 3]: a unit vector of two dimensions, and a popularity of 0."""
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=1).astype(np.float32)


def test_what_has_not_moved_lags_by_nothing() -> None:
    sample = Sample(ITEMS, on_circle(10.0 * np.arange(20)), on_circle(np.array([12.0, 95.0])))
    lag = lag_of(sample, sample, 2)
    assert (lag.mean_cosine, lag.p95_cosine) == pytest.approx((1.0, 1.0), abs=1e-6) and lag.recall_lost == 0.0


def test_the_mean_and_the_cosine_that_95_percent_have() -> None:
    moved = np.zeros(20)
    moved[:2] = 60.0  # cosine 0.5
    moved[2:4] = 90.0
    served = Sample(ITEMS, on_circle(10.0 * np.arange(20)), on_circle(np.array([12.0])))
    lag = lag_of(served, Sample(ITEMS, on_circle(10.0 * np.arange(20) + moved), served.queries), 2)
    assert lag.mean_cosine == pytest.approx((16 + 2 * 0.5 + 2 * 0.0) / 20, abs=1e-6)
    assert lag.p95_cosine == pytest.approx(np.quantile([0.0, 0.0, 0.5, 0.5] + [1.0] * 16, 0.05), abs=1e-6)


def test_cosines_are_of_the_embedding_alone_and_the_best_by_all_dimensions() -> None:
    served = Sample(ITEMS, on_circle(10.0 * np.arange(20)), np.array([[1.0, 0.0, 1.0]], np.float32))
    vectors = served.vectors.copy()
    vectors[18:, 2] = 5.0  # two items have become popular
    lag = lag_of(served, Sample(ITEMS, vectors, served.queries), 2)
    assert lag.mean_cosine == pytest.approx(1.0, abs=1e-6)
    assert lag.recall_lost == 1.0  # the best tenth is two items: 0 and 1 as served, 18 and 19 now


def test_recall_is_lost_as_far_as_the_best_tenth_has_changed() -> None:
    served = Sample(ITEMS, on_circle(10.0 * np.arange(20)), on_circle(np.array([1.0, 101.0])))
    now = Sample(ITEMS, served.vectors, on_circle(np.array([1.0, 112.0])))  # 10, 11 become 11, 12 → 11 and 12
    assert lag_of(served, now, 2).recall_lost == pytest.approx((0 + 0.5) / 2)
