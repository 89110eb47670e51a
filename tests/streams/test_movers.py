"""Top movers by value: planted risers and fallers, nobody where nothing moves, and their names after a restart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.contract import hash_ids
from streams.movers import MoverTracker, top_movers

FAST, SLOW = 500.0, 5_000.0
OLD = np.array([f"item {n}" for n in range(50)])


def feed(tracker: MoverTracker, ids: np.ndarray) -> None:
    tracker.update(hash_ids(ids.tolist()), ids.tolist())


def planted(seed: int) -> MoverTracker:
    """Item 0 falls from .05 to nothing, "new" rises from nothing to .3, all others keep their share but for that."""
    rng = np.random.default_rng(seed)
    tracker = MoverTracker(FAST, SLOW)
    feed(tracker, OLD[rng.choice(50, 40_000, p=[0.05, *[0.95 / 49] * 49])])
    ids = OLD[rng.integers(1, 50, 1_000)].astype("<U10")
    ids[rng.random(1_000) < 0.3] = "new"
    feed(tracker, ids)
    return tracker


def test_what_rises_and_what_falls_is_named_with_its_log_ratio() -> None:
    movers = top_movers([planted(41)])
    new, gone = movers[:2]
    assert (new.item_id, gone.item_id) == ("new", "item 0")
    # of the fast memory 1 − e^(−2) is of the last 1,000 clicks, of the slow one 1 − e^(−0.2)
    fast, slow = 1 - np.exp(-2), 1 - np.exp(-0.2)
    assert new.share == pytest.approx(0.3 * fast, abs=0.05)
    assert new.usual == pytest.approx(0.3 * slow, abs=0.01)
    assert new.log_ratio == pytest.approx(np.log(fast / slow), abs=0.1)
    assert gone.log_ratio == pytest.approx(np.log((1 - fast) / (1 - slow)), abs=0.35)
    for mover in movers:
        assert min(abs(mover.log_ratio), abs(mover.share / mover.usual - 1)) >= 3 * mover.noise
        assert mover.log_ratio == pytest.approx(np.log(mover.share / mover.usual))
    changes = [abs(mover.share - mover.usual) for mover in movers]
    assert changes == sorted(changes, reverse=True)
    assert len(movers) <= 4
    assert top_movers([planted(41)], 1) == movers[:1]


def test_where_nothing_moves_nobody_is_named_and_the_noise_is_what_chance_gives() -> None:
    log_ratios, noises, named = [], [], 0
    for seed in range(20):
        tracker = MoverTracker(FAST, SLOW)
        feed(tracker, OLD[np.random.default_rng(seed).integers(0, 50, 30_000)])
        named += len(top_movers([tracker]))
        share, usual = tracker.counts.estimate(hash_ids(OLD.tolist())).share.T
        log_ratios.append(np.log(share / usual))
        noises.append(np.sqrt((1 / (2 * FAST) + 1 / (2 * SLOW) - 2 / (FAST + SLOW)) / usual))
    assert np.std(log_ratios) == pytest.approx(np.mean(noises), rel=0.1)
    assert named <= 10  # of 1,000: 3 standard deviations of a skewed distribution


def test_rare_items_that_were_not_clicked_lately_by_chance_are_no_movers() -> None:
    """Of most of a long tail's items no click is expected within the fast memory: their log ratio is far below 0."""
    named, asked, far_below = 0, 0, 0
    for seed in range(5):
        random = np.random.default_rng(seed)
        tracker = MoverTracker(FAST, SLOW)
        feed(tracker, np.char.add("item ", (random.zipf(1.3, 30_000) % 100_000).astype(str)))
        share, usual = tracker.counts.estimate(np.array(list(tracker.sampled()), np.uint64)).share.T
        noise = np.sqrt((1 / (2 * FAST) + 1 / (2 * SLOW) - 2 / (FAST + SLOW)) / usual)
        far_below += int(np.count_nonzero(np.log(share / usual) < -3 * noise))
        named += len(top_movers([tracker], 1_000))
        asked += len(share)
    assert named <= 0.003 * asked < 0.02 * asked < far_below


def test_the_noise_is_that_of_the_weights() -> None:
    new = top_movers([planted(42)])[0]
    squares = 1 / (2 * FAST) + 1 / (2 * SLOW) - 2 / (FAST + SLOW)
    assert new.noise == pytest.approx(np.sqrt(squares / new.usual), rel=0.01)


def test_partitions_weigh_as_many_clicks_as_they_have_counted() -> None:
    quiet = MoverTracker(FAST, SLOW)
    feed(quiet, np.repeat("other", 41_000))
    alone, both = top_movers([planted(43)], 1)[0], top_movers([planted(43), quiet, MoverTracker(FAST, SLOW)], 1)[0]
    assert both.item_id == alone.item_id == "new"
    assert (both.share, both.usual) == (pytest.approx(alone.share / 2), pytest.approx(alone.usual / 2))
    assert both.noise == pytest.approx(alone.noise, rel=1e-3)  # V of two partitions is half, and so is the share
    assert top_movers([]) == top_movers([MoverTracker(FAST, SLOW)]) == []


@given(sizes=st.lists(st.integers(0, 40), max_size=12), sample_size=st.integers(1, 30))
def test_samples_hold_every_nth_of_the_last_clicks(sizes: list[int], sample_size: int) -> None:
    tracker = MoverTracker(5, 50, 64, sample_size)
    ids = [f"ü{n}" for n in range(sum(sizes))]
    expected: set[str] = set()
    for stride in (max(1, round(10 / sample_size)), max(1, round(100 / sample_size))):
        expected |= set(ids[::stride][-sample_size:])
    done = 0
    for size in sizes:
        feed(tracker, np.array(ids[done : done + size], str))
        done += size
    assert set(tracker.sampled().values()) == expected
    assert list(tracker.sampled()) == hash_ids(list(tracker.sampled().values())).tolist()


def test_a_tracker_goes_on_from_a_state_with_every_name() -> None:
    first = MoverTracker(5, 50, 64, 8)
    feed(first, np.array(["ä", "b\0", "", "dd", "ä"] * 7))
    second = MoverTracker(5, 50, 64, 8)
    second.restore(first.state())
    assert second.sampled() == first.sampled()
    for tracker in (first, second):
        feed(tracker, np.array(["x", "yy", "ä"]))
    assert top_movers([second]) == top_movers([first])
    for name, array in first.state().items():
        np.testing.assert_array_equal(second.state()[name], array)
    with pytest.raises(ValueError, match=r"\(2, 9\)"):
        MoverTracker(5, 50, 64, 9).restore(first.state())


@pytest.mark.parametrize("arguments", [(50, 50), (0, 50), (5, float("inf")), (5, 50, 64, 0), (5, 50, 1)])
def test_arguments_outside_their_range_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        MoverTracker(*arguments)  # type: ignore[arg-type]
