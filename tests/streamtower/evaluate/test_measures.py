"""Measures by value."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamtower.evaluate.measures import is_tail, mean_and_std, measures, over_time, recall, second_half
from streamtower.evaluate.ranking import Seen
from streamtower.evaluate.replay import Stream, read_clicks, stream
from tests.streamtower.evaluate.clicks_at_hand import STATE, STREAMS, dataset


def ten_items() -> Stream:
    """Blocks of 16: i0 has 20 clicks, i1 eight, the others one each, i9 the very last."""
    items = ["i0"] * 20 + ["i1"] * 8 + [f"i{number}" for number in range(2, 10)]
    data = dataset([f"u{number}" for number in range(36)], items, [float(second) for second in range(36)])
    return stream(read_clicks(data, STREAMS)[0], STATE)


def test_every_measure_is_what_its_formula_says() -> None:
    clicks = ten_items()
    rank = np.full(36, math.inf)
    rank[[0, 20, 28, 33]] = [1.0, 2.0, 10.0, 64.0]
    best = np.full((36, 10), -1, np.int64)
    best[20, :3] = [0, 1, 4]
    best[28, :2] = [0, 9]
    best[0, :2] = [7, 8]  # not evaluated
    found = measures(clicks, Seen(rank, best), np.arange(36) >= 20).to_dict()
    expected = {
        "recall_at_10": 2 / 16,
        "recall_at_50": 2 / 16,
        "recall_at_100": 3 / 16,
        "ndcg_at_10": (1 / math.log2(3) + 1 / math.log2(11)) / 16,
        "mrr": (1 / 2 + 1 / 10 + 1 / 64) / 16,
        "coverage_at_10": 4 / 10,
        "tail_ratio_at_10": 2 / 5,
        # Cold: i1 has no click before the second block, in which 8 of its 8 fall; i2 … i9 have none, too.
        "cold_recall_at_10": 2 / 16,
        "cold_recall_at_100": 3 / 16,
        "ceiling": 3 / 16,
    }
    assert found == pytest.approx(expected)


def test_an_item_is_cold_by_its_clicks_before_the_block() -> None:
    clicks = ten_items()
    assert clicks.earlier_clicks[[0, 15, 16, 19, 20, 35]].tolist() == [0, 0, 16, 16, 0, 0]
    rank = np.ones(36)
    found = measures(clicks, Seen(rank, np.full((36, 10), -1)), np.arange(36) >= 16)
    assert found.cold_recall_at_10 == 1.0
    assert measures(clicks, Seen(rank, np.full((36, 10), -1)), np.arange(36) == 16).cold_recall_at_10 == 0.0


def test_the_long_tail_is_all_but_the_most_clicked_fifth() -> None:
    assert is_tail(ten_items()).tolist() == [False, False, *[True] * 8]


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(ValueError, match="no click"):
        measures(ten_items(), Seen.nothing(36), np.zeros(36, bool))


def test_recall_over_time_has_a_mean_for_each_stretch() -> None:
    hits = np.array([True, False, True, True, False])
    assert over_time(hits, 2).tolist() == [pytest.approx(2 / 3), 0.5]
    assert over_time(hits, 40).tolist() == hits.tolist()
    assert recall(np.array([1.0, 11.0, math.inf]), 10) == pytest.approx(1 / 3)
    assert recall(np.zeros(0), 10) == 0.0
    assert second_half(5).tolist() == [False, False, True, True, True]


def test_the_deviation_is_that_of_a_sample() -> None:
    assert mean_and_std([1.0, 2.0, 3.0]) == {"mean": 2.0, "std": 1.0}
    assert mean_and_std([4.0]) == {"mean": 4.0, "std": 0.0}
