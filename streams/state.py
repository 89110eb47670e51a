"""What one partition's clicks have taught so far: its histories, its item frequencies, its drift.

Station: between validate and batcher. A pure function of the partition's accepted clicks below `next_offset`, so that
replaying them gives the same state bit for bit; it neither reads nor stores anything by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streams.contract import CANARY_HASH, Float32Array, Int64Array, UInt64Array
from streams.drift import DriftTracker
from streams.duplicates import EventWindow
from streams.frequency import EstimatorMode, GapEstimator
from streams.history import UserHistories
from streams.movers import MoverTracker
from streams.newcomers import NewcomerTracker
from streams.validate import Clicks

MOVER_BUCKETS = 2**16
"""At most: rising and falling items have many clicks, and are told apart by fewer buckets than all items are."""


class _Part(Protocol):
    def state(self) -> dict[str, npt.NDArray[Any]]: ...

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None: ...


@dataclass(frozen=True)
class StateConfig:
    """Sizes and rates of a partition's state; each field is the argument of the same name in the module it is for."""

    num_buckets: int = 2**18
    num_hashes: int = 4
    alpha: float = 0.01
    mode: EstimatorMode = "click"
    initial_gap: float | None = None
    max_users: int = 2**18
    history_length: int = 20
    drift_fast_clicks: float = 5_000
    drift_slow_clicks: float = 50_000
    young_minutes: float = 60.0
    event_id_window: int = 0


@dataclass(frozen=True)
class Learnt:
    """What the state adds to n clicks: histories from before each click, probabilities from after the last one."""

    history_values: UInt64Array
    history_offsets: Int64Array
    sampling_probability: Float32Array


class PartitionState:
    """Histories, frequencies and drift of one partition, as of `next_offset`.

    In mode "batch" the estimator counts by calls of `learn`; only then does the state depend on where batches were cut.
    """

    def __init__(self, config: StateConfig, next_offset: int = 0) -> None:
        self.next_offset = next_offset
        """The next offset to learn: every click below it is in the state."""
        self.estimator = GapEstimator(
            config.num_buckets, config.num_hashes, config.alpha, config.mode, initial_gap=config.initial_gap
        )
        self.histories = UserHistories(config.max_users, config.history_length)
        fast, slow = config.drift_fast_clicks, config.drift_slow_clicks
        self.drift = DriftTracker(fast_clicks=fast, slow_clicks=slow)
        self.newcomers = NewcomerTracker(config.young_minutes, fast, slow, config.num_buckets)
        self.events = EventWindow(config.event_id_window)
        self.movers = MoverTracker(fast, slow, min(config.num_buckets, MOVER_BUCKETS))

    @property
    def reads_event_ids(self) -> bool:
        """Whether clicks are to come with their event ids."""
        return self.events.size > 0

    def without_duplicates(self, clicks: Clicks) -> Clicks:
        """The clicks to learn: those whose event id is not in the window. To be called once, before they are learnt."""
        if self.reads_event_ids and not (is_first := self.events.first_seen(clicks.event_hash)).all():
            return clicks.take(np.flatnonzero(is_first))
        return clicks

    def learn(self, clicks: Clicks, next_offset: int) -> Learnt:
        """Takes the accepted clicks among the offsets self.next_offset … next_offset − 1 into the state.

        Canaries are passed over: they have no history, and probability 1.

        Raises:
            ValueError: clicks that do not follow upon the state; nothing was changed then.
        """
        first_offset = self.next_offset
        if next_offset < first_offset or (
            len(clicks) and not first_offset <= clicks.offset[0] <= clicks.offset[-1] < next_offset
        ):
            raise ValueError(
                f"clicks of {clicks.offset[:1]} … {clicks.offset[-1:]}, up to {next_offset}, do not follow upon a "
                f"state that is at offset {first_offset}"
            )
        is_canary = (clicks.item_hash == CANARY_HASH) | (clicks.user_hash == CANARY_HASH)
        if not is_canary.any():
            return self._learn(clicks, next_offset)
        learnt = self._learn(clicks.take(np.flatnonzero(~is_canary)), next_offset)
        lengths = np.zeros(len(clicks), np.int64)
        lengths[~is_canary] = np.diff(learnt.history_offsets)
        sampling_probability = np.ones(len(clicks), np.float32)
        sampling_probability[~is_canary] = learnt.sampling_probability
        return Learnt(learnt.history_values, np.concatenate(([0], np.cumsum(lengths))), sampling_probability)

    def _learn(self, clicks: Clicks, next_offset: int) -> Learnt:
        history_values, history_offsets = self.histories.join(clicks.user_hash, clicks.item_hash)
        self.estimator.update(clicks.item_hash)
        self.drift.update(clicks.item_hash)
        self.newcomers.update(clicks.item_hash, clicks.event_time)
        self.movers.update(clicks.item_hash, clicks.item_id)
        self.next_offset = next_offset
        sampling_probability = self.estimator.sampling_probability(clicks.item_hash, in_batch=True)
        return Learnt(history_values, history_offsets, sampling_probability)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, flat: names like "histories.items". A copy."""
        flat = {
            f"{part}.{name}": array for part, owner in self._parts().items() for name, array in owner.state().items()
        }
        return {"next_offset": np.array(self.next_offset, np.int64), **flat}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from `state()` of a PartitionState of the same config.

        Raises:
            ValueError: the state is of another shape; this one is unusable then.
        """

        def of(part: str) -> dict[str, npt.NDArray[Any]]:
            prefix = f"{part}."
            return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}

        for part, owner in self._parts().items():
            owner.restore(of(part))
        self.next_offset = int(state["next_offset"])

    def _parts(self) -> dict[str, _Part]:
        return {
            "estimator": self.estimator,
            "histories": self.histories,
            "drift": self.drift,
            "newcomers": self.newcomers,
            "movers": self.movers,
            "events": self.events,
        }
