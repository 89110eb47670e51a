"""What the retriever looks at by itself, again and again: which version is live, how fresh it is, what is popular.

Station: beside the data's way. Both the service and its tests run it; a request never waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from retriever.metrics import Metrics
from retriever.popular import Popular
from retriever.search import Index, SearchError
from retriever.versions import Versions

LOOK_SECONDS = 2.0
"""Between two looks at the newest step and at what is popular."""


class Watch:
    """Keeps `versions` and `popular` up to date, and notes when the live collection last changed."""

    def __init__(
        self,
        versions: Versions,
        index: Index,
        metrics: Metrics,
        popular: Popular | None = None,
        clock: Callable[[], float] = time.time,
        rising: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            versions: refreshed at every look.
            index: asked for the newest step.
            metrics: its gauges of staleness are computed from what is seen here, whenever somebody reads them.
            popular: refreshed now and then; None: not wanted.
            clock: seconds since the epoch.
            rising: seconds that never go back.
        """
        self._versions, self._index, self._popular = versions, index, popular
        self._clock, self._rising = clock, rising
        self._due = 0.0
        self._newest: tuple[str, int] | None = None
        self._changed_at = 0.0
        metrics.staleness.labels("version").set_function(self._version_age)
        metrics.staleness.labels("items").set_function(self._items_age)

    async def look(self) -> None:
        """Looks once. Never raises for a dead Qdrant."""
        await self._versions.refresh()
        served = self._versions.served
        if served is None or self._rising() < self._due:
            return
        self._due = self._rising() + LOOK_SECONDS
        if self._popular is not None:
            await self._popular.refresh(served)
        try:
            step = await self._index.newest_step(served.collection)
        except SearchError:
            return
        if step is not None and self._newest != (served.collection, step):
            # At the first look nobody knows when that was; the version is no older than its own time.
            first = self._newest is None or self._newest[0] != served.collection
            self._changed_at = served.manifest.created_at if first else self._clock()
            self._newest = served.collection, step

    async def run(self, seconds: float, after: Callable[[], object] = lambda: None) -> None:
        """Looks every so many seconds, for ever, and calls `after` each time."""
        while True:
            await self.look()
            after()
            await asyncio.sleep(seconds)

    def _version_age(self) -> float:
        served = self._versions.served
        return 0.0 if served is None else max(0.0, self._clock() - served.manifest.created_at)

    def _items_age(self) -> float:
        return 0.0 if not self._changed_at else max(0.0, self._clock() - self._changed_at)
