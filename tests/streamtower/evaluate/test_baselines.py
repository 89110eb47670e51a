"""The baselines against slow references by value."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from streamtower.evaluate.baselines import ALS, FILL_HALF_LIFE, ClickCounts, Popularity
from streamtower.evaluate.contest import run
from streamtower.evaluate.knn import ItemKNN
from streamtower.evaluate.replay import Block, Stream
from tests.streamtower.evaluate.clicks_at_hand import random_stream


def slow_run(stream: Stream, scores: Callable[[Block, int], list[tuple[float, float]]]) -> list[float]:
    """Ranks of all clicks by (score, popularity), one candidate after the other."""
    ranks = []
    for block in stream.blocks:
        for row, target in enumerate(block.target.tolist()):
            history = block.history_values[block.history_offsets[row] : block.history_offsets[row + 1]].tolist()
            key = scores(block, row)
            if target >= block.num_known or target in history:
                ranks.append(math.inf)
                continue
            others = [key[i] for i in range(block.num_known) if i != target and i not in history]
            ranks.append(1 + sum(o > key[target] for o in others) + sum(o == key[target] for o in others) / 2)
    return ranks


@pytest.mark.parametrize("half_life", [5.0, 100.0, math.inf])
def test_click_counts_fall_by_half_over_their_half_life(half_life: float) -> None:
    stream = random_stream(100)
    counts = ClickCounts(len(stream.item_hash), half_life)
    for block in stream.blocks:
        counts.add(block)
    slow = np.zeros(len(stream.item_hash))
    for age, item in enumerate(reversed(stream.target.tolist())):
        slow[item] += 0.5 ** (age / half_life)
    assert np.allclose(counts.counts, slow, rtol=1e-12, atol=0)


def test_popularity_ranks_by_the_clicks_before_the_block() -> None:
    stream = random_stream(200)
    before = {start: Counter(stream.target[:start].tolist()) for start in range(0, 200, 8)}
    slow = slow_run(
        stream,
        lambda block, row: [(0.0, before[block.batch.first_offset][i]) for i in range(block.num_known)],
    )
    assert run(Popularity(stream, math.inf), stream.blocks).seen.rank.tolist() == slow


def distinct_newest_first(history: list[int]) -> list[int]:
    return list(dict.fromkeys(reversed(history)))


@pytest.mark.parametrize(("window", "decay", "shrink"), [(2, 0.5, 10.0), (20, 1.0, 0.0)])
def test_item_knn_is_the_slow_one(window: int, decay: float, shrink: float) -> None:
    stream = random_stream(400, num_users=6, num_items=30)
    pairs: dict[tuple[int, int], int] = defaultdict(int)
    clicks: Counter[int] = Counter()
    fill = ClickCounts(len(stream.item_hash), FILL_HALF_LIFE)
    scores: dict[tuple[int, int], list[float]] = {}
    popularity: dict[int, list[float]] = {}
    for block in stream.blocks:
        start = block.batch.first_offset
        popularity[start] = fill.counts.tolist()
        histories = [
            distinct_newest_first(block.history_values[low:high].tolist())
            for low, high in zip(block.history_offsets[:-1], block.history_offsets[1:], strict=True)
        ]
        for row, history in enumerate(histories):
            scores[start, row] = [
                sum(
                    decay**k * pairs[h, j] / (math.sqrt(clicks[h] * clicks[j]) + shrink)
                    for k, h in enumerate(history)
                    if pairs[h, j]
                )
                for j in range(block.num_known)
            ]
        for history, target in zip(histories, block.target.tolist(), strict=True):
            clicks[target] += 1
            for h in history[:window]:
                if h != target:
                    pairs[h, target] += 1
                    pairs[target, h] += 1
        fill.add(block)
    knn = ItemKNN(stream, window=window, decay=decay, shrink=shrink)
    seen = run(knn, stream.blocks).seen
    for item in range(len(stream.item_hash)):
        for other in range(len(stream.item_hash)):
            assert knn.counted(item, other) == pairs[item, other]

    def key(block: Block, row: int) -> list[tuple[float, float]]:
        start = block.batch.first_offset
        return [(round(score, 5), popularity[start][i]) for i, score in enumerate(scores[start, row])]

    # float32 against float64: a near tie may fall to the other side.
    assert np.mean(seen.rank == np.array(slow_run(stream, key))) > 0.97


def test_item_knn_grows_its_tables_without_forgetting() -> None:
    stream = random_stream(6_000, num_users=40, num_items=400)
    knn = ItemKNN(stream, window=5)
    run(knn, stream.blocks)
    pairs: Counter[tuple[int, int]] = Counter()
    for block in stream.blocks:
        for row, target in enumerate(block.target.tolist()):
            history = block.history_values[block.history_offsets[row] : block.history_offsets[row + 1]].tolist()
            pairs.update((h, target) for h in distinct_newest_first(history)[:5] if h != target)
    assert len(pairs) > 10_000
    for (item, other), count in pairs.items():
        assert knn.counted(item, other) == knn.counted(other, item) == count + pairs[other, item]


def test_als_folds_a_query_in_from_its_history() -> None:
    pytest.importorskip("implicit")
    stream = random_stream(320)
    als = ALS(stream, num_fits=4, factors=4, regularization=2.0, alpha=3.0)
    for earlier in stream.blocks[:-1]:
        als.observe(earlier)
    block, factors = stream.blocks[-1], als._model.item_factors.astype(np.float64)
    fitted = len(np.unique(stream.target[:240]))
    assert len(factors) == fitted, "the last fit is that at three quarters"
    scores = als._scores(block)
    for row in range(len(block)):
        history = block.history_values[block.history_offsets[row] : block.history_offsets[row + 1]].tolist()
        counts = Counter(item for item in history if item < fitted)
        confidence = {item: 3.0 * count for item, count in counts.items()}
        # Hu, Koren, Volinsky 2008, eq. 4, with implicit's meaning of alpha: confidence = alpha · clicks.
        left = factors.T @ factors + 2.0 * np.eye(4)
        right = np.zeros(4)
        for item, c in confidence.items():
            left += (c - 1) * np.outer(factors[item], factors[item])
            right += c * factors[item]
        expected = factors @ np.linalg.solve(left, right)
        assert np.allclose(scores[row, :fitted], expected, atol=2e-3)
        assert not scores[row, fitted:].any()


def test_als_ranks_by_popularity_before_its_first_fit() -> None:
    pytest.importorskip("implicit")
    stream = random_stream(64)
    first = run(ALS(stream, num_fits=1), stream.blocks).seen
    assert first.rank.tolist() == run(Popularity(stream, FILL_HALF_LIFE), stream.blocks).seen.rank.tolist()
