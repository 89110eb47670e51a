"""Drift by value: against decayed counts summed click by click, on planted shifts, and on nothing at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import UInt64Array, hash_ids
from streams.drift import (
    DriftTracker,
    FrequencyDrift,
    PopulationStability,
    frequency_drift,
    jensen_shannon,
    population_stability,
)


def hashes(num_items: int, stem: str = "item") -> UInt64Array:
    return hash_ids([f"{stem} {n}" for n in range(num_items)])


def slow_shares(items: list[int], window: float, num_items: int) -> np.ndarray:
    weights = np.exp(-np.arange(len(items))[::-1] / window)
    return np.bincount(items, weights, num_items) / weights.sum()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_the_distance_is_half_the_absolute_difference_of_decayed_shares(items: list[int]) -> None:
    fast_clicks, slow_clicks = 3.0, 20.0
    tracker = DriftTracker(2**16, fast_clicks, slow_clicks)  # wide: six items in buckets of their own
    tracker.update(hashes(6)[items])
    shares = [slow_shares(items, window, 6) for window in (fast_clicks, slow_clicks)]
    assert frequency_drift([tracker]).distance == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2, abs=1e-12)
    expected = 0.0
    for fast, slow in zip(*shares, strict=True):
        expected += sum(p / 2 * np.log2(2 * p / (fast + slow)) for p in (fast, slow) if p)
    assert jensen_shannon([tracker]).distance == pytest.approx(np.sqrt(max(expected, 0)), abs=1e-7)


@given(st.lists(st.lists(st.integers(0, 5), max_size=20), max_size=10))
def test_the_counts_do_not_depend_on_how_the_clicks_were_cut(batches: list[list[int]]) -> None:
    cut, whole = DriftTracker(8, 3, 20), DriftTracker(8, 3, 20)
    for batch in batches:
        cut.update(hashes(6)[batch])
    whole.update(hashes(6)[[item for batch in batches for item in batch]])
    for name, array in whole.state().items():
        np.testing.assert_array_equal(cut.state()[name], array)


def test_old_clicks_fade_however_many_come() -> None:
    """Weights grow with each click and are scaled down in time: here they would pass 10^470."""
    old, new = hashes(2)
    tracker = DriftTracker(64, 10, 100)
    tracker.update(np.full(1_000, old))
    tracker.update(np.full(9_900, new))
    assert np.isfinite(tracker.shares()).all()
    fast, slow = tracker.shares().max(axis=1)
    assert (fast, slow) == (pytest.approx(1.0), pytest.approx(1.0))
    assert frequency_drift([tracker]).distance < 1e-12
    tracker.update(np.full(20, old))
    # of the fast memory 1 − e^(−2) is of the last 20 clicks, of the slow one 1 − e^(−0.2)
    assert frequency_drift([tracker]).distance == pytest.approx(np.exp(-0.2) - np.exp(-2), abs=1e-9)


SHAPES = {
    "zipf 1.1": lambda rng, n: hashes(50_000)[rng.zipf(1.1, n) % 50_000],
    "zipf 1.5": lambda rng, n: hashes(50_000)[rng.zipf(1.5, n) % 50_000],
    "few items": lambda rng, n: hashes(100)[rng.integers(0, 100, n)],
    "many items": lambda rng, n: hashes(50_000)[rng.integers(0, 50_000, n)],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_clicks", [2_000, 20_000, 200_000])
def test_where_nothing_moves_the_distance_is_its_noise_and_the_drift_is_near_zero(shape: str, num_clicks: int) -> None:
    tracker = DriftTracker()
    tracker.update(SHAPES[shape](np.random.default_rng(11), num_clicks))
    drift = frequency_drift([tracker])
    assert drift.distance == pytest.approx(drift.noise, abs=0.012)
    assert drift.corrected < 0.075


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_clicks", [100, 2_000, 20_000, 200_000])
def test_the_other_two_measures_are_their_noise_where_nothing_moves(shape: str, num_clicks: int) -> None:
    tracker = DriftTracker()
    tracker.update(SHAPES[shape](np.random.default_rng(21), num_clicks))
    divergence, stability = jensen_shannon([tracker]), population_stability([tracker])
    assert divergence.distance == pytest.approx(divergence.noise, rel=0.06)
    assert divergence.corrected < 0.085
    assert stability.index < 0.004
    assert stability.noise < 0.002
    assert stability.corrected < 0.002


def test_deciles_are_of_clicks_and_a_popular_item_fills_its_own() -> None:
    """Seven items of a tenth and one of three: a move between two of the former is a move between two deciles."""
    items = hashes(9)
    before = np.repeat(items[:8], [3, 1, 1, 1, 1, 1, 1, 1])
    tracker = DriftTracker(2**16, 1_000, 100_000)
    rng = np.random.default_rng(22)
    tracker.update(rng.permutation(np.tile(before, 60_000)))
    index = population_stability([tracker]).index
    assert index == pytest.approx(population_stability([tracker]).noise, abs=0.006)
    after = np.repeat(items[:8], [3, 0, 2, 1, 1, 1, 1, 1])
    tracker.update(rng.permutation(np.tile(after, 200)))
    fast, slow = np.exp(-2), np.exp(-0.02)  # what the 2,000 new clicks leave of the old distribution
    f, s = np.array([0.1 * fast, 0.2 - 0.1 * fast]), np.array([0.1 * slow, 0.2 - 0.1 * slow])
    assert population_stability([tracker]).corrected == pytest.approx(((f - s) * np.log(f / s)).sum(), rel=0.12)


@pytest.mark.parametrize(("moved", "old_items_beside"), [(0.2, 1), (1.0, 0)])
def test_the_index_of_clicks_that_go_to_a_new_item(moved: float, old_items_beside: int) -> None:
    """Ten old items keep x of the fast and y of the slow memory; the new one's decile may hold one of them, too."""
    rng = np.random.default_rng(23)
    tracker = DriftTracker(2**16)
    tracker.update(hashes(10)[rng.integers(0, 10, 300_000)])
    shifted = hashes(10)[rng.integers(0, 10, 10_000)]
    shifted[rng.random(10_000) < moved] = hashes(1, "new")[0]
    tracker.update(shifted)
    x, y = (1 - moved * (1 - np.exp(-10_000 / window)) for window in (5_000, 50_000))
    f, s = (1 - rest + old_items_beside * rest / 10 for rest in (x, y))
    # all deciles of old items alone shrink by the same factor
    expected = (f - s) * np.log(f / s) + (s - f) * np.log((1 - f) / (1 - s))
    assert population_stability([tracker]).corrected == pytest.approx(expected, rel=0.07)


