"""What publishing does on threads of its own: fill a version, make it live, write a delta.

Station: between `publish`, which takes the copies and decides when, and the index and the model directory. It works on
copies alone: nothing here sees the catalogue, the learner or the progress.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec
import numpy as np
import structlog
import torch

from streams.contract import Float32Array, Float64Array, Int64Array, UInt64Array
from trainer.canary import LIMIT, Users, invent_users, recall_of
from trainer.contract import Manifest, collection_name
from trainer.covisit import Covisit, SparseVectors
from trainer.index import (
    CanaryError,
    CollectionGoneError,
    Index,
    IndexAwayError,
    PinnedError,
    Points,
    joined_vectors,
    longest_vector,
)
from trainer.towers import ItemInputs, ItemTower, QueryTower
from trainer.versions import Versions

LARGEST_RISE = 5.0
"""By how much log frequencies of a delta may stand above those of its version because the others fall meanwhile. Those
of a short half-life reach their floor soon, and fall no further: without a bound, whatever is touched would end above
all else. Measured in docs/results.md."""

PAUSE_RATIO = 1.0
"""While clicks come, filling a version pauses after each batch for so many times as long as that took: learning and
deltas go before it, and a machine that is just fast enough for both is not overrun for as long as a version takes."""

ResultT = TypeVar("ResultT")
log = structlog.get_logger()


def start_job(job: Callable[[], ResultT]) -> Future[ResultT]:
    """Runs a job on a thread of its own: a daemon, so that it cannot keep the process alive."""
    future: Future[ResultT] = Future()

    def run() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="publish", daemon=True).start()
    return future


@dataclass(frozen=True)
class PublishSettings:
    """When to publish and how: see `TrainerSettings`, where each is explained."""

    publish_interval_seconds: float = 2.0
    first_publish_interval_seconds: float = 15.0
    full_publish_interval_seconds: float = 60.0
    publish_batch_points: int = 500
    hnsw_from_items: int = 200_000
    green_seconds: float = 300.0
    canary_queries: int = 32
    canary_recall: float = 0.9
    staleness_items: int = 256
    staleness_interval_seconds: float = 10.0
    full_publish_recall_lost: float = 0.5
    keep_versions: int = 2
    popularity_scale: float = 20.0
    settings_hash: str = ""


@dataclass(frozen=True)
class Version:
    """A version that this process fills or has filled."""

    number: int
    landmark: Float64Array
    """[H] log counts that its last dimensions are relative to."""
    step: int
    """Of the copy."""
    created_at: float
    length: float = 0.0
    """Of all its dense vectors, so that a graph finds them; 0: it has none, and they are as they are."""

    def landmark_now(self, log_totals: Float64Array) -> Float64Array:
        """[H] what points that are written now are relative to: the landmark, or what is LARGEST_RISE below the total.

        Args:
            log_totals: float64 [H] of the catalogue.
        """
        return np.maximum(self.landmark, log_totals - LARGEST_RISE)


@dataclass(frozen=True)
class Copy:
    """All that a full publish needs, taken between two micro-batches."""

    version: Version
    manifest: Manifest
    query_tower: QueryTower
    item_tower: ItemTower
    inputs: list[ItemInputs]
    points: Points
    """Without vectors: [0, D]."""
    log_counts: Float64Array
    """[n, H]"""
    covisit: Covisit | None = None
    rows: Int64Array | None = None
    """[n] the points' rows in `covisit`."""
    item_hash: UInt64Array | None = None
    """[N] of all rows."""

    def sparse_vectors(self, part: slice) -> SparseVectors | None:
        """Of some of the points."""
        if self.covisit is None or self.rows is None or self.item_hash is None:
            return None
        return self.covisit.item_vectors(self.rows[part], self.item_hash)


@dataclass(frozen=True)
class Filled:
    """A version whose collection is filled, and nobody's yet."""

    copy: Copy
    version: Version
    manifest: Manifest
    """With the version's names."""
    started: float


@dataclass(frozen=True)
class Delta:
    """Touched and gone items."""

    step: int
    points: Points
    num_new: int
    """The first so many points are not in the version yet; the others are, and are written nowhere else."""
    gone: UInt64Array
    canary: float | None = None
    """Event time of the newest canary, seconds since the epoch."""

    def applied_to(self, item_hash: UInt64Array) -> UInt64Array:
        """Of which items there are points where these had some before: rising."""
        return np.setdiff1d(np.union1d(item_hash, self.points.item_hash), self.gone)


