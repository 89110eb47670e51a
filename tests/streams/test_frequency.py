"""The gap estimator by value: against a dictionary that counts slowly, the paper's formulas and its simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import UInt64Array, hash_ids
from streams.frequency import EstimatorMode, GapEstimator, collision_ratio, estimate_together
from tests.streams.references import SlowGaps

WIDE = 2**16
"""Buckets enough that a handful of items never shares one (asserted where it matters)."""


def hashes(num_items: int) -> UInt64Array:
    return hash_ids([f"item {n}" for n in range(num_items)])


streams_of_items = st.lists(st.lists(st.integers(0, 7), max_size=12), min_size=1, max_size=20)


@pytest.mark.parametrize("initial_gap", [None, 100.0])
@given(batches=streams_of_items, alpha=st.sampled_from([0.01, 0.3, 1.0]))
def test_clicks_are_counted_as_a_dictionary_counts_them(
    batches: list[list[int]], alpha: float, initial_gap: float | None
) -> None:
    item_hash = hashes(8)
    estimator = GapEstimator(WIDE, 2, alpha, initial_gap=initial_gap)
    slow = SlowGaps(alpha, initial_gap)
    for batch in batches:
        estimator.update(item_hash[batch])
        for item in batch:
            slow.step += 1
            slow.hit(item)
        for in_batch in (False, True):
            expected = [slow.probability(item, in_batch) for item in range(8)]
            np.testing.assert_allclose(
                estimator.sampling_probability(item_hash, in_batch=in_batch), expected, rtol=1e-5
            )
    assert estimator.step == sum(map(len, batches))


@pytest.mark.parametrize("initial_gap", [None, 100.0])
@given(batches=streams_of_items)
def test_batches_are_counted_as_a_dictionary_counts_them(batches: list[list[int]], initial_gap: float | None) -> None:
    item_hash = hashes(8)
    estimator = GapEstimator(WIDE, 1, 0.1, "batch", initial_gap=initial_gap)
    slow = SlowGaps(0.1, initial_gap)
    for batch in filter(None, batches):
        estimator.update(item_hash[batch])
        slow.step += 1
        for item in set(batch):
            slow.hit(item)
        expected = [slow.probability(item, False) for item in range(8)]
        np.testing.assert_allclose(estimator.sampling_probability(item_hash), expected, rtol=1e-5)


@given(batches=streams_of_items)
def test_the_state_after_n_clicks_does_not_depend_on_how_they_were_cut(batches: list[list[int]]) -> None:
    item_hash = hashes(8)
    cut, whole = GapEstimator(8, 3), GapEstimator(8, 3)
    for batch in batches:
        cut.update(item_hash[batch])
    whole.update(item_hash[[item for batch in batches for item in batch]])
    for name, array in whole.state().items():
        np.testing.assert_array_equal(cut.state()[name], array)


@pytest.mark.parametrize("mode", ["click", "batch"])
@given(batches=streams_of_items, more=streams_of_items)
def test_an_estimator_goes_on_from_a_state_bit_for_bit(
    batches: list[list[int]], more: list[list[int]], mode: EstimatorMode
) -> None:
    item_hash = hashes(8)
    first, second = GapEstimator(16, 2, mode=mode), GapEstimator(16, 2, mode=mode)
    for batch in batches:
        first.update(item_hash[batch])
    second.restore(first.state())
    for batch in more:
        first.update(item_hash[batch])
        second.update(item_hash[batch])
        np.testing.assert_array_equal(first.sampling_probability(item_hash), second.sampling_probability(item_hash))
    assert (second.step, second.num_occupied) == (first.step, first.num_occupied)


def test_a_state_is_a_copy_and_fits_only_its_shape() -> None:
    estimator = GapEstimator(16, 2)
    before = estimator.state()
    estimator.update(hashes(4))
    assert before["counters"].tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"\(2, 16\)"):
        estimator.restore(GapEstimator(32, 2).state())


@given(
    batches=streams_of_items,
    num_buckets=st.sampled_from([2, 4]),
    mode=st.sampled_from(["click", "batch"]),
    initial_gap=st.sampled_from([None, 1.0, 100.0]),
)
def test_whatever_collides_an_answer_is_a_probability(
    batches: list[list[int]], num_buckets: int, mode: EstimatorMode, initial_gap: float | None
) -> None:
    item_hash = hashes(8)
    estimator = GapEstimator(num_buckets, 3, 0.5, mode, initial_gap=initial_gap)
    for batch in batches:
        estimator.update(item_hash[batch])
        probability = estimator.sampling_probability(item_hash)
        assert probability.dtype == np.float32
        assert np.all((probability > 0) & (probability <= 1))


def test_the_longest_gap_of_several_hashes_answers() -> None:
    """A collision makes a gap too short; with more hashes fewer items suffer one in all of them."""
    rng = np.random.default_rng(3)
    num_items = 200
    item_hash = hashes(num_items)
    clicks = item_hash[rng.integers(0, num_items, 60_000)]
    errors = {}
    for num_hashes in (1, 2, 4):
        estimator = GapEstimator(512, num_hashes, 0.02)
        estimator.update(clicks)
        errors[num_hashes] = float(np.mean(estimator.sampling_probability(item_hash, in_batch=True) * num_items > 1.5))
    # of 200 items in 512 buckets, 32 % share one: 1 - (1 - 1/512)^199; in two hashes about a tenth, in four a hundredth
    assert errors[1] == pytest.approx(0.32, abs=0.08)
    assert errors[2] == pytest.approx(0.10, abs=0.06)
    assert errors[4] == pytest.approx(0.01, abs=0.02)


def test_buckets_are_used_evenly_by_every_hash() -> None:
    estimator = GapEstimator(256, 16)
    item_hash = hash_ids([str(n) for n in range(20_000)])
    estimator.update(item_hash)
    assert estimator.occupied_ratio == 1.0
    few = GapEstimator(2**12, 8)
    few.update(item_hash[:4096])
    # 4096 balls in 4096 bins leave 1/e of them empty
    assert few.occupied_ratio == pytest.approx(1 - np.exp(-1), abs=0.01)


def test_a_regular_item_converges_geometrically_to_its_gap() -> None:
    """Erratum 1: E δ_t − δ = (1 − α)^t (δ_0 − δ), with exponent t on the start; δ_0 = δ is the unbiased one."""
    gap, alpha = 10, 0.05
    target, filler = hashes(2)
    for initial_gap in (100.0, 10.0, 1.0):
        estimator = GapEstimator(WIDE, 1, alpha, initial_gap=initial_gap)
        for num_hits in range(1, 60):
            estimator.update(np.array([filler] * (gap - 1) + [target]))
            expected = gap + (1 - alpha) ** num_hits * (initial_gap - gap)
            assert 1 / estimator.sampling_probability(np.array([target]))[0] == pytest.approx(expected, rel=1e-4)


def _mean_gaps(alpha: float, num_items: int, num_clicks: int, seed: int, initial_gap: float | None) -> np.ndarray:
    """Mean gaps of equally likely items, one estimator without collisions."""
    rng = np.random.default_rng(seed)
    item_hash = hashes(num_items)
    estimator = GapEstimator(2**20, 1, alpha, initial_gap=initial_gap)
    estimator.update(item_hash[rng.integers(0, num_items, num_clicks)])
    return 1 / estimator.sampling_probability(item_hash, in_batch=True).astype(np.float64)


@pytest.mark.parametrize("alpha", [0.01, 0.1])
def test_the_variance_of_the_mean_gap_is_half_the_papers_bound(alpha: float) -> None:
    """Erratum 2: Var δ_∞ = α/(2 − α)·Var Δ, and for geometric gaps Var Δ = (1 − p)/p²."""
    num_items = 2_000
    p = 1 / num_items
    mean_gaps = _mean_gaps(alpha, num_items, int(num_items * 12 / alpha), 5, initial_gap=num_items)
    assert mean_gaps.mean() == pytest.approx(1 / p, rel=0.01)
    assert mean_gaps.var() == pytest.approx(alpha / (2 - alpha) * (1 - p) / p**2, rel=0.12)


@pytest.mark.parametrize("alpha", [0.01, 0.1])
def test_the_probability_is_biased_up_by_the_spread_of_the_gap(alpha: float) -> None:
    """Erratum 3: E p̂ ≈ p·(1 + α/(2 − α)·(1 − p))."""
    num_items = 2_000
    p = 1 / num_items
    mean_gaps = _mean_gaps(alpha, num_items, int(num_items * 12 / alpha), 6, initial_gap=None)
    assert (1 / mean_gaps).mean() / p == pytest.approx(1 + alpha / (2 - alpha) * (1 - p), abs=0.01)


def test_clicks_give_an_items_share_and_batches_its_presence() -> None:
    """Erratum 4: the presence probability 1 − (1 − q)^B saturates, the share of clicks q does not."""
    shares = np.array([0.3, 0.05, 0.005])
    batch_size, num_batches = 64, 8_000
    rng = np.random.default_rng(7)
    item_hash = hashes(1_000)
    others = (1 - shares.sum()) / 997
    item = rng.choice(1_000, (num_batches, batch_size), p=[*shares, *[others] * 997])
    by_click, by_batch = GapEstimator(2**18, 2, 0.003), GapEstimator(2**18, 2, 0.003, "batch")
    for batch in item:
        by_click.update(item_hash[batch])
        by_batch.update(item_hash[batch])
    np.testing.assert_allclose(by_click.sampling_probability(item_hash[:3], in_batch=True), shares, rtol=0.12)
    presence = 1 - (1 - shares) ** batch_size
    np.testing.assert_allclose(by_batch.sampling_probability(item_hash[:3], in_batch=True), presence, rtol=0.12)


def test_the_time_before_an_items_first_click_is_no_gap_of_it() -> None:
    """Erratum 5: an item born at click 9,000 and clicked each 10 clicks is known to be so from its second click."""
    target, filler = hashes(2)
    estimator = GapEstimator(WIDE, 2)
    papers = GapEstimator(WIDE, 2, initial_gap=100.0)
    clicks = np.array([filler] * 9_000 + ([target] + [filler] * 9) * 5)
    for each in (estimator, papers):
        each.update(clicks)
    assert estimator.sampling_probability(np.array([target]))[0] == pytest.approx(0.1)
    assert papers.sampling_probability(np.array([target]))[0] < 0.006


def test_an_item_clicked_once_has_been_clicked_once_in_all_clicks() -> None:
    target, filler = hashes(2)
    estimator = GapEstimator(WIDE, 2)
    estimator.update(np.array([target] + [filler] * 39))
    assert estimator.sampling_probability(np.array([target]))[0] == pytest.approx(1 / 40)
    assert estimator.sampling_probability(hash_ids(["never"]))[0] == pytest.approx(1 / 41)


def test_an_item_gone_quiet_is_told_by_the_time_since() -> None:
    """Erratum 6: B alone would stay at 2 for ever."""
    target, filler = hashes(2)
    estimator = GapEstimator(WIDE, 2)
    estimator.update(np.array([target, filler] * 50 + [filler] * 998))
    assert estimator.sampling_probability(np.array([target]))[0] == pytest.approx(1 / 999)
    assert estimator.sampling_probability(np.array([target]), in_batch=True)[0] == pytest.approx(1 / 2)


def test_where_in_its_batch_an_item_stands_does_not_lengthen_its_gap() -> None:
    """The answer for rows of a batch must not be max(B, t − A): here that is a fifth too long."""
    rng = np.random.default_rng(8)
    item_hash = hashes(50)
    estimator = GapEstimator(WIDE, 2, 0.01)
    as_rows, as_silence = [], []
    for n in range(600):
        batch = item_hash[rng.integers(0, 50, 256)]
        estimator.update(batch)
        if n >= 100:
            as_rows.append(np.mean(1 / estimator.sampling_probability(batch, in_batch=True)))
            as_silence.append(np.mean(1 / estimator.sampling_probability(batch)))
    assert np.mean(as_rows) == pytest.approx(50, rel=0.02)
    # P(the last of the row's item's clicks is x before the end) is that of the row being so far and of none after it
    x = np.arange(50, 256)
    assert np.mean(as_silence) == pytest.approx(50 + np.sum((1 - x / 256) * (1 - 1 / 50) ** x), rel=0.02)


@pytest.mark.parametrize("initial_gap", [None, 100.0])
def test_items_of_a_batch_that_share_a_bucket_hit_it_once(initial_gap: float | None) -> None:
    """Two buckets, twenty items in each batch: every step is a hit of both, and every gap 1."""
    estimator = GapEstimator(2, 1, 0.5, "batch", initial_gap=initial_gap)
    for _ in range(60):
        estimator.update(hashes(20))
    np.testing.assert_allclose(estimator.sampling_probability(hashes(20)), 1.0, rtol=1e-6)
    assert set(estimator.state()["num_gaps"].tolist()[0]) == {60 if initial_gap else 59}


def test_an_answer_says_how_many_gaps_it_rests_on() -> None:
    """1 / Σ weight² of the gaps averaged; where one hit or the silence speaks, 1; where nothing was hit, 0."""
    alpha = 0.1
    target, filler = hashes(2)
    estimator = GapEstimator(WIDE, 2, alpha)
    weights = np.zeros(0)
    for num_gaps in range(60):
        estimator.update(np.array([filler] * 4 + [target]))
        rate = max(alpha, 1 / max(num_gaps, 1))
        if num_gaps:
            weights = np.append(weights * (1 - rate), rate)
        expected = 1 / np.sum(weights**2) if num_gaps else 1
        assert estimator.estimate(np.array([target])).effective_count[0] == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx((2 - alpha) / alpha, rel=0.01)
    estimator.update(np.array([filler] * 6))
    silent, unseen = estimator.estimate(np.array([target, hash_ids(["never"])[0]])).effective_count
    assert (silent, unseen) == (1, 0)


@pytest.mark.parametrize(("alpha", "clicks_per_item"), [(0.01, 30), (0.05, 400)])
def test_the_spread_of_the_answers_is_what_their_effective_count_says(alpha: float, clicks_per_item: int) -> None:
    """Relative standard deviation 1 / √effective_count: once while gaps are still few, once when they are forgotten."""
    num_items = 2_000
    item_hash = hashes(num_items)
    estimator = GapEstimator(2**20, 1, alpha)
    rng = np.random.default_rng(15)
    estimator.update(item_hash[rng.integers(0, num_items, num_items * clicks_per_item)])
    answer = estimator.estimate(item_hash, in_batch=True)
    spread = np.std(1 / answer.share) / np.mean(1 / answer.share)
    assert spread == pytest.approx(np.mean(1 / np.sqrt(answer.effective_count)), rel=0.1)


@pytest.mark.parametrize("num_buckets", [1_000, 4_096])
@pytest.mark.parametrize("num_hashes", [1, 2, 4])
def test_the_collision_ratio_is_the_share_of_items_that_share_all_their_buckets(
    num_buckets: int, num_hashes: int
) -> None:
    item_hash = hashes(1_500)
    estimator = GapEstimator(num_buckets, num_hashes)
    estimator.update(item_hash)
    # an item alone in one of its buckets has a gap of its own there: with two rounds, exactly 1,500
    estimator.update(item_hash)
    alone = estimator.sampling_probability(item_hash, in_batch=True) < 1.0001 / 1_500
    tolerance = 4 * np.sqrt(0.25 / 1_500)
    assert estimator.collision_ratio == pytest.approx(1 - alone.mean(), abs=tolerance)
    expected = (1 - (1 - 1 / num_buckets) ** 1_499) ** num_hashes
    assert estimator.collision_ratio == pytest.approx(expected, abs=0.03)


def test_the_collision_ratio_of_no_item_and_of_full_buckets() -> None:
    assert collision_ratio(0.0, 16, 2) == 0.0
    assert collision_ratio(1 / 16, 16, 1) == pytest.approx(0.0)
    assert collision_ratio(1.0, 16, 2) == 1.0


def test_memory_is_sixteen_bytes_a_bucket() -> None:
    estimator = GapEstimator(1_000, 3)
    assert estimator.num_bytes == 16 * 1_000 * 3 == sum(a.nbytes for a in estimator.state().values()) - 16


def test_buckets_need_not_be_a_power_of_two() -> None:
    few = GapEstimator(5_000, 4)
    few.update(hash_ids([str(n) for n in range(5_000)]))
    assert few.occupied_ratio == pytest.approx(1 - np.exp(-1), abs=0.01)


def _partitions(mode: EstimatorMode, initial_gap: float | None = None) -> tuple[list[GapEstimator], np.ndarray]:
    """Three partitions of unequal length, and the items' shares of all their clicks."""
    rng = np.random.default_rng(16)
    item_hash, estimators, counts = hashes(12), [], np.zeros(12)
    for num_clicks, favourite in ((60_000, 0), (30_000, 1), (10_000, 2)):
        weight = np.ones(12)
        weight[favourite] = 5
        items = rng.choice(12, num_clicks, p=weight / weight.sum())
        estimators.append(GapEstimator(WIDE, 2, 0.002, mode, initial_gap=initial_gap))
        for low in range(0, num_clicks, 4):
            estimators[-1].update(item_hash[items[low : low + 4]])
        counts += np.bincount(items, minlength=12)
    return estimators, counts / counts.sum()


