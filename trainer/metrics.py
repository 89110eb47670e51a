"""What the trainer measures; served at /metrics of its own port.

Station: beside the data's way. Help texts are the formulas; docs/metrics.md is held against them. No label ever holds
an id or a version.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from streams.contract import Float64Array

if TYPE_CHECKING:
    from trainer.catalogue import Catalogue
    from trainer.evaluate import Prequential
    from trainer.progress import Progress

CUTOFFS = (10, 100)
"""The K of recall at K."""
PUBLISH_KINDS = ("full", "delta")
CHECKPOINT_KINDS = ("full", "changes")
DANGERS = ("non_finite", "norm", "recall")
"""What trips the guard: see `trainer.guard`."""
STAGES = ("wait", "items", "evaluate", "learn", "touch", "checkpoint", "publish")
"""What the loop's thread spends its time on."""
SERVABLE_STAGES = ("queue", "learn", "publish")
"""What a click's time until it is servable is made of: see `trainer.freshness`."""
SERVABLE_SECONDS = tuple(sorted({5.0, 10.0} | {round(0.01 * 1.25**k, 6) for k in range(48)}))
"""Edges of the freshness histogram: 10 ms to 6 minutes in steps of a quarter, and the objectives 5 s and 10 s."""
LOSSES = 100
"""Micro-batches that the loss is a mean over."""


