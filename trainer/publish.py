"""Publishing: which item vectors go into the index when, and which query tower belongs to them.

Station: between the loop, which owns towers and catalogue, and the index. Copies are taken on the loop's thread,
between two micro-batches, so that they fit together; what waits happens on threads of its own (`rollout`), so that
learning goes on. It decides no score: vectors and weights are in the Manifest.

**Full publish** = a new model version. A copy of both towers and of every item is taken; a new collection is filled,
its number above all that ever were; the items touched meanwhile are caught up on; canary queries find enough of what
exact search finds; the few items touched since are caught up on too, the points are counted, the version's directory
(query tower, Manifest) is put in place, the alias is switched. Deltas into the version before go on until that last
step. Until then readers see nothing of the new one. What a cut-off publish leaves is removed before the next one.
When: as soon as there is an item, also after a restart: a process writes only into collections that it has filled
itself, so that nothing that an earlier process still has under way can reach the live one. Then after
`first_publish_interval_seconds`, then after twice as long each time up to `full_publish_interval_seconds`, because the
query tower of a version stands still while item vectors move, and a young model moves fastest; but never within what
the last one took, twice that from the third version on. At once when the live
collection or the alias has disappeared, and as soon as that allows it when what is served has fallen too far behind
(`staleness`).

**Delta** = the items touched since their last acknowledged copy, as many as fit the interval, new items first
(`waiting`), into the live collection; and a delete of the items that went, again and again for a minute, because a
late upsert could bring back what was new and then went; one of items that are there already makes no points. From all
other versions that may be served they are deleted too (`deletions`), whether or not one is pinned.

While an operator holds a version live (`aliases`), no other one is made and nothing is written into any, but deltas go
on into the held one if this process has filled it. What is touched meanwhile goes out when none is held any more.

While Qdrant is away, learning goes on; what is touched meanwhile is published when it is back.
"""

from __future__ import annotations

import copy
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import numpy as np
import structlog

from streams.contract import Float32Array, Int64Array, MicroBatch, UInt64Array
from trainer.aliases import Named
from trainer.catalogue import EMBED_ITEMS
from trainer.contract import Manifest
from trainer.deletions import OtherVersions
from trainer.freshness import Freshness
from trainer.gone import Sweeps
from trainer.index import (
    CanaryError,
    CollectionGoneError,
    IndexAwayError,
    PinnedError,
    Points,
    PublishStoppedError,
    joined_vectors,
)
from trainer.manifests import manifest_of
from trainer.metrics import Metrics
from trainer.model import Model
from trainer.progress import Progress
from trainer.rollout import Checked, Copy, Delta, Done, Filled, Rollout, Served, Version, start_job
from trainer.staleness import Staleness
from trainer.waiting import PublishRate, Turn, give_back, take_turn

LONGEST_PAUSE_SECONDS = 30.0
"""Between attempts to publish, while Qdrant is away."""
LONGEST_LULL_SECONDS = 1.0
"""After so long without a click, none come at present."""
CLOSE_SECONDS = 3.0
"""How long `close` waits for what is under way."""
NOTHING = np.zeros(0, np.uint64)

ResultT = TypeVar("ResultT")
log = structlog.get_logger()