@pytest.mark.parametrize("initial_gap", [None, 10.0])
def test_partitions_together_answer_for_all_their_clicks(initial_gap: float | None) -> None:
    estimators, shares = _partitions("click", initial_gap)
    item_hash = hashes(12)
    weighed = [(e.step / 100_000, e.estimate(item_hash)) for e in estimators]
    together = estimate_together(estimators, item_hash)
    np.testing.assert_allclose(together.share, sum(weight * one.share for weight, one in weighed))
    variance = sum((weight * one.share) ** 2 / one.effective_count for weight, one in weighed)
    np.testing.assert_allclose(together.effective_count, together.share**2 / variance)
    merged = GapEstimator.merged(estimators)
    assert merged.step == 100_000
    rows = sum(e.step / 100_000 * e.estimate(item_hash, in_batch=True).share for e in estimators)
    merged_rows = merged.sampling_probability(item_hash, in_batch=True)
    np.testing.assert_allclose(merged_rows, rows, rtol=1e-4)
    np.testing.assert_allclose(merged_rows, shares, rtol=0.15)


def test_a_merged_estimator_goes_on_as_one_of_the_joint_stream() -> None:
    """Two halves of one stream, merged: as accurate as an estimator that saw it whole, at once and later."""
    rng = np.random.default_rng(17)
    shares = np.arange(1, 51) / np.arange(1, 51).sum()
    item_hash = hashes(50)
    halves = [GapEstimator(WIDE, 2, 0.005) for _ in range(2)]
    for half in halves:
        half.update(item_hash[rng.choice(50, 100_000, p=shares)])
    merged = GapEstimator.merged(halves)
    for _ in range(2):
        answer = merged.estimate(item_hash, in_batch=True)
        assert np.all(np.abs(answer.share / shares - 1) < 4 / np.sqrt(answer.effective_count))
        merged.update(item_hash[rng.choice(50, 200_000, p=shares)])


