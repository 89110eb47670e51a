"""CORE: how popular items were before a micro-batch, told while the towers learn it.

Station: in the model, between the catalogue, which has counted the micro-batch already, and the towers, which learn how
each user leans to what is popular. With the micro-batch's own counts the log frequencies would tell which candidates
were clicked. It counts nothing and learns nothing.

Shapes: n items asked for, H half-lives.
"""

from __future__ import annotations

import numpy as np

from trainer.catalogue import Catalogue
from trainer.features import Float32Array, Int64Array, UInt64Array


class PopularityBefore:
    """The catalogue's `popularity_features` at the moment of construction, by hash, as long as none but these items are
    counted. Only their rows are copied: the log counts of all others stand still.

    Args:
        catalogue: asked now and later.
        item_hash: uint64 [n] of the items that will be counted.
    """

    def __init__(self, catalogue: Catalogue, item_hash: UInt64Array) -> None:
        self._catalogue = catalogue
        self._totals, self._floor = catalogue.log_totals, catalogue.log_floor
        self._counted = np.unique(item_hash)
        self._before = self._features(catalogue.find(self._counted))

    def __call__(self, item_hash: UInt64Array) -> Float32Array:
        """float32 [n, H]; an item that is not in the catalogue, or was not, has what one without clicks had."""
        found = self._features(self._catalogue.find(item_hash))
        if len(self._counted):
            place = np.minimum(np.searchsorted(self._counted, item_hash), len(self._counted) - 1)
            own = self._counted[place] == item_hash
            found[own] = self._before[place[own]]
        return found

    def _features(self, rows: Int64Array) -> Float32Array:
        counts = np.tile(self._floor, (len(rows), 1))
        here = rows >= 0
        counts[here] = self._catalogue.log_counts(rows[here], self._floor)
        return (counts - self._totals).astype(np.float32)
