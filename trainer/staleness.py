"""How far what is served lags behind what is learnt, on a sample: cosines of item vectors, and the recall lost.

Station: beside publishing. It takes its sample on the loop's thread, between two micro-batches, reads what the index
holds of it on a thread of its own, and tells the publisher when that is too far from what the model would say now. It
publishes nothing.

Sampled are items, all with the same chance: those that nobody clicks lag most, and no delta touches them. The best
tenth of the sample for each invented user, by the served query tower, weights and vectors, is held against the best
tenth by the towers, weights and counts of now: what is not in both is the recall lost.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
import numpy as np
import structlog

from streams.contract import Float32Array, UInt64Array
from trainer.contract import Manifest
from trainer.index import CollectionGoneError, Index, IndexAwayError, PublishStoppedError, joined_vectors
from trainer.metrics import Metrics
from trainer.model import Model
from trainer.rollout import PublishSettings, Served, start_job

BEST_RATIO = 0.1
"""Share of the sample that is compared as the best."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Sample:
    """n items and the version's u users, by the model of one moment."""

    item_hash: UInt64Array
    """[n]"""
    vectors: Float32Array
    """[n, D + H] as a delta would have them."""
    queries: Float32Array
    """[u, D + H]"""


@dataclass(frozen=True)
class Lag:
    """What a sample gave."""

    mean_cosine: float
    p95_cosine: float
    """95 % of the items have at least this cosine."""
    recall_lost: float
    """0 … 1"""


def lag_of(served: Sample, now: Sample, dim: int) -> Lag:
    """Compares what is served of a sample with what it would be now; `dim` = D: cosines are of these alone."""
    ours, theirs = served.vectors[:, :dim], now.vectors[:, :dim]
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine = (ours * theirs).sum(axis=1) / np.maximum(lengths, 1e-12)
    num_best = max(1, round(BEST_RATIO * len(ours)))
    before, after = (np.argsort(-(s.queries @ s.vectors.T), axis=1)[:, :num_best] for s in (served, now))
    kept = np.mean([len(np.intersect1d(a, b)) / num_best for a, b in zip(before, after, strict=True)])
    return Lag(float(cosine.mean()), float(np.quantile(cosine, 0.05)), 1.0 - float(kept))


class Staleness:
    """Measures at intervals. `advance` is for the loop's thread and never waits."""

    def __init__(self, model: Model, index: Index, settings: PublishSettings, metrics: Metrics) -> None:
        self._model, self._index, self._settings, self._metrics = model, index, settings, metrics
        self._random = np.random.default_rng(0)
        self._due = 0.0
        self.job: Future[tuple[int, Lag | None]] | None = None
        """The measurement under way."""

    def advance(self, now: float, served: Served, manifest_of_now: Callable[[], Manifest]) -> bool:
        """Begins and ends measurements; whether the one that has just ended lost more recall than is allowed.

        Args:
            now: seconds that never go back.
            served: the live version.
            manifest_of_now: gives one with the weights of now.
        """
        too_stale = False
        if self.job is not None and self.job.done():
            job, self.job = self.job, None
            too_stale = self._finish(job, served)
        if self.job is None and now >= self._due and self._settings.staleness_items:
            self._due = now + self._settings.staleness_interval_seconds
            if (sample := self._take_sample(served, manifest_of_now())) is not None:
                self.job = start_job(lambda: (served.version.number, self._measure(served, sample)))
        return too_stale

    def _finish(self, job: Future[tuple[int, Lag | None]], served: Served) -> bool:
        try:
            number, lag = job.result()
        except (IndexAwayError, CollectionGoneError) as error:
            log.warning("staleness not measured", error=str(error))
            return False
        except PublishStoppedError:
            return False
        if lag is None or number != served.version.number:
            return False
        self._metrics.served_cosine.labels("mean").set(lag.mean_cosine)
        self._metrics.served_cosine.labels("p95").set(lag.p95_cosine)
        self._metrics.recall_lost.set(lag.recall_lost)
        return 0 < self._settings.full_publish_recall_lost < lag.recall_lost

    def _take_sample(self, served: Served, manifest: Manifest) -> Sample | None:
        catalogue, learner = self._model.catalogue, self._model.learner
        rows = np.flatnonzero(~catalogue.deleted & (catalogue.published >= 0))
        if not len(rows):
            return None
        rows = self._random.choice(rows, min(self._settings.staleness_items, len(rows)), replace=False)
        embedding, log_counts = learner.embed_items(catalogue.inputs_of_rows(rows)), catalogue.log_counts(rows)
        version, scale = served.version, self._settings.popularity_scale
        vectors = joined_vectors(
            embedding, log_counts, version.landmark_now(catalogue.log_totals), scale, version.length
        )
        alike = msgspec.structs.replace(manifest, length_dims=served.manifest.length_dims)
        queries = served.users.queries(alike, learner.embed_queries(served.users.inputs))
        return Sample(catalogue.item_hash[rows], vectors, queries)

    def _measure(self, served: Served, now: Sample) -> Lag | None:
        found = self._index.vectors(served.version.number, now.item_hash)
        there = np.array([key in found for key in now.item_hash.tolist()])
        if not there.any():
            return None
        items = now.item_hash[there]
        before = Sample(items, np.stack([found[key] for key in items.tolist()]), served.queries)
        return lag_of(before, Sample(items, now.vectors[there], now.queries), served.manifest.embedding_dim)
