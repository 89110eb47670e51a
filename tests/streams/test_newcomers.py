"""Clicks on young items by value: against a dictionary of births, on a planted wave of new items, and without any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import UInt64Array, hash_ids
from streams.newcomers import NewcomerTracker, YoungClicks, young_clicks


def hashes(num_items: int, stem: str = "item") -> UInt64Array:
    return hash_ids([f"{stem} {n}" for n in range(num_items)])


clicks = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=60)


@given(clicks=clicks, cuts=st.sets(st.integers(1, 59)))
def test_shares_are_those_of_a_dictionary_of_first_clicks(clicks: list[tuple[int, int]], cuts: set[int]) -> None:
    windows, minutes = (3.0, 20.0), 2.0
    tracker = NewcomerTracker(minutes, *windows, num_buckets=2**16)
    times = np.cumsum([seconds for _, seconds in clicks]).astype(np.float64)
    items = [item for item, _ in clicks]
    for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), 60], strict=True):
        tracker.update(hashes(10)[items[low:high]], times[low:high])
    born: dict[int, float] = {}
    young = []
    for item, time in zip(items, times, strict=True):
        born.setdefault(item, time)
        if time - times[0] >= 60 * minutes:
            young.append(time - born[item] < 60 * minutes)
    assert tracker.num_clicks == len(young)
    for window, share in zip(windows, tracker.shares(), strict=True):
        weights = np.exp(-np.arange(len(young))[::-1] / window)
        assert share == pytest.approx(np.average(young, weights=weights) if young else 0.0)


def test_a_wave_of_new_items_is_seen_and_passes() -> None:
    """One click a second; after five hours of the old items, a third of the clicks goes to items of the last hour."""
    rng = np.random.default_rng(31)
    tracker = NewcomerTracker(60, 500, 50_000)
    num_old = 5 * 3_600
    tracker.update(hashes(100)[rng.integers(0, 100, num_old)], np.arange(num_old) * 1.0)
    before = young_clicks([tracker])
    assert before.share == pytest.approx(0.0, abs=1e-9)
    assert before.usual < 0.02  # at the start of the second hour, items of the first minutes were young
    items = hashes(100)[rng.integers(0, 100, 3_600)]
    to_new = rng.random(3_600) < 1 / 3
    items[to_new] = hashes(20, "new")[rng.integers(0, 20, int(to_new.sum()))]
    tracker.update(items, num_old + np.arange(3_600) * 1.0)
    seen = young_clicks([tracker])
    assert seen.share == pytest.approx((1 - np.exp(-7.2)) / 3, abs=0.05)
    usual = (1 - np.exp(-3_600 / 50_000)) / (1 - np.exp(-num_old / 50_000)) / 3
    assert seen.usual == pytest.approx(usual, abs=0.01)
    assert seen.drift.corrected == pytest.approx(1 / 3 - usual, abs=0.05)
    # two hours later they are old
    tracker.update(items[:3_600], num_old + 3 * 3_600 + np.arange(3_600) * 1.0)
    assert young_clicks([tracker]).share == pytest.approx(np.exp(-7.2) / 3, abs=0.001)


def test_steady_newcomers_are_no_drift_and_the_noise_is_what_chance_gives() -> None:
    """Each click on a new item with the probability .1: share − usual has the standard deviation that is told."""
    differences, noises = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        items = hash_ids([f"{seed} old"] * 12_000)
        is_new = rng.random(12_000) < 0.1
        items[is_new] = rng.integers(0, 2**63, int(is_new.sum()))
        tracker = NewcomerTracker(1, 200, 2_000, num_buckets=2**20)
        tracker.update(items, np.arange(12_000) * 1.0)
        seen = young_clicks([tracker])
        assert seen.usual == pytest.approx(0.1, abs=0.03)
        differences.append(seen.share - seen.usual)
        noises.append(seen.noise)
    assert np.std(differences) == pytest.approx(np.mean(noises), rel=0.3)
    assert abs(np.mean(differences)) < 4 * np.mean(noises) / np.sqrt(40)


def test_a_collision_makes_a_new_item_look_old_only_if_every_bucket_was_hit() -> None:
    old, new = hashes(3_000), hashes(1_000, "new")
    tracker = NewcomerTracker(1, 1e6, 1e7, num_buckets=2_000, num_hashes=2)
    tracker.update(old, np.zeros(3_000))
    tracker.update(new, np.full(1_000, 100.0))
    # 1 − e^(−3000/2000) of the buckets were hit before; new items that share a bucket are young together
    assert 1 - tracker.shares()[0] == pytest.approx((1 - np.exp(-1.5)) ** 2, abs=0.05)


def test_partitions_weigh_the_same_and_less_noise_is_left() -> None:
    trackers = [NewcomerTracker(1, 50, 500) for _ in range(2)]
    for tracker, stem in zip(trackers, ("a", "b"), strict=True):
        tracker.update(np.repeat(hashes(1, stem), 1_000), np.arange(1_000) * 1.0)
    trackers[0].update(hashes(50, "new"), np.full(50, 1_001.0))
    one, both = young_clicks(trackers[:1]), young_clicks([*trackers, NewcomerTracker(1, 50, 500)])
    assert one.share == pytest.approx((1 - np.exp(-1)) / (1 - np.exp(-990 / 50)))
    assert (both.share, both.usual) == (pytest.approx(one.share / 2), pytest.approx(one.usual / 2))
    ratio = np.sqrt(both.usual * (1 - both.usual) / (one.usual * (1 - one.usual)) / 2)
    assert both.noise == pytest.approx(one.noise * ratio, rel=0.02)
    assert young_clicks([]) == YoungClicks(0.0, 0.0, 0.0)


def test_a_tracker_goes_on_from_a_state_bit_for_bit() -> None:
    rng = np.random.default_rng(33)
    first, second, fresh = (NewcomerTracker(1, 5, 50, 64) for _ in range(3))
    second.restore(fresh.state())
    for n in range(3):
        items, times = hashes(100)[rng.integers(0, 100, 300)], np.sort(rng.random(300)) * 100 + n * 100
        first.update(items, times)
        second.update(items, times)
        for name, array in first.state().items():
            np.testing.assert_array_equal(second.state()[name], array)
        second = NewcomerTracker(1, 5, 50, 64)
        second.restore(first.state())
    with pytest.raises(ValueError, match=r"\(2, 128\)"):
        NewcomerTracker(1, 5, 50, 128).restore(first.state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"young_minutes": 0.0}, "young_minutes"),
        ({"young_minutes": float("inf")}, "young_minutes"),
        ({"fast_clicks": 50_000}, "windows"),
        ({"num_buckets": 1}, "num_buckets"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NewcomerTracker(**arguments)  # type: ignore[arg-type]
