"""Which items rise and fall: log(share lately / share usually) of the items that have moved most.

Station: beside the batcher, fed with the same clicks; read by `watch`, for the log and for /movers (`serve`). Items
never become labels of a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from streams.contract import UInt64Array
from streams.decayed_counts import DecayedCountEstimator
from streams.drift import FAST, SLOW, weight_spread
from streams.frequency import estimate_together

SIGNIFICANT = 3.0
"""A change of fewer standard deviations is no move."""
MAX_MOVERS = 100
"""Of a report."""


@dataclass(frozen=True)
class Mover:
    """One item whose share of clicks has changed."""

    item_id: str
    share: float
    """In the fast memory."""
    usual: float
    """In the slow memory, which has the latest clicks, too."""
    log_ratio: float
    """ln(share / usual): above 0 it rises, at most to ln(slow window / fast window); below, it falls."""
    noise: float
    """Standard deviation of log_ratio while nothing moves."""


class MoversReport(msgspec.Struct, frozen=True):
    """The movers of a process's partitions together, as /movers tells them."""

    time: float | None = None
    """When they were found, seconds since the epoch; None: not yet."""
    partitions: tuple[int, ...] = ()
    """Whose clicks these are: of `clicks`, in order."""
    movers: tuple[Mover, ...] = ()
    """The largest change first; at most MAX_MOVERS."""


class MoverTracker:
    """Hashed decayed counts over both memories, and two samples of the clicks to know whom to ask about.

    Each memory's sample is every so-maniest click of its last two windows, so that an item with the share q of a
    window's clicks is not in it with a probability of about exp(−q · sample_size / 2).

    Memory: 48 bytes a bucket, and the sampled ids.

    Args:
        fast_clicks: the fast memory's window, in clicks: a click that is k clicks old weighs exp(−k / window).
        slow_clicks: the slow one's; longer.
        num_buckets: of the counts, for each of two hashes.
        sample_size: clicks in each sample.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        fast_clicks: float = 5_000,
        slow_clicks: float = 50_000,
        num_buckets: int = 2**16,
        sample_size: int = 1_024,
    ) -> None:
        if not 1 <= fast_clicks < slow_clicks < np.inf:
            raise ValueError(f"windows must be 1 ≤ fast < slow, not {fast_clicks} and {slow_clicks}")
        if sample_size < 1:
            raise ValueError(f"sample_size must be at least 1, not {sample_size}")
        self.windows = np.array([fast_clicks, slow_clicks], np.float64)
        self.counts = DecayedCountEstimator(tuple(self.windows * math.log(2)), num_buckets, 2)
        self._strides = [max(1, round(2 * window / sample_size)) for window in self.windows]
        self._hashes: UInt64Array = np.zeros((2, sample_size), np.uint64)
        self._ids = [[""] * sample_size for _ in range(2)]

    def update(self, item_hash: UInt64Array, item_id: Sequence[str]) -> None:
        """Counts clicks: uint64 [n] and the ids that they are of, in the order of the stream."""
        for memory, stride in enumerate(self._strides):
            hashes, ids = self._hashes[memory], self._ids[memory]
            for i in range(-self.counts.step % stride, len(item_hash), stride):
                place = (self.counts.step + i) // stride % len(ids)
                hashes[place], ids[place] = item_hash[i], item_id[i]
        self.counts.update(item_hash)

    def sampled(self) -> dict[int, str]:
        """Hash → id of the items in the samples."""
        sizes = (
            min(len(ids), -(-self.counts.step // stride)) for ids, stride in zip(self._ids, self._strides, strict=True)
        )
        return {
            int(item_hash): item_id
            for memory, size in enumerate(sizes)
            for item_hash, item_id in zip(self._hashes[memory, :size], self._ids[memory][:size], strict=True)
        }

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything counted, as a copy; `restore` makes a tracker of the same settings go on from it bit for bit."""
        encoded = [item_id.encode() for ids in self._ids for item_id in ids]
        return {
            **self.counts.state(),
            "sampled_hashes": self._hashes.copy(),
            "sampled_ids": np.frombuffer(b"".join(encoded), np.uint8).copy(),
            "sampled_id_lengths": np.array([len(each) for each in encoded], np.int64),
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from `state()` of a tracker with the same settings.

        Raises:
            ValueError: the state is of another shape.
        """
        if state["sampled_hashes"].shape != self._hashes.shape:
            raise ValueError(
                f"sampled_hashes must have the shape {self._hashes.shape}, not {state['sampled_hashes'].shape}"
            )
        self.counts.restore(state)
        self._hashes[:] = state["sampled_hashes"]
        whole, ends = state["sampled_ids"].tobytes(), np.cumsum(state["sampled_id_lengths"])
        lengths = state["sampled_id_lengths"]
        ids = [whole[end - length : end].decode() for end, length in zip(ends, lengths, strict=True)]
        self._ids = [ids[: self._hashes.shape[1]], ids[self._hashes.shape[1] :]]


def top_movers(trackers: Sequence[MoverTracker], count: int = 10) -> list[Mover]:
    """The items whose shares of several partitions' clicks together have changed most, the largest change first.

    Ordered by |share − usual|, so that the list tells what the total variation is made of; only items whose change is
    at least 3 standard deviations from 0, both as a log ratio and as share / usual − 1: of a rare item's rise the
    former says less, of its fall the latter, which ends at −1 where the former goes on to −∞. With
    V = Σ_k (a_k − c_k)² of the clicks' normalised weights (`drift.weight_spread`), the variance of share − usual is
    usual · V while nothing moves, so that of both is V / usual.
    """
    active = [tracker for tracker in trackers if tracker.counts.step]
    names: dict[int, str] = {}
    for tracker in active:
        names |= tracker.sampled()
    if not names:
        return []
    item_hash = np.array(list(names), np.uint64)
    share, usual = estimate_together([tracker.counts for tracker in active], item_hash).share.T[[FAST, SLOW]]
    num_clicks = sum(tracker.counts.step for tracker in active)
    squares = sum(
        (tracker.counts.step / num_clicks) ** 2 * weight_spread(tracker.counts.step, *tracker.windows)[1]
        for tracker in active
    )
    log_ratio = np.log(np.maximum(share, 1e-300) / usual)
    noise = np.sqrt(squares / usual)
    change = np.minimum(np.abs(log_ratio), np.abs(share / usual - 1))
    moved = np.flatnonzero(change >= SIGNIFICANT * noise)
    return [
        Mover(names[int(item_hash[n])], float(share[n]), float(usual[n]), float(log_ratio[n]), float(noise[n]))
        for n in moved[np.argsort(-np.abs(share - usual)[moved], kind="stable")][:count]
        if log_ratio[n] != 0
    ]