def test_merging_keeps_single_hits_silences_and_unhit_buckets() -> None:
    once, twice, quiet, filler, never = hashes(5)
    first, second = GapEstimator(WIDE, 2), GapEstimator(WIDE, 2)
    first.update(np.array([quiet, quiet, once, twice] + [filler] * 996))
    second.update(np.array([twice] + [filler] * 999))
    merged = GapEstimator.merged([first, second])
    answer = merged.estimate(np.array([once, twice, quiet, never]))
    # once: one hit in 2,000; twice, quiet: last hit 996 and 998 clicks of half the stream ago; never: 1 / (t + 1)
    np.testing.assert_allclose(1 / answer.share, [2_000, 1_992, 1_996, 2_001])
    np.testing.assert_array_equal(answer.effective_count, [1, 1, 1, 0])
    in_batch = merged.sampling_probability(np.array([once, twice, quiet]), in_batch=True)
    np.testing.assert_allclose(1 / in_batch, [2_000, 1_000, 2], rtol=1e-6)
    assert merged.num_occupied == 8
    together = estimate_together([first, second], np.array([never]))
    assert (together.share[0], together.effective_count[0]) == (pytest.approx(1 / 2_001), 0)


def test_partitions_without_clicks_and_of_other_settings() -> None:
    busy, idle = GapEstimator(16, 2), GapEstimator(16, 2)
    busy.update(hashes(5)[[0, 1, 2, 0, 1]])
    for name, array in GapEstimator.merged([busy, idle]).state().items():
        np.testing.assert_array_equal(array, busy.state()[name])
    papers = GapEstimator.merged([GapEstimator(16, 2, initial_gap=100.0)] * 2)
    assert papers.sampling_probability(hashes(1))[0] == pytest.approx(0.01)
    with pytest.raises(ValueError, match="same settings"):
        GapEstimator.merged([busy, GapEstimator(16, 2, 0.5)])
    with pytest.raises(ValueError, match="at least one"):
        GapEstimator.merged([])
    with pytest.raises(ValueError, match="counted nothing"):
        estimate_together([idle], hashes(1))


