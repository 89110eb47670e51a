"""Decayed counts by value: against a dictionary in which every count fades at every click, and against statistics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import UInt64Array, hash_ids
from streams.decayed_counts import DecayedCountEstimator
from streams.frequency import estimate_together
from tests.streams.references import SlowCounts

WIDE = 2**16
"""Buckets enough that a handful of items never shares one."""
HALF_LIVES = (1.0, 7.5, float("inf"))

streams_of_items = st.lists(st.lists(st.integers(0, 7), max_size=12), min_size=1, max_size=20)


def hashes(num_items: int) -> UInt64Array:
    return hash_ids([f"item {n}" for n in range(num_items)])


@pytest.mark.parametrize("conservative", [True, False])
@given(batches=streams_of_items)
def test_all_half_lives_are_counted_as_dictionaries_count_them(batches: list[list[int]], conservative: bool) -> None:
    item_hash = hashes(8)
    estimator = DecayedCountEstimator(HALF_LIVES, WIDE, 2, conservative=conservative)
    slow = [SlowCounts(half_life) for half_life in HALF_LIVES]
    for batch in batches:
        estimator.update(item_hash[batch])
        for item in batch:
            for each in slow:
                each.click(item)
    answer, log_q = estimator.estimate(item_hash), estimator.log_q(item_hash)
    assert answer.share.shape == answer.effective_count.shape == log_q.shape == (8, 3)
    for n, each in enumerate(slow):
        expected = np.array([each.counts.get(item, 0.0) for item in range(8)]) / max(each.total, 1)
        np.testing.assert_allclose(answer.share[:, n], expected, rtol=1e-9)
        np.testing.assert_allclose(np.exp(log_q[:, n]), expected, rtol=1e-9)
        weight = each.total**2 / max(each.squares, 1)
        np.testing.assert_allclose(answer.effective_count[:, n], expected * weight, rtol=1e-9)
    assert estimator.step == sum(map(len, batches))


@given(batches=streams_of_items, restored_at=st.integers(0, 19))
def test_the_state_is_the_same_however_cut_and_restored(batches: list[list[int]], restored_at: int) -> None:
    item_hash = hashes(8)
    cut, whole = DecayedCountEstimator((3.0, 50.0), 8, 3), DecayedCountEstimator((3.0, 50.0), 8, 3)
    for n, batch in enumerate(batches):
        cut.update(item_hash[batch])
        if n == restored_at:
            again = DecayedCountEstimator((3.0, 50.0), 8, 3)
            again.restore(cut.state())
            cut = again
    whole.update(item_hash[[item for batch in batches for item in batch]])
    for name, array in whole.state().items():
        np.testing.assert_array_equal(cut.state()[name], array)
    np.testing.assert_array_equal(cut.log_q(item_hash), whole.log_q(item_hash))
    assert cut.occupied_ratio == whole.occupied_ratio


def test_a_state_is_a_copy_and_fits_only_its_shape() -> None:
    estimator = DecayedCountEstimator((5.0,), 16, 2)
    before = estimator.state()
    estimator.update(hashes(4))
    assert not before["buckets"].any()
    with pytest.raises(ValueError, match=r"\(2, 16, 2\)"):
        estimator.restore(DecayedCountEstimator((5.0, 6.0), 16, 2).state())


@pytest.mark.parametrize("conservative", [True, False])
@given(batches=streams_of_items, num_buckets=st.integers(2, 5))
def test_whatever_collides_nothing_is_undercounted(
    batches: list[list[int]], num_buckets: int, conservative: bool
) -> None:
    item_hash = hashes(8)
    estimator = DecayedCountEstimator((4.0,), num_buckets, 2, conservative=conservative)
    slow = SlowCounts(4.0)
    for batch in batches:
        estimator.update(item_hash[batch])
        for item in batch:
            slow.click(item)
    share = estimator.estimate(item_hash).share[:, 0]
    expected = np.array([slow.counts.get(item, 0.0) for item in range(8)]) / max(slow.total, 1)
    assert np.all(share >= expected * (1 - 1e-9))
    assert np.all(share <= 1 + 1e-9)


def test_conservative_counting_suffers_less_from_collisions() -> None:
    """1,000 equal items in 4 · 500 buckets: each is overcounted by the least of four Poisson(2) other items or so."""
    rng = np.random.default_rng(1)
    item_hash = hashes(1_000)
    clicks = item_hash[rng.integers(0, 1_000, 100_000)]
    over = {}
    for conservative in (False, True):
        estimator = DecayedCountEstimator((20_000.0,), 500, 4, conservative=conservative)
        estimator.update(clicks)
        over[conservative] = estimator.estimate(item_hash).share[:, 0].mean() * 1_000 - 1
    # plain: E of the least of 4 Poisson(2) counts, Σ_x P(N > x)^4 = 0.74
    assert over[False] == pytest.approx(0.74, abs=0.08)
    assert 0 <= over[True] < 0.15


@pytest.mark.parametrize("num_clicks", [1_000, 100_000])
def test_the_spread_of_the_shares_is_what_the_effective_count_says(num_clicks: int) -> None:
    """Standard deviation share / √effective_count, before and after the memory has filled."""
    rng = np.random.default_rng(2)
    item_hash = hashes(100)
    estimator = DecayedCountEstimator((5_000.0,), WIDE, 2)
    estimator.update(item_hash[rng.integers(0, 100, num_clicks)])
    answer = estimator.estimate(item_hash)
    assert answer.share.mean() == pytest.approx(0.01, rel=1e-9)
    assert answer.share.std() == pytest.approx(np.mean(0.01 / np.sqrt(answer.effective_count)), rel=0.2)
    if num_clicks == 100_000:
        assert answer.effective_count.mean() == pytest.approx(0.01 * 2 / np.log(2) * 5_000, rel=0.01)


def test_the_half_life_is_when_a_share_has_halved() -> None:
    target, filler = hashes(2)
    estimator = DecayedCountEstimator((100.0, 1_000.0), WIDE, 2)
    estimator.update(np.array([target, filler] * 20_000))
    before = estimator.log_q(np.array([target]))
    np.testing.assert_allclose(before, np.log(0.5), atol=0.01)
    estimator.update(np.array([filler] * 1_000))
    np.testing.assert_allclose(estimator.log_q(np.array([target])) - before, [[-10 * np.log(2), -np.log(2)]])


def test_log_q_outlives_the_range_of_a_share() -> None:
    old, older, filler = hashes(3)
    estimator = DecayedCountEstimator((1.0,), WIDE, 2)
    estimator.update(np.array([older, old] + [filler] * 5_000))
    items = np.array([old, older, hash_ids(["never"])[0]])
    assert not estimator.estimate(items).share.any()
    log_q = estimator.log_q(items)[:, 0]
    np.testing.assert_allclose(log_q[:2], [-5_001 * np.log(2), -5_002 * np.log(2)])
    assert log_q[2] == -np.inf
    assert np.all(DecayedCountEstimator((1.0,), 16, 2).log_q(items) == -np.inf)


def test_partitions_together_and_merged_answer_for_all_their_clicks() -> None:
    rng = np.random.default_rng(3)
    item_hash = hashes(20)
    estimators = [DecayedCountEstimator((float("inf"), 50.0), WIDE, 2) for _ in range(3)]
    counts = np.zeros(20)
    for estimator, num_clicks in zip(estimators, (500, 300, 0), strict=True):
        items = rng.integers(0, 20, num_clicks)
        estimator.update(item_hash[items])
        counts += np.bincount(items, minlength=20)
    together, merged = estimate_together(estimators, item_hash), DecayedCountEstimator.merged(estimators)
    np.testing.assert_allclose(together.share[:, 0], counts / 800)
    np.testing.assert_allclose(together.effective_count[:, 0], counts)
    np.testing.assert_allclose(merged.estimate(item_hash).share[:, 0], counts / 800)
    summed = sum(e.estimate(item_hash).share[:, 1] * e.state()["totals"][0, 1] for e in estimators)
    total = sum(e.state()["totals"][0, 1] for e in estimators)
    np.testing.assert_allclose(merged.estimate(item_hash).share[:, 1], summed / total)
    assert (merged.step, merged.num_occupied) == (800, 40)
    merged.update(item_hash[:1])
    counts[0] += 1
    np.testing.assert_allclose(merged.estimate(item_hash).share[:, 0], counts / 801)
    with pytest.raises(ValueError, match="same settings"):
        DecayedCountEstimator.merged([merged, DecayedCountEstimator((1.0,), WIDE, 2)])


def test_a_single_estimator_merged_is_itself() -> None:
    estimator = DecayedCountEstimator((9.0,), 64, 3)
    estimator.update(hashes(40)[[1, 2, 3, 1, 1, 30]])
    merged = DecayedCountEstimator.merged([estimator])
    np.testing.assert_allclose(merged.log_q(hashes(40)), estimator.log_q(hashes(40)))


def test_collisions_and_memory_are_stated() -> None:
    estimator = DecayedCountEstimator((1.0, 2.0, 3.0), 1_000, 4)
    estimator.update(hashes(1_000))
    assert estimator.num_bytes == 8 * (1 + 3) * 1_000 * 4 == estimator.state()["buckets"].nbytes
    assert estimator.occupied_ratio == pytest.approx(1 - np.exp(-1), abs=0.02)
    assert estimator.collision_ratio == pytest.approx((1 - np.exp(-1)) ** 4, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"half_lives": ()}, "half_lives"),
        ({"half_lives": (10.0, 0.5)}, "half_lives"),
        ({"half_lives": (float("nan"),)}, "half_lives"),
        ({"num_buckets": 1}, "num_buckets"),
        ({"num_hashes": 17}, "num_hashes"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecayedCountEstimator(**arguments)  # type: ignore[arg-type]
