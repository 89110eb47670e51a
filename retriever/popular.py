"""The items of the most live popularity, kept for the time when Qdrant does not answer.

Station: beside the data's way; `watch` renews it, `retrieve` takes from it. It never asks on a caller's behalf.
"""

from __future__ import annotations

import contextlib

import numpy as np

from retriever.encode import ServedVersion
from retriever.fusion import Search
from retriever.search import Index, SearchError
from retriever.transport import Point


class Popular:
    """The `num_items` most popular items, as they were when Qdrant last told."""

    def __init__(self, index: Index, num_items: int) -> None:
        self._index = index
        self._num_items = num_items
        self.kept: list[Point] = []
        """Most popular first, with payload and vectors; scores are the popularity part alone."""

    async def refresh(self, served: ServedVersion) -> None:
        """Asks anew. What was known stays where Qdrant does not answer."""
        nobody = np.zeros(0, np.uint64)
        search = Search(served.popularity_query(), self._num_items, nobody, with_payload=True, with_vectors=True)
        with contextlib.suppress(SearchError):
            (self.kept,) = await self._index.search(served.collection, [search])