def _simulation(alpha: float, num_hashes: int, num_buckets: int, steps: int, seed: int) -> float:
    """The paper's §6.1 up to `steps`: mean absolute error over twice the batch."""
    rng = np.random.default_rng(seed)
    num_items, batch_size = 1_000, 128
    q = np.arange(1, num_items + 1, dtype=np.float64) ** 2
    q /= q.sum()
    item_hash = hash_ids([f"{seed}-{n}" for n in range(num_items)])
    estimator = GapEstimator(num_buckets, num_hashes, alpha, "batch", initial_gap=100.0)
    for _ in range(steps):
        drawn = np.argpartition(-(np.log(q) + rng.gumbel(size=num_items)), batch_size)[:batch_size]
        estimator.update(item_hash[drawn])
    error = np.abs(estimator.sampling_probability(item_hash) - batch_size * q).sum()
    return float(error / (2 * batch_size))


@pytest.mark.parametrize(
    ("alpha", "num_hashes", "steps", "reference"),
    [(0.1, 1, 1_000, 0.166), (0.02, 1, 1_000, 0.174), (0.01, 1, 1_000, 0.322), (0.01, 4, 3_000, 0.064)],
)
def test_the_papers_simulation_comes_out_as_in_the_reference_run(
    alpha: float, num_hashes: int, steps: int, reference: float
) -> None:
    """5,000 buckets in all, two seeds; which items collide is drawn with each, and moves the error by about .01."""
    errors = [_simulation(alpha, num_hashes, 5_000 // num_hashes, steps, seed) for seed in range(2)]
    assert np.mean(errors) == pytest.approx(reference, abs=0.015)


def test_the_warm_up_finds_the_frequencies_where_the_papers_start_is_still_lost() -> None:
    """Erratum 5 in the paper's simulation, without collisions: the error at step 1,000 falls from .325 to about .05."""
    rng = np.random.default_rng(1)
    q = np.arange(1, 1_001, dtype=np.float64) ** 2
    q /= q.sum()
    item_hash = hashes(1_000)
    papers = GapEstimator(2**18, 2, 0.01, "batch", initial_gap=100.0)
    ours = GapEstimator(2**18, 2, 0.01, "batch")
    for _ in range(1_000):
        drawn = np.argpartition(-(np.log(q) + rng.gumbel(size=1_000)), 128)[:128]
        papers.update(item_hash[drawn])
        ours.update(item_hash[drawn])
    errors = [np.abs(e.sampling_probability(item_hash, in_batch=True) - 128 * q).sum() / 256 for e in (papers, ours)]
    assert errors[0] == pytest.approx(0.325, abs=0.02)
    assert errors[1] == pytest.approx(0.053, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_buckets": 1}, "num_buckets"),
        ({"num_buckets": 2**30 + 1}, "num_buckets"),
        ({"num_hashes": 0}, "num_hashes"),
        ({"num_hashes": 17}, "num_hashes"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.5}, "alpha"),
        ({"mode": "clicks"}, "mode"),
        ({"initial_gap": 0.5}, "initial_gap"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GapEstimator(**arguments)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=50, unique=True))
def test_items_of_any_hash_are_told_apart(values: list[int]) -> None:
    item_hash = np.array(values, np.uint64)
    estimator = GapEstimator(WIDE, 4)
    estimator.update(np.tile(item_hash, 3))
    np.testing.assert_allclose(estimator.sampling_probability(item_hash, in_batch=True), 1 / len(values), rtol=1e-5)
