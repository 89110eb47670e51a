"""The drift by value: against decayed counts summed click by click, on planted shifts, and on nothing at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import UInt64Array, hash_ids
from streams.drift import DriftTracker, FrequencyDrift, frequency_drift


def hashes(num_items: int, stem: str = "item") -> UInt64Array:
    return hash_ids([f"{stem} {n}" for n in range(num_items)])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_the_distance_is_half_the_absolute_difference_of_decayed_shares(items: list[int]) -> None:
    fast_clicks, slow_clicks = 3.0, 20.0
    tracker = DriftTracker(2**16, fast_clicks, slow_clicks)  # wide: six items in buckets of their own
    tracker.update(hashes(6)[items])
    age = np.arange(len(items))[::-1]
    shares = []
    for window in (fast_clicks, slow_clicks):
        weights = np.exp(-age / window)
        shares.append(np.bincount(items, weights, 6) / weights.sum())
    assert frequency_drift([tracker]).distance == pytest.approx(np.abs(shares[0] - shares[1]).sum() / 2, abs=1e-12)


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
    silent, busy = DriftTracker(), DriftTracker()
    busy.update(hashes(1_000))
    assert frequency_drift([silent, busy]) == frequency_drift([busy])


def test_noise_is_taken_off_like_the_side_of_a_right_angle() -> None:
    assert FrequencyDrift(0.5, 0.3).corrected == pytest.approx(0.4)
    assert FrequencyDrift(0.2, 0.3).corrected == 0.0


def test_a_tracker_goes_on_from_a_state_bit_for_bit() -> None:
    rng = np.random.default_rng(14)
    first, second = DriftTracker(64, 5, 50), DriftTracker(64, 5, 50)
    first.update(hashes(100)[rng.integers(0, 100, 3_000)])
    second.restore(first.state())
    more = hashes(100)[rng.integers(0, 100, 500)]
    first.update(more)
    second.update(more)
    assert frequency_drift([first]) == frequency_drift([second])
    with pytest.raises(ValueError, match=r"\(2, 128\)"):
        DriftTracker(128).restore(first.state())


@pytest.mark.parametrize("arguments", [(1, 5, 50), (100, 5, 50), (64, 50, 50), (64, 0, 50), (64, 5, float("inf"))])
def test_arguments_outside_their_range_are_refused(arguments: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        DriftTracker(*arguments)