@dataclass(frozen=True)
class Served:
    """What a version answers its invented users with: all that is needed to see later how stale it has become."""

    version: Version
    manifest: Manifest
    users: Users
    queries: Float32Array
    """[u, dense_dims] by the version's query tower and weights."""


@dataclass(frozen=True)
class Checked:
    """A version that is filled, caught up on and found good, and nobody's yet."""

    filled: Filled
    step: int
    """Up to which it was caught up on."""
    item_hash: UInt64Array
    """[n] of its points, rising."""
    num_points: int
    """Written so far."""
    served: Served | None
    """None: it has no items."""
    canary_recall: float | None
    """None: no canary queries are asked."""


@dataclass(frozen=True)
class Done:
    """A publish that was acknowledged."""

    step: int
    num_points: int
    seconds: float
    acknowledged_at: float
    """Seconds since the epoch."""
    canary_recall: float | None = None
    """Of a full publish, where canary queries are asked."""
    served: Served | None = None
    """Of a full publish with items in it."""


@dataclass(frozen=True)
class Rollout:
    """The jobs of a publisher. Each may raise IndexAwayError, CollectionGoneError, PinnedError, PublishStoppedError and
    OSError."""

    index: Index
    versions: Versions
    settings: PublishSettings
    clock: Callable[[], float] = time.time
    rising: Callable[[], float] = time.monotonic
    no_delta: threading.Event = field(default_factory=threading.Event)
    """Set while no delta is being written."""
    no_clicks: threading.Event = field(default_factory=threading.Event)
    """Set while no clicks come to be learnt."""

    def __post_init__(self) -> None:
        self.no_delta.set()
        self.no_clicks.set()

    def fill(self, taken: Copy) -> Filled:
        """Fills a new collection with every item of the copy."""
        started = self.rising()
        if (named := self.index.named()).pinned is not None:
            raise PinnedError(named)
        live = named.live
        # Above those that are removed now, too: a dead process may still have something under way there.
        number = 1 + max([taken.version.number - 1, live or 0, *self.index.versions(), *self.versions.numbers()])
        self._remove_unfinished(live)
        hnsw, scale = len(taken.points) >= self.settings.hnsw_from_items, self.settings.popularity_scale
        length = longest_vector(taken.log_counts, taken.version.landmark, scale) if hnsw else 0.0
        version = replace(taken.version, number=number, length=length)
        names = {"model_version": number, "collection": collection_name(self.index.alias, number)}
        manifest = msgspec.structs.replace(taken.manifest, **names, length_dims=int(hnsw))
        self.index.create(number, manifest.dense_dims, hnsw=hnsw, covisit=taken.covisit is not None)
        done, clicks_first = 0, _ClicksFirst(self)
        for inputs in taken.inputs:
            with torch.inference_mode():
                embedding = taken.item_tower(inputs).numpy()
            part = slice(done, done + len(embedding))
            points = Points(
                taken.points.item_hash[part],
                joined_vectors(embedding, taken.log_counts[part], version.landmark, scale, length),
                taken.points.item_ids[part],
                taken.points.payloads[part],
                taken.sparse_vectors(part),
            )
            for batch in points.batches(self.settings.publish_batch_points):
                clicks_first()
                self.index.upsert(number, batch, version.step)
            done += len(embedding)
        return Filled(taken, version, manifest, started)

    def check(self, filled: Filled, catch_up: Delta) -> Checked:
        """Catches up on what was touched while it was filled, and asks the canaries. Deltas go on meanwhile."""
        number, copied = filled.version.number, filled.copy
        self._write(number, catch_up, _ClicksFirst(self))
        self.index.wait_until_green(number, self.settings.green_seconds)
        item_hash = catch_up.applied_to(copied.points.item_hash)
        served = self._invent(filled.version, filled.manifest, copied.query_tower, item_hash)
        recall = self._ask_canaries(served) if served is not None and self.settings.canary_queries else None
        num_points = len(copied.points) + len(catch_up.points)
        return Checked(filled, catch_up.step, item_hash, num_points, served, recall)

    def make_live(self, checked: Checked, catch_up: Delta) -> Done:
        """Catches up on the little that was touched since the check, counts, puts the directory in place, switches the
        alias, removes old versions. No delta is written meanwhile: it would miss one of the two versions."""
        filled, number = checked.filled, checked.filled.version.number
        self._write(number, catch_up)
        wanted = len(catch_up.applied_to(checked.item_hash))
        if (found := self.index.count(number)) != wanted:
            raise IndexAwayError(f"version {number} has {found} points and should have {wanted}")
        self.versions.write(filled.manifest, filled.copy.query_tower)
        self.index.switch(number)
        done = Done(
            catch_up.step,
            checked.num_points + len(catch_up.points),
            self.rising() - filled.started,
            self.clock(),
            checked.canary_recall,
            checked.served,
        )
        try:
            self._remove_old(number)
        except (IndexAwayError, CollectionGoneError) as error:
            log.warning("old versions stay for now", error=str(error))
        return done

    def publish_delta(self, version: Version, delta: Delta) -> Done:
        """Writes a delta into a live version."""
        started = self.rising()
        self.no_delta.clear()
        try:
            named = self.index.named()
            if named.pinned not in (None, version.number):
                raise PinnedError(named)
            if named.live != version.number:
                raise CollectionGoneError(f"alias {self.index.alias} names {named.live}, not {version.number}")
            self._write(version.number, delta)
        finally:
            self.no_delta.set()
        return Done(delta.step, len(delta.points), self.rising() - started, self.clock())

    def _write(self, number: int, delta: Delta, before_each: Callable[[], object] = lambda: None) -> None:
        if len(delta.gone):
            self.index.delete(number, delta.gone, delta.step)
        size = self.settings.publish_batch_points
        for batch in delta.points.part(slice(0, delta.num_new)).batches(size):
            before_each()
            self.index.upsert(number, batch, delta.step)
        for batch in delta.points.part(slice(delta.num_new, len(delta.points))).batches(size):
            before_each()
            self.index.upsert(number, batch, delta.step, only_known=True)
        if delta.canary is not None:  # last, so that it tells of the whole delta
            self.index.tell_canary(number, delta.canary, delta.step)

    def _invent(
        self, version: Version, manifest: Manifest, query_tower: QueryTower, item_hash: UInt64Array
    ) -> Served | None:
        if not len(item_hash):
            return None
        users = invent_users(query_tower.config, item_hash, self.settings.canary_queries or 1, version.number)
        with torch.inference_mode():
            embedding = query_tower(users.inputs).numpy()
        return Served(version, manifest, users, users.queries(manifest, embedding))

    def _ask_canaries(self, served: Served) -> float:
        """Recall of the version's own way of searching. Raises CanaryError where that is too low."""
        number = served.version.number
        found, exact = (self.index.best(number, served.queries, LIMIT, exact=exact) for exact in (False, True))
        recall = recall_of(found, exact)
        if recall < self.settings.canary_recall:
            raise CanaryError(number, recall, self.settings.canary_recall)
        return recall

    def _remove_unfinished(self, live: int | None) -> None:
        """Removes what cut-off publishes left: above the live version, or without a directory."""
        whole = self.versions.numbers()
        for number in self.index.versions():
            if number != live and (number not in whole or (live is not None and number > live)):
                log.info("unfinished version removed", model_version=number)
                self.index.drop(number)
        for number in whole:
            if live is not None and number > live:
                self.versions.remove(number)
        self.versions.remove_unfinished()

    def _remove_old(self, live: int) -> None:
        """Keeps the live version, those before it that are to be kept, and one that was pinned since the switch."""
        for numbers, remove in (
            (self.index.versions(), self.index.drop),
            (self.versions.numbers(), self.versions.remove),
        ):
            before = [number for number in numbers if number < live]
            for number in before[: max(0, len(before) - self.settings.keep_versions + 1)]:
                named = self.index.named()
                if number not in (named.live, named.pinned):
                    remove(number)


class _ClicksFirst:
    """Called before each batch of a version that is being filled: lets what clicks wait for go before it."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self._since = rollout.rising()

    def __call__(self) -> None:
        rollout = self._rollout
        done = rollout.rising()
        pause = PAUSE_RATIO * (done - self._since)
        # Only so long, or deltas without a gap would stop versions.
        rollout.no_delta.wait(rollout.settings.publish_interval_seconds)
        rollout.no_clicks.wait(max(0.0, done + pause - rollout.rising()))
        self._since = rollout.rising()
