"""Follows the alias: which published version is served, and how that changes while requests run.

Station: beside the data's way. A version is exchanged as one immutable pair of query tower and collection, so a request
that holds a pair can never mix two versions.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import structlog

from retriever.encode import ServedVersion, VersionError, load_version
from retriever.metrics import Metrics
from retriever.search import Index, SearchError
from trainer.contract import ManifestError, load_manifest, version_directory

log = structlog.get_logger(__name__)


class Versions:
    """The served version. `refresh`, called every now and then, asks Qdrant which one it should be."""

    def __init__(self, index: Index, alias: str, model_dir: Path, metrics: Metrics) -> None:
        self._index = index
        self._alias = alias
        self._model_dir = model_dir
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self.served: ServedVersion | None = None
        """What requests are answered with; None before the first version."""
        self.problem: str | None = "no version published yet: the alias has not been looked up"
        """Why this retriever is not ready; None while Qdrant answers and the version that it names is served."""
        self.qdrant_is_away = False
        """Whether the last look-up of the alias had no answer."""

    async def refresh(self, stale: ServedVersion | None = None) -> None:
        """Looks the alias up and serves what it names. Never raises for a dead Qdrant or a torn version.

        Args:
            stale: a version that a request has just found to be gone. Where another one is served by now, nothing is
                done: many requests notice at once, and one look-up is enough.
        """
        async with self._lock:
            if stale is not None and self.served is not stale:
                return
            before = self.problem
            self.problem = await self._refresh()
            if self.problem != before and self.problem is not None:
                log.warning("not ready", reason=self.problem)

    async def _refresh(self) -> str | None:
        try:
            collection = await self._index.collection_of(self._alias)
        except SearchError as error:
            self._metrics.qdrant_up.set(0)
            self.qdrant_is_away = True
            return str(error)
        self._metrics.qdrant_up.set(1)
        self.qdrant_is_away = False
        if collection is None:
            return f"no version published yet: Qdrant has no alias {self._alias!r}"
        if self.served is not None and self.served.collection == collection and await self._is_unchanged(self.served):
            return None
        try:
            served = await self._load(collection)
        except (VersionError, SearchError) as error:
            self._metrics.version_load_failures.inc()
            return str(error)
        if self.served is not None:
            self._metrics.version_switches.inc()
        self.served = served
        self._metrics.model_version.set(served.manifest.model_version)
        self._metrics.version_created.set(served.manifest.created_at)
        return None

    async def _is_unchanged(self, served: ServedVersion) -> bool:
        """False where the directory holds another version of the same number: everything was begun anew."""
        directory = version_directory(self._model_dir, served.manifest.model_version)
        try:
            return await asyncio.to_thread(load_manifest, directory) == served.manifest
        except ManifestError:
            return True  # removed: what is loaded stays good as long as its collection is there

    async def _load(self, collection: str) -> ServedVersion:
        started = time.perf_counter()
        served = await asyncio.to_thread(load_version, self._model_dir, self._alias, collection)
        manifest = served.manifest
        wanted = manifest.embedding_dim + manifest.popularity_dims
        if (size := await self._index.vector_size(collection)) != wanted:
            raise VersionError(
                f"collection {collection!r} has dense vectors of {size} dimensions, its Manifest {wanted}"
            )
        log.info(
            "version loaded",
            model_version=manifest.model_version,
            step=manifest.step,
            seconds=round(time.perf_counter() - started, 3),
        )
        return served
