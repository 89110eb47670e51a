"""The evaluation by day."""

from __future__ import annotations

import numpy as np
import pytest

from streamtower.datasets.clicks import DatasetError
from streamtower.evaluate.sequential import chosen, days_of, evaluate_by_day, summary
from tests.streamtower.evaluate.clicks_at_hand import STREAMS, TRAINER, dataset, random_dataset


def test_days_count_from_that_of_the_first_click() -> None:
    assert days_of(np.array([86_399.0, 86_400.0, 3 * 86_400.0 - 1, 3 * 86_400.0])).tolist() == [0, 1, 2, 3]


def test_of_each_later_day_a_share_is_held_out() -> None:
    day = np.repeat([0, 1, 2, 3], [50, 100, 20, 4])
    held_out = chosen(day, 1, 0.1, seed=0)
    assert [int(held_out[day == number].sum()) for number in range(4)] == [0, 10, 2, 0]
    assert held_out.tolist() == chosen(day, 1, 0.1, seed=0).tolist()
    assert held_out.tolist() != chosen(day, 1, 0.1, seed=1).tolist()


def test_every_held_out_click_is_tested_by_both_models() -> None:
    data = random_dataset(1_500, seconds_a_click=1_000)
    result = evaluate_by_day(data, STREAMS, TRAINER, {}, first_day=4)
    [piece] = data.clicks()
    day = days_of(piece.event_time)
    held_out = chosen(day, 4, 0.1, seed=0)
    assert [(one.day, one.num_tested) for one in result.days] == [
        (int(number), int((day[held_out] == number).sum())) for number in np.unique(day[held_out])
    ]
    assert (result.num_clicks, result.num_users) == (1_500, 12)
    for one in result.days:
        for which in (one.live, one.frozen):
            assert 0 <= which[10] <= which[50] <= which[100] <= 1
    plain = summary([result, result], 4)
    assert plain["means"]["live"]["10"] == {"mean": result.mean("live", 10), "std": 0.0}
    assert plain["days"][0]["frozen"]["100"] == result.days[0].frozen[100]


def test_the_frozen_model_is_the_live_one_until_that_learns_on() -> None:
    """Without anything to learn after d0, both say the same of every held-out click."""
    [piece] = random_dataset(600).clicks()
    times = [86_400.0 * (number // 160) + number for number in range(600)]  # each day's clicks are ten blocks
    data = dataset(piece.user_id.to_pylist(), piece.item_id.to_pylist(), times)
    result = evaluate_by_day(data, STREAMS, TRAINER, {}, first_day=2, held_out_ratio=1.0)
    assert [one.day for one in result.days] == [2, 3]
    assert all(one.live == one.frozen for one in result.days)
    assert any(one.live[10] > 0 for one in result.days)


def test_data_that_end_before_the_first_day_are_refused() -> None:
    with pytest.raises(DatasetError, match="no clicks after day 40"):
        evaluate_by_day(random_dataset(300, seconds_a_click=1_000), STREAMS, TRAINER, {}, first_day=40)