class Publisher:
    """Takes copies and has them published. All methods are for the loop's thread."""

    def __init__(
        self,
        rollout: Rollout,
        model: Model,
        progress: Progress,
        metrics: Metrics,
        *,
        stopping: threading.Event | None = None,
    ) -> None:
        """
        Args:
            rollout: does the work; its settings say when, its clocks count.
            model: read when copies are taken.
            progress: read when copies are taken; `model_version` is kept up to date.
            stopping: the event that the index was given; `close` sets it.
        """
        self._rollout, self._settings = rollout, rollout.settings
        self._model, self._progress, self._metrics = model, progress, metrics
        self._catalogue, self._learner = model.catalogue, model.learner
        self._stopping = stopping or threading.Event()
        self._rising = rollout.rising
        self.freshness = Freshness(metrics, rollout.clock)
        self.live: Version | None = None
        """The live version, if this process has published one."""
        self.published_step = -1
        """What was touched after it is not in the live version, or not as it is now; nor are the items left over."""
        self._rate = PublishRate(self._settings.publish_interval_seconds, self._settings.publish_batch_points)
        self._turn: Turn | None = None
        """Of the delta that is under way."""
        self._num_left = 0
        self._canary: float | None = None
        """Event time of the newest canary, seconds since the epoch."""
        self._canary_told: float | None = None
        """That of the canary that the live version tells of."""
        self._sweeps = Sweeps()
        """Of the live version."""
        self._others = OtherVersions(rollout, model.catalogue, progress, metrics)
        self._staleness = Staleness(model, rollout.index, self._settings, metrics)
        self._served: Served | None = None
        self._full_took = 0.0
        self._fill: Future[Filled] | None = None
        self._check: Future[Checked] | None = None
        self._checked: Checked | None = None
        self._switch: Future[Done] | None = None
        self._delta: Future[Done] | None = None
        self._look: Future[Named] | None = None
        self._named: Named | None = None
        """What the aliases named when they were looked at last; None: they were not."""
        self._look_due = self._delta_due = self._full_due = self._full_started = -math.inf
        self._clicks_seen, self._no_clicks_at = 0, -math.inf
        self._num_full = 0
        self._failures = {"delta": 0, "full": 0}

    def without_canary(self, batch: MicroBatch) -> MicroBatch | None:
        """The rows that are to be learnt; the next delta tells of those that only measure the way. None: no others."""
        if not (is_canary := batch.is_canary).any():
            return batch
        self._canary = float(batch.event_time[is_canary][-1])
        return None if is_canary.all() else batch.take(np.flatnonzero(~is_canary))

    def advance(self) -> None:
        """Takes up what has finished and begins what is due. Never waits; raises only what is a bug."""
        now = self._rising()
        self._look_for_clicks(now)
        self._finish(now)
        if self._look is None and now >= self._look_due:
            self._look_due = now + self._settings.publish_interval_seconds
            self._look = start_job(self._rollout.index.named)
        if self._checked is not None and self._switch is None and self._delta is None:
            checked, rest = self._checked, self._take_catch_up(self._checked.filled.version, self._checked.step)
            self._switch = start_job(lambda: self._rollout.make_live(checked, rest))
        pinned = None if self._named is None else self._named.pinned
        may_fill = self._named is not None and pinned is None and self._catalogue.num_items
        if not self._is_publishing and now >= self._full_due and may_fill:
            taken, self._full_started = self._take_copy(), now
            self._fill = start_job(lambda: self._rollout.fill(taken))
        is_ours = self.live is not None and pinned in (None, self.live.number)
        if self.live and is_ours and self._delta is None and self._switch is None and now >= self._delta_due:
            self._delta_due = now + self._settings.publish_interval_seconds
            sweeps = self._catalogue.gone.last > self._sweeps.step
            canary = self._canary != self._canary_told
            if self._progress.step > self.published_step or self._num_left or sweeps or canary:
                self._turn = take_turn(self._catalogue, self._progress.step, self._rate.limit)
                version, turn = self.live, self._turn
                delta = self._take_delta(version, turn.rows, turn.num_new, self._sweeps.step)
                if canary:
                    delta, self._canary_told = replace(delta, canary=self._canary), self._canary
                self._report(len(self._turn.rows) + len(self._turn.left))
                self._delta = start_job(lambda: self._rollout.publish_delta(version, delta))
        if self._switch is None:  # else a version is there that is neither live nor another one
            self._others.advance(now, self.live.number if self.live else None, own_gets_deltas=is_ours)
        if self.live:
            self._catalogue.gone.forget(min(self.live.step, self._others.sweeps.step))
        if self._served is not None and self._staleness.advance(now, self._served, self._manifest):
            due = max(now, self._full_started + self._least_pause)
            if due < self._full_due and not self._is_publishing:
                self._metrics.early_publishes.inc()
                self._full_due = due

    @property
    def _least_pause(self) -> float:
        """Seconds from the start of the last version to that of the next, at least: versions must not crowd the index,
        but the first one is of a model that knows nothing, and to stay with it long costs more."""
        return self._full_took * (1.0 if self._num_full == 1 else 2.0)

    @property
    def idle(self) -> bool:
        """Whether the live version has all that is known, and nothing is under way."""
        has_all = self.published_step >= self._progress.step and not self._num_left
        has_all &= self._canary == self._canary_told
        return self.live is not None and not self._is_publishing and self._delta is None and has_all

    @property
    def _is_publishing(self) -> bool:
        """Whether there is a version on its way."""
        return any(part is not None for part in (self._fill, self._check, self._checked))

    def close(self) -> None:
        """Stops what is under way; nothing is lost, for a restart publishes in full."""
        self._stopping.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        elsewhere = (self._others.job, self._staleness.job)
        for future in (self._look, self._fill, self._check, self._switch, self._delta, *elsewhere):
            while future is not None and not future.done() and time.monotonic() < deadline:
                time.sleep(0.01)
        self._finish(self._rising())

    def _look_for_clicks(self, now: float) -> None:
        """Tells the rollout whether clicks come."""
        if self._progress.clicks_learnt > self._clicks_seen:
            self._clicks_seen, self._no_clicks_at = self._progress.clicks_learnt, now + LONGEST_LULL_SECONDS
            self._rollout.no_clicks.clear()
        elif now >= self._no_clicks_at:
            self._rollout.no_clicks.set()

    def _take_copy(self) -> Copy:
        catalogue = self._catalogue
        rows = np.flatnonzero(~catalogue.deleted)
        # One copy of both, so that they go on sharing their tables.
        query_tower, item_tower = copy.deepcopy((self._learner.query_tower, self._learner.item_tower))
        manifest = self._manifest()
        version = Version(manifest.model_version, catalogue.log_totals, self._progress.step, manifest.created_at)
        starts = range(0, len(rows), EMBED_ITEMS)
        inputs = [catalogue.inputs_of_rows(rows[start : start + EMBED_ITEMS]) for start in starts]
        points = self._take_points(rows, catalogue.embedding[:0])
        return Copy(
            version,
            manifest,
            query_tower,
            item_tower,
            inputs,
            points,
            catalogue.log_counts(rows),
            self._model.covisit and self._model.covisit.snapshot(),
            rows,
            catalogue.item_hash.copy(),
        )

    def _manifest(self) -> Manifest:
        """Of the version that a copy taken now would be."""
        return manifest_of(
            self._model, self._progress, self._settings, self._rollout.index.alias, self._rollout.clock()
        )

    def _take_catch_up(self, version: Version, step: int) -> Delta:
        """All that was touched after a step, for a version that is not live yet and has everything up to it."""
        catalogue = self._catalogue
        rows = np.flatnonzero((catalogue.touched > step) & ~catalogue.deleted)
        is_known = catalogue.added[rows] <= step
        rows, num_new = rows[np.argsort(is_known, kind="stable")], int(np.count_nonzero(~is_known))
        return self._take_delta(version, rows, num_new, step)

    def _take_delta(self, version: Version, rows: Int64Array, num_new: int, gone_since: int) -> Delta:
        catalogue, scale = self._catalogue, self._settings.popularity_scale
        landmark = version.landmark_now(catalogue.log_totals)
        vectors = joined_vectors(catalogue.embedding[rows], catalogue.log_counts(rows), landmark, scale, version.length)
        counts = self._model.covisit
        covisit = counts.item_vectors(rows, catalogue.item_hash) if counts is not None else None
        points = replace(self._take_points(rows, vectors), covisit=covisit)
        return Delta(self._progress.step, points, num_new, catalogue.gone.since(gone_since))

    def _take_points(self, rows: Int64Array, vectors: Float32Array) -> Points:
        catalogue, numbers = self._catalogue, rows.tolist()
        return Points(
            item_hash=catalogue.item_hash[rows],
            vectors=vectors,
            item_ids=[catalogue.item_id(row) for row in numbers],
            payloads=[catalogue.payload(row) for row in numbers],
        )

    def _finish(self, now: float) -> None:
        if self._look is not None and self._look.done():
            look, self._look = self._look, None
            try:
                self._looked(look.result())
            except (IndexAwayError, CollectionGoneError, PublishStoppedError):
                self._looked(Named())  # the jobs look again themselves, and say what is wrong
        if self._delta is not None and self._delta.done():
            delta, self._delta, turn, self._turn = self._delta, None, self._turn, None
            assert turn is not None
            if done := self._result(delta, "delta", now):
                self._acknowledged(done, "delta", turn.left)
                self._sweeps.acknowledge(now, done.step)
            else:
                give_back(self._catalogue, turn)
                self._canary_told = None
        if self._fill is not None and self._fill.done():
            fill, self._fill = self._fill, None
            if (filled := self._result(fill, "full", now)) and not self._stopping.is_set():
                self._progress.model_version = max(self._progress.model_version, filled.version.number)
                catch_up = self._take_catch_up(filled.version, filled.version.step)
                self._check = start_job(lambda: self._rollout.check(filled, catch_up))
        if self._check is not None and self._check.done():
            check, self._check = self._check, None
            self._checked = self._result(check, "full", now)
        if self._checked is not None and self._switch is not None and self._switch.done():
            switch, checked, self._switch, self._checked = self._switch, self._checked, None, None
            if done := self._result(switch, "full", now):
                self._went_live(checked.filled.version, done, now)

    def _looked(self, named: Named) -> None:
        if named.pinned and (self._named is None or named.pinned != self._named.pinned):
            log.warning("a version is pinned, and no other one is made live", pinned=named.pinned)
        self._named = named
        self._metrics.pinned_version.set(named.pinned or 0)
        live = self.live.number if self.live is not None else 0
        self._metrics.index_version.set(named.pinned or live)

    def _went_live(self, version: Version, done: Done, now: float) -> None:
        self.live = version
        if self._canary is not None:
            self._canary_told, self._delta_due = None, now
        self._served = done.served
        self._full_took = now - self._full_started
        # The version before is one of the others from here on, swept as far as deltas have swept it.
        self._others.sweeps.begin_at(min(self._others.sweeps.step, self._sweeps.step))
        self._sweeps.begin_at(version.step)
        self._catalogue.published[:] = done.step
        self._acknowledged(done, "full")
        self._metrics.index_version.set(version.number)
        self._metrics.index_version_timestamp.set(version.created_at)
        if done.canary_recall is not None:
            self._metrics.canary_recall.set(done.canary_recall)
        interval = min(
            self._settings.first_publish_interval_seconds * 2.0 ** min(self._num_full, 30),
            self._settings.full_publish_interval_seconds,
        )
        self._num_full += 1
        self._full_due = self._full_started + max(interval, self._least_pause)
        log.info("published", model_version=version.number, items=done.num_points, seconds=round(done.seconds, 3))

    def _acknowledged(self, done: Done, kind: str, left: UInt64Array = NOTHING) -> None:
        self.published_step, self._num_left = done.step, len(left)
        self._failures[kind] = 0
        if kind == "delta" or not self._rate.points_per_second:
            self._rate.observe(done.num_points, done.seconds)
        self.freshness.acknowledge(done.step, done.acknowledged_at, left)
        self._metrics.items_published.labels(kind).inc(done.num_points)
        self._metrics.publish_seconds.labels(kind).observe(done.seconds)
        self._metrics.publish_timestamp.set(done.acknowledged_at)
        self._report(len(left))

    def _report(self, num_waiting: int) -> None:
        self._metrics.items_unpublished.set(num_waiting)
        self._metrics.unservable_timestamp.set(self.freshness.oldest)
        self._metrics.delta_limit.set(self._rate.limit)

    def _result(self, future: Future[ResultT], kind: str, now: float) -> ResultT | None:
        """What a finished job gives, or None: it failed, which is counted and its next attempt set."""
        try:
            return future.result()
        except PublishStoppedError:
            return None
        except PinnedError as error:
            self._looked(error.named)
            return None
        except (IndexAwayError, CollectionGoneError, OSError) as error:
            self._failures[kind] += 1
            pause = min(2.0 ** min(self._failures[kind] - 1, 30), LONGEST_PAUSE_SECONDS)
            self._metrics.publish_failures.labels(kind).inc()
            if isinstance(error, CanaryError):
                # It went all the way: no less time to the next attempt than to the next version.
                pause = max(pause, 4 * (now - self._full_started))
                self._metrics.canary_failures.inc()
                self._metrics.canary_recall.set(error.recall)
            log.warning("publish failed", kind=kind, error=str(error), next_attempt_seconds=pause)
            if kind == "full":
                self._full_due = now + pause
            else:
                self._delta_due = now + pause
            if kind == "delta" and isinstance(error, CollectionGoneError):
                self.live, self._served, self._full_due = None, None, now
            return None