@pytest.mark.parametrize("moved", [0.3, 1.0])
@pytest.mark.parametrize("shape", ["zipf 1.1", "few items"])
def test_jensen_shannon_of_a_planted_shift(shape: str, moved: float) -> None:
    """Old items keep x of the fast and y of the slow memory, disjoint new ones have the rest: two cells each."""
    rng = np.random.default_rng(24)
    tracker = DriftTracker()
    tracker.update(SHAPES[shape](rng, 300_000))
    shifted = SHAPES[shape](rng, 10_000)
    to_new = rng.random(10_000) < moved
    shifted[to_new] = hashes(40, "new")[rng.integers(0, 40, int(to_new.sum()))]
    tracker.update(shifted)
    x, y = (1 - moved * (1 - np.exp(-10_000 / window)) for window in (5_000, 50_000))
    expected = 0.0
    for f, s in ((x, y), (1 - x, 1 - y)):
        expected += f / 2 * np.log2(2 * f / (f + s)) + s / 2 * np.log2(2 * s / (f + s))
    assert jensen_shannon([tracker]).corrected == pytest.approx(np.sqrt(expected), abs=0.03, rel=0.08)


@pytest.mark.parametrize("moved", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", ["zipf 1.1", "zipf 1.5", "few items"])
def test_a_planted_shift_reads_as_the_share_that_moved(shape: str, moved: float) -> None:
    """After 10,000 clicks of which a share goes to new items: that share of e^(−10000/50000) − e^(−10000/5000)."""
    rng = np.random.default_rng(12)
    tracker = DriftTracker()
    tracker.update(SHAPES[shape](rng, 200_000))
    shifted = SHAPES[shape](rng, 10_000)
    to_new = rng.random(10_000) < moved
    shifted[to_new] = hashes(40, "new")[rng.integers(0, 40, int(to_new.sum()))]
    tracker.update(shifted)
    expected = moved * (np.exp(-0.2) - np.exp(-2))
    assert frequency_drift([tracker]).corrected == pytest.approx(expected, abs=0.04 + 0.1 * expected)


def test_partitions_taken_together_are_less_noisy_and_show_what_they_share() -> None:
    rng = np.random.default_rng(13)
    trackers = [DriftTracker() for _ in range(4)]
    for tracker in trackers:
        tracker.update(SHAPES["zipf 1.1"](rng, 100_000))
    alone, together = frequency_drift(trackers[:1]), frequency_drift(trackers)
    assert together.noise == pytest.approx(alone.noise / 2, rel=0.05)
    assert together.distance == pytest.approx(together.noise, abs=0.01)
    for tracker in trackers:
        tracker.update(np.full(5_000, hashes(1, "new")[0]))
    assert frequency_drift(trackers).corrected == pytest.approx(np.exp(-0.1) - np.exp(-1), abs=0.03)


def test_opposite_moves_of_two_partitions_cancel() -> None:
    one, other = hashes(2)
    trackers = [DriftTracker(1024, 10, 100), DriftTracker(1024, 10, 100)]
    trackers[0].update(np.array([one] * 1_000 + [other] * 10))
    trackers[1].update(np.array([other] * 1_000 + [one] * 10))
    assert frequency_drift(trackers[:1]).distance > 0.5
    assert frequency_drift(trackers).distance < 1e-9


def test_before_any_click_nothing_has_moved() -> None:
    assert frequency_drift([]) == frequency_drift([DriftTracker()]) == FrequencyDrift(0.0, 0.0)
    assert jensen_shannon([]) == jensen_shannon([DriftTracker()]) == FrequencyDrift(0.0, 0.0)
    assert population_stability([]) == population_stability([DriftTracker()]) == PopulationStability(0.0, 0.0)
    silent, busy = DriftTracker(), DriftTracker()
    busy.update(hashes(1_000))
    for measure in (frequency_drift, jensen_shannon, population_stability):
        assert measure([silent, busy]) == measure([busy])


def test_noise_is_taken_off_like_the_side_of_a_right_angle() -> None:
    assert FrequencyDrift(0.5, 0.3).corrected == pytest.approx(0.4)
    assert FrequencyDrift(0.2, 0.3).corrected == 0.0


def test_noise_is_taken_off_the_stability_index_plainly() -> None:
    assert PopulationStability(0.5, 0.3).corrected == pytest.approx(0.2)
    assert PopulationStability(0.2, 0.3).corrected == 0.0


def test_a_tracker_goes_on_from_a_state_bit_for_bit() -> None:
    rng = np.random.default_rng(14)
    first, second = DriftTracker(64, 5, 50), DriftTracker(64, 5, 50)
    first.update(hashes(100)[rng.integers(0, 100, 3_000)])
    second.restore(first.state())
    more = hashes(100)[rng.integers(0, 100, 500)]
    first.update(more)
    second.update(more)
    assert frequency_drift([first]) == frequency_drift([second])
    assert population_stability([first]) == population_stability([second])
    with pytest.raises(ValueError, match=r"\(2, 2, 128\)"):
        DriftTracker(128).restore(first.state())


@pytest.mark.parametrize("arguments", [(1, 5, 50), (100, 5, 50), (64, 50, 50), (64, 0, 50), (64, 5, float("inf"))])
def test_arguments_outside_their_range_are_refused(arguments: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        DriftTracker(*arguments)
