"""Follows the alias: which published version is served, and how that changes while requests run.

Station: beside the data's way. A version is exchanged as one immutable pair of query tower and collection, so a request
that holds a pair can never mix two versions.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from retriever.encode import ServedVersion, VersionError, load_version
from retriever.metrics import Metrics
from retriever.search import CollectionGone, Index, IndexUnavailable, SearchError
from trainer.contract import ManifestError, collection_name, load_manifest, version_directory

log = structlog.get_logger(__name__)


class Versions:
    """The served version. `refresh`, called every now and then, asks Qdrant which one it should be."""

    def __init__(
        self,
        index: Index,
        alias: str,
        model_dir: Path,
        metrics: Metrics,
        *,
        max_age_seconds: float = 2.0,
        second: str = "",
        rising: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            index: asked for the alias.
            alias: names the live collection.
            model_dir: of the published versions.
            metrics: see there.
            max_age_seconds: how old the last look-up of the alias may be when `current` gives a version, > 0.
            second: version to hold beside the live one: a number, `previous`, or nothing.
            rising: seconds that never go back.
        """
        self._index = index
        self._alias = alias
        self._model_dir = model_dir
        self._metrics = metrics
        self._max_age_seconds = max_age_seconds
        self._wanted_second = second
        self._rising = rising
        self._looked_up_at = -math.inf
        self._second_was_missed = False
        self._lock = asyncio.Lock()
        self.served: ServedVersion | None = None
        """What requests are answered with; None before the first version."""
        self.second: ServedVersion | None = None
        """The version beside it; None where none is wanted or it is not there."""
        self.problem: str | None = "no version published yet: the alias has not been looked up"
        """Why this retriever is not ready; None while Qdrant answers and the version that it names is served."""
        self.qdrant_is_away = False
        """Whether the last look-up of the alias had no answer."""

    async def current(self) -> ServedVersion | None:
        """The version to answer with now: what the alias named at a look-up that began no longer than
        `max_age_seconds` before this call; None before the first one.

        Raises:
            IndexUnavailable: the alias could not be looked up.
        """
        if self.served is None:
            return None
        oldest = self._rising() - self._max_age_seconds
        if self._looked_up_at < oldest:
            async with self._lock:
                if self._looked_up_at < oldest:  # else another request has done it meanwhile
                    await self._refresh_and_tell()
            if self._looked_up_at < oldest:
                raise IndexUnavailable(self.problem or "the alias could not be looked up")
        return self.served

    async def refresh(self, stale: ServedVersion | None = None) -> None:
        """Looks the alias up and serves what it names. Never raises for a dead Qdrant or a torn version.

        Args:
            stale: a version that a request has just found to be gone. Where another one is served by now, nothing is
                done: many requests notice at once, and one look-up is enough.
        """
        async with self._lock:
            if stale is not None and stale not in (self.served, self.second):
                return
            await self._refresh_and_tell()

    async def _refresh_and_tell(self) -> None:
        before = self.problem
        self.problem = await self._refresh()
        if self.problem != before and self.problem is not None:
            log.warning("not ready", reason=self.problem)
        if self._wanted_second:
            await self._refresh_second()

    async def _refresh(self) -> str | None:
        began = self._rising()
        try:
            collection = await self._index.collection_of(self._alias)
        except SearchError as error:
            self._metrics.qdrant_up.set(0)
            self.qdrant_is_away = True
            return str(error)
        self._metrics.qdrant_up.set(1)
        self.qdrant_is_away = False
        try:
            return await self._serve(collection)
        finally:
            self._looked_up_at = began

    async def _serve(self, collection: str | None) -> str | None:
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
        self._metrics.arm_version.labels("live").set(served.manifest.model_version)
        return None

    async def _refresh_second(self) -> None:
        """Loads the version beside the live one where another one is wanted; without it where it is not there."""
        number = self._second_number()
        if number is None:
            second = None
        elif self.second is not None and self.second.manifest.model_version == number:
            try:
                await self._index.vector_size(self.second.collection)
                return
            except CollectionGone:
                second = None
            except SearchError:
                return  # Qdrant is away: what is known stays
        else:
            try:
                second = await self._load(collection_name(self._alias, number))
            except (VersionError, SearchError) as error:
                if self.second is not None or not self._second_was_missed:
                    log.warning("second version not served", model_version=number, reason=str(error))
                self._second_was_missed = True
                second = None
        self.second = second
        if second is not None:
            self._second_was_missed = False
        self._metrics.arm_version.labels("second").set(0 if second is None else second.manifest.model_version)

    def _second_number(self) -> int | None:
        if self._wanted_second != "previous":
            number = int(self._wanted_second)
            return None if self.served is not None and self.served.manifest.model_version == number else number
        if self.served is None:
            return None
        live = self.served.manifest.model_version
        numbers = (int(path.name[1:]) for path in self._model_dir.glob("v[0-9]*") if path.name[1:].isdecimal())
        return max((number for number in numbers if number < live), default=None)

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
        wanted = manifest.dense_dims
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