class SecondsHistogram(Collector):
    """A classic Prometheus histogram that observes whole arrays; safe to observe from any thread."""

    def __init__(
        self,
        name: str,
        text: str,
        edges: tuple[float, ...],
        registry: CollectorRegistry,
        label: str = "",
        values: tuple[str, ...] = ("",),
    ) -> None:
        """`values`: all that the label ever has; without a label there is one histogram."""
        self.name, self.text = name, text
        self._edges, self._label, self._values = np.array(edges), label, values
        self._counts = np.zeros((len(values), len(edges) + 1), np.int64)
        self._sums = np.zeros(len(values))
        self._lock = threading.Lock()
        registry.register(self)

    def observe(self, seconds: Float64Array, weights: Float64Array | None = None, value: str = "") -> None:
        """Counts each of `seconds` [n], `weights` [n] times (once by default), where the label has this value."""
        place = np.searchsorted(self._edges, seconds, side="left")
        counts = np.bincount(place, weights, minlength=self._counts.shape[1]).astype(np.int64)
        row = self._values.index(value)
        with self._lock:
            self._counts[row] += counts
            self._sums[row] += np.dot(seconds, np.ones(len(seconds)) if weights is None else weights)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The histogram as Prometheus reads it."""
        with self._lock:
            cumulative, sums = np.cumsum(self._counts, axis=1).astype(float).tolist(), self._sums.tolist()
        edges = [*map(floatToGoString, self._edges), "+Inf"]
        family = HistogramMetricFamily(self.name, self.text, labels=[self._label] if self._label else [])
        for value, counts, total in zip(self._values, cumulative, sums, strict=True):
            family.add_metric([value] if self._label else [], list(zip(edges, counts, strict=True)), total)
        yield family


class Metrics:
    """All metrics of one trainer, on a registry of its own; every child exists from the start."""

    def __init__(
        self, registry: CollectorRegistry | None = None, *, rising: Callable[[], float] = time.perf_counter
    ) -> None:
        """`rising`: seconds that never go back."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry() if registry is None else registry
        stem = "streamtower_trainer_"

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(stem + name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(stem + name, text, labels, registry=registry)

        def histogram(name: str, text: str, edges: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(stem + name, text, labels, buckets=edges, registry=registry)

        self.clicks_learnt = counter("clicks_learnt_total", "Clicks (rows of micro-batches) learnt by this process.")
        self.rows_already_learnt = counter(
            "rows_already_learnt_total", "Rows dropped because their source offset had been learnt: delivered again."
        )
        self.micro_batches = counter(
            "micro_batches_total", "Micro-batches with at least one row that was learnt by this process."
        )
        self.steps = counter("steps_total", "Optimizer steps taken by this process.")
        self.source_gap = counter(
            "source_gap_offsets_total",
            "Source offsets between the next one to learn and the first one of the next micro-batch: never delivered.",
        )
        self.consumer_lag = gauge(
            "consumer_lag_messages", "Micro-batches in Kafka that are not learnt yet, over all partitions."
        )
        self.kafka_up = gauge("kafka_up", "1 if Kafka answered the last time it was heard or asked, else 0.")
        self.learnt_timestamp = gauge(
            "learnt_click_timestamp_seconds",
            "Largest ingest time among the clicks learnt, in seconds since the epoch; 0 before the first.",
        )

        self.loss = gauge(
            "loss", "Mean loss per row, from before each step's update, over the last 100 micro-batches learnt."
        )
        self.loss_first = gauge(
            "loss_first", "Mean loss per row over the first up to 100 micro-batches that the model ever learnt."
        )
        recall = (
            "over the last evaluation_window_clicks tested clicks; tested before learnt, a never-seen item is a miss."
        )
        self.prequential_recall = gauge(
            "prequential_recall_at_k",
            f"Share of clicks whose item the served score ranks among the first k, {recall}",
            "k",
        )
        self.popularity_recall = gauge(
            "popularity_recall_at_k", f"Share of clicks whose item log q alone ranks among the first k, {recall}", "k"
        )
        self.recall_ceiling = gauge(
            "recall_ceiling_ratio",
            f"Share of clicks whose item was known at all: the most that recall can be, {recall}",
        )
        self.clicks_evaluated = counter("clicks_evaluated_total", "Clicks on which the model was tested.")

        self.items_known = gauge("items_known", "Items in the catalogue that may be served.")
        self.items_deleted = gauge("items_deleted", "Items in the catalogue that are gone (tombstones).")
        self.items_dropped = gauge(
            "items_dropped", "Items ever dropped from the catalogue because max_items was reached."
        )
        self.items_expired = gauge(
            "items_expired", "Items ever dropped from the catalogue because of their age, see expire_clicks."
        )
        self.items_waiting = gauge("items_waiting", "Unknown items that wait for their admit_clicks clicks.")
        self.item_events = counter("item_events_total", "Item events taken into the catalogue, tombstones included.")
        self.item_events_rejected = counter(
            "item_events_rejected_total", "Item events passed over because they break the contract."
        )

        self.items_published = counter(
            "items_published_total",
            "Points of acknowledged upserts: full = into a new version; delta = into the live one.",
            "kind",
        )
        self.publish_seconds = histogram(
            "publish_seconds",
            "Seconds of a finished publish: full = from the copy to the switched alias; delta = from the copy to the "
            "last acknowledgement.",
            (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
            "kind",
        )
        self.publish_failures = counter(
            "publish_failures_total",
            "Publishes given up after all attempts; delete = deletes in versions that get no deltas.",
            "kind",
        )
        self.served_cosine = gauge(
            "served_cosine_ratio",
            "Cosine between the item embedding that the index holds and the one that the towers give now, over "
            "staleness_items items drawn at random: of = mean; p95: 95 % of the items have at least this one.",
            "of",
        )
        self.recall_lost = gauge(
            "served_recall_lost_ratio",
            "1 - share of the best tenth of staleness_items items by the towers, weights and counts of now that is "
            "also in the best tenth as served (dense score), mean over canary_queries invented users.",
        )
        self.early_publishes = counter(
            "early_publishes_total", "Full publishes begun early: served_recall_lost_ratio was too high."
        )
        self.canary_recall = gauge(
            "canary_recall_ratio",
            "Share of the exact best 100 items of canary queries that the newest version finds with its collection's "
            "own parameters, mean over canary_queries queries of invented users; 0 before the first.",
        )
        self.canary_failures = counter(
            "canary_failures_total", "Versions that did not go live because their canary_recall_ratio was too low."
        )
        self.qdrant_retries = counter("qdrant_retries_total", "Calls to Qdrant repeated after an error that may pass.")
        self.index_version = gauge("index_version", "Number of the live version; 0 before the first of this process.")
        self.pinned_version = gauge(
            "pinned_version", "Number of the version that an operator holds live: nothing else is published; 0: none."
        )
        self.index_version_timestamp = gauge(
            "index_version_timestamp_seconds", "When the live version's copy was taken, in seconds since the epoch."
        )
        self.publish_timestamp = gauge(
            "publish_timestamp_seconds", "When a publish was last acknowledged, in seconds since the epoch."
        )
        self.items_unpublished = gauge(
            "items_unpublished",
            "Items that the live version does not hold as they are: touched since they were published last, as of the "
            "last delta that was begun or acknowledged.",
        )
        self.unservable_timestamp = gauge(
            "unservable_click_timestamp_seconds",
            "Smallest ingest time among the learnt clicks that no acknowledged publish carries yet, in seconds since "
            "the epoch, as of the last delta that was begun or acknowledged; 0: there is none.",
        )
        self.delta_limit = gauge(
            "delta_limit_items",
            "Most points of the next delta: those that fit publish_interval_seconds at the measured rate; what is "
            "left over waits for the one after.",
        )
        self.click_to_servable = SecondsHistogram(
            stem + "click_to_servable_seconds",
            "Seconds from a click's ingest time (Kafka's timestamp) to the acknowledged publish with its effect; those "
            "on items that are not admitted or are gone have none, and do not count.",
            SERVABLE_SECONDS,
            registry,
        )
        self.servable_stage = SecondsHistogram(
            stem + "servable_stage_seconds",
            "Seconds of a click by stage: queue = from its ingest time to the poll that gave it to the trainer; "
            "learn = from there until it is learnt; publish = from there to the acknowledged publish with its effect. "
            "The same clicks count in all.",
            SERVABLE_SECONDS,
            registry,
            "stage",
            SERVABLE_STAGES,
        )

        self.checkpoint_seconds = histogram(
            "checkpoint_seconds",
            "Seconds of a finished checkpoint, from the copy to the renamed directory; most of it beside the loop.",
            (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
        )
        self.checkpoint_pause = histogram(
            "checkpoint_pause_seconds",
            "Seconds for which a checkpoint stopped learning: to copy the state, before it is written beside the loop.",
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
        )
        self.checkpoint_bytes = counter(
            "checkpoint_bytes_total",
            "Bytes of checkpoints written: full = all; changes = what had changed since a full one.",
            "kind",
        )
        self.checkpoint_failures = counter(
            "checkpoint_failures_total", "Checkpoints that could not be written; the one before stands."
        )
        self.checkpoint_timestamp = gauge(
            "checkpoint_timestamp_seconds", "When the newest checkpoint's copy was taken, in seconds since the epoch."
        )
        self.publishing_held = gauge(
            "publishing_held",
            "1 if nothing is saved or published, because learning has come apart in this process; else 0.",
        )
        self.dangers = counter(
            "dangers_total",
            "Micro-batches or windows of tested clicks that tripped the guard: non_finite = the loss, a gradient or a "
            "weight was no finite number; norm = a gradient or weights were guard_norm_factor times as long as usual; "
            "recall = recall at 10 fell below guard_recall_ratio of the usual one and below that of popularity.",
            "danger",
        )
        self.rollbacks = counter("rollbacks_total", "Returns to the newest checkpoint after the guard had tripped.")
        self.clicks_passed_over = counter(
            "clicks_passed_over_total",
            "Clicks that are not in the model: of micro-batches with a loss that is not finite, and those learnt "
            "between the checkpoint and the moment of a rollback.",
        )
        self.stage_seconds = counter("stage_seconds_total", "Seconds that the loop spent, by what it did.", "stage")
        self._newest, self._evaluated = 0.0, 0
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._rising = rising
        for kind in PUBLISH_KINDS:
            for metric in (self.items_published, self.publish_seconds, self.publish_failures):
                metric.labels(kind)
        self.publish_failures.labels("delete")
        for of in ("mean", "p95"):
            self.served_cosine.labels(of)
        for cutoff in CUTOFFS:
            self.prequential_recall.labels(str(cutoff))
            self.popularity_recall.labels(str(cutoff))
        for kind in CHECKPOINT_KINDS:
            self.checkpoint_bytes.labels(kind)
        for danger in DANGERS:
            self.dangers.labels(danger)
        for stage in STAGES:
            self.stage_seconds.labels(stage)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the seconds of what it encloses as this stage's."""
        started = self._rising()
        try:
            yield
        finally:
            self.stage_seconds.labels(name).inc(max(0.0, self._rising() - started))

    def learnt(self, num_clicks: int, num_steps: int, loss: float, newest_ingest_time: float) -> None:
        """A micro-batch was learnt: mean loss per row, largest ingest time in seconds since the epoch."""
        self.clicks_learnt.inc(num_clicks)
        self.micro_batches.inc()
        self.steps.inc(num_steps)
        self._losses.append(loss)
        self._newest = max(self._newest, newest_ingest_time)

    def report(
        self,
        catalogue: Catalogue,
        progress: Progress,
        evaluation: Prequential | None,
        lag: int,
    ) -> None:
        """Sets the gauges from the state; `lag` in micro-batches. Recall is 0 before the first test."""
        self.consumer_lag.set(lag)
        self.learnt_timestamp.set(self._newest)
        if self._losses:
            self.loss.set(math.fsum(self._losses) / len(self._losses))
        if progress.first_losses:
            self.loss_first.set(math.fsum(progress.first_losses) / len(progress.first_losses))
        self.items_known.set(catalogue.num_items)
        self.items_deleted.set(catalogue.num_deleted)
        self.items_dropped.set(catalogue.num_dropped)
        self.items_expired.set(catalogue.num_expired)
        self.items_waiting.set(len(catalogue.admission))
        if evaluation is not None:
            if evaluation.num_evaluated < self._evaluated:  # the guard has rolled back: it is another one
                self._evaluated = 0
            self.clicks_evaluated.inc(evaluation.num_evaluated - self._evaluated)
            self._evaluated = evaluation.num_evaluated
        if evaluation is not None and len((window := evaluation.window()).rank):
            self.recall_ceiling.set(window.ceiling())
            for cutoff in CUTOFFS:
                self.prequential_recall.labels(str(cutoff)).set(window.recall(cutoff))
                self.popularity_recall.labels(str(cutoff)).set(window.popularity_recall(cutoff))
