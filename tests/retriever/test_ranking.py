"""Maximal marginal relevance against a slow obvious reference, and the parts of a score."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever.encode import Query
from retriever.ranking import MAX_POOL, diverse, explain, pool_size


def slowly_diverse(scores: np.ndarray, embeddings: np.ndarray, k: int, diversity: float) -> list[int]:
    """The definition, candidate by candidate."""
    spread = scores.max() - scores.min()
    chosen = [int(scores.argmax())]
    while len(chosen) < min(k, len(scores)):
        gains = {}
        for place in range(len(scores)):
            if place in chosen:
                continue
            cosines = [
                embeddings[place] @ embeddings[other]
                / (np.linalg.norm(embeddings[place]) * np.linalg.norm(embeddings[other]))
                for other in chosen
            ]  # fmt: skip
            relevance = (scores[place] - scores.min()) / spread
            gains[place] = (1 - diversity) * relevance - diversity * max(cosines)
        chosen.append(max(gains, key=lambda place: gains[place]))
    return chosen


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 30), k=st.integers(1, 40), diversity=st.floats(0.01, 1))
def test_the_chosen_are_those_of_the_definition(seed: int, n: int, k: int, diversity: float) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(size=n).astype(np.float32)
    embeddings = random.normal(size=(n, 6)).astype(np.float32)
    assert diverse(scores, embeddings, k, diversity).tolist() == slowly_diverse(
        scores.astype(np.float64), embeddings.astype(np.float64), k, diversity
    )


def test_twins_come_last_when_only_diversity_counts() -> None:
    embeddings = np.array([[1, 0], [2, 0], [0, 1], [-1, 0]], np.float32)
    scores = np.array([4, 3, 2, 1], np.float32)
    assert diverse(scores, embeddings, 4, 1.0).tolist() == [0, 3, 2, 1]
    assert diverse(scores, embeddings, 4, 0.0).tolist() == [0, 1, 2, 3]
    assert diverse(scores[:0], embeddings[:0], 4, 0.5).tolist() == []
    assert diverse(np.ones(3, np.float32), np.zeros((3, 2), np.float32), 2, 0.5).tolist() == [0, 1]


def test_the_pool_is_four_times_what_is_wanted_within_bounds() -> None:
    assert [pool_size(k, 0.0) for k in (1, 1000)] == [1, 1000]
    assert [pool_size(k, 0.3) for k in (1, 100, 500, 1000)] == [4, 400, 2000, MAX_POOL]


def test_the_parts_of_a_score_are_what_they_are_called() -> None:
    query = Query(dense=[1.0, 2.0, 10.0], indices=[5, 7], values=[0.5, 0.25], covisit_weight=2.0)
    parts = explain(query, 2, 2 * math.log(2), [0.5, 0.25, -0.1], {7: 4.0, 9: 100.0})
    assert parts.affinity == 1.0
    assert parts.popularity == -1.0
    assert parts.covisitation == pytest.approx(2 * np.log(2))
    assert explain(Query([1.0, 0.0], [], [], 0.0), 1, 0.25, [0.25, 3.0], {}).covisitation == 0.0
