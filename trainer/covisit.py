"""CORE: live co-visitation — which items the same users clicked within a few clicks of each other.

Station: in the model, beside the towers; it counts the histories in the micro-batches, and its sparse vectors go into
the index beside the dense ones. It knows items by their rows in the catalogue, and learns no weights (`score` does).

Counts. A click on j by a user whose newest distinct other items are h_1 … h_W adds one to C[j, h_k] and C[h_k, j] for
each k, and one to n[j]. With a half-life, earlier counts weigh less, by the clicks of all items since.

Score. For a user with history h_1 (newest) …, h_m:

    x(u, j) = Σ_k ŵ_k · C[h_k, j] · (n + N) / ((n[j] + 1) · 10 · (n[h_k] + 1)),   ŵ_k ∝ decay^(k−1), Σ ŵ_k = 1

with n the sum of all n[j] and N the number of items: how much more often than by chance the pair was clicked, drawn
towards 0 where little is known. It is the dot product of two sparse vectors: see `item_vectors` and
`trainer.contract.covisit_query`.

Bound. Each item keeps `num_partners` partners, in sets of `WAYS`; each partner belongs into one of the sets, whatever
the item, so that an update touches one line of the cache. A new partner of a full set takes the place of the weakest,
of estimate m, with probability 1 / (1 + m) (random admission: Ben Basat et al. 2017, "Randomized admission policy for
efficient top-k, frequency, and volume estimation"), and has the estimate m + 1 then. Used is what was counted since its
admission: never above the true count, and equal to it as long as no more than `WAYS` partners came into the set.
Chance comes from the number of the click, so the same clicks give the same counts.

Memory: 12 bytes a partner, 12 an item: 1,548 bytes an item at 128 partners. A line has the partners and estimates of a
set; what they had before they were admitted is apart, for it is seldom needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.columns import Changes
from trainer.covisit_kernels import WAYS, add_scores, count
from trainer.features import Float32Array, Int64Array, UInt64Array

Int32Array = npt.NDArray[np.int32]
UInt32Array = npt.NDArray[np.uint32]
SMOOTHING = 10.0
_RESCALE_AT = 2.0**16
_ROWS = ("partner", "estimate", "before", "set_of", "num_clicks")
"""Of the state, what has a row for each item."""


@dataclass(frozen=True)
class SparseVectors:
    """n sparse vectors, one after the other."""

    indices: UInt32Array
    """[v] distinct within a vector."""
    values: Float32Array
    """[v]"""
    offsets: Int64Array
    """[n + 1] vector i is entries offsets[i] … offsets[i + 1] − 1."""

    def part(self, which: slice) -> SparseVectors:
        """Some of the vectors; `which` has both ends, or more than there are, and no step."""
        start, stop, _ = which.indices(len(self.offsets) - 1)
        offsets = self.offsets[start : stop + 1]
        entries = slice(offsets[0], offsets[-1])
        return SparseVectors(self.indices[entries], self.values[entries], offsets - offsets[0])


class Covisit:
    """Bounded co-visitation counts of the catalogue's rows."""

    def __init__(
        self,
        num_partners: int = 128,
        *,
        window: int = 10,
        half_life_clicks: float = math.inf,
        history_length: int = 20,
        history_decay: float = 0.9,
    ) -> None:
        """Nothing counted.

        Args:
            num_partners: of each item, a multiple of `WAYS`.
            window: newest distinct items of a history that a click is counted with, ≥ 1.
            half_life_clicks: clicks of all items after which an earlier one counts half, > 0; inf: never.
            history_length: newest items of a history that a score looks at, ≥ 1.
            history_decay: weight of a history item relative to the next newer one in a score, in (0, 1].

        Raises:
            ValueError: the number of partners is no multiple of `WAYS`.
        """
        if num_partners < WAYS or num_partners % WAYS:
            raise ValueError(f"{num_partners} partners are no multiple of {WAYS}")
        self.num_partners = num_partners
        self.window = window
        self.history_length = history_length
        self.history_decay = history_decay
        self._rate = math.log(2) / half_life_clicks
        self._clicks_counted = 0
        self._weight = 1.0
        """Of a click now, on the scale of the counts."""
        self._total = 0.0
        self._size = 0
        self._lines = _lines(0, num_partners // WAYS)
        self._before = np.zeros((0, num_partners // WAYS, WAYS), np.float32)
        """Part of the estimate that was there when the partner was admitted: not its own."""
        self._set_of = np.zeros(0, np.int32)
        """Set in which a row stands where it is a partner."""
        self._num_clicks = np.zeros(0, np.float64)
        self._changed = Changes("covisit")

    def __len__(self) -> int:
        """Rows."""
        return self._size

    def extend(self, num_rows: int) -> None:
        """Makes room for rows up to this number of the catalogue's."""
        if num_rows > len(self._lines):
            self._take(self._size, max(num_rows, 2 * len(self._lines), 1024), self.state_dict())
        self._size = max(self._size, num_rows)

    def count(self, rows: Int64Array, history_rows: Int64Array, history_offsets: Int64Array) -> None:
        """Counts clicks, in this order.

        Args:
            rows: int64 [n] catalogue rows of the clicked items, each within `extend`.
            history_rows: int64 [h] rows of the items of the histories, newest last; −1 for an item that is not known.
            history_offsets: int64 [n + 1] click i's are history_rows[history_offsets[i]:history_offsets[i + 1]].
        """
        count(
            self._lines.ravel(), self._counts.ravel(), self._before.ravel(), self._set_of, self._num_clicks,
            rows, history_rows, history_offsets, self.window, np.float32(self._weight), self._clicks_counted,
        )  # fmt: skip
        self._changed.mark(rows)
        histories = history_rows[history_offsets[0] : history_offsets[-1]]
        self._changed.mark(histories[histories >= 0])
        self._total += self._weight * len(rows)
        self._clicks_counted += len(rows)
        self._weight *= math.exp(self._rate * len(rows))
        if self._weight > _RESCALE_AT:
            for counts in (self._estimate, self._before, self._num_clicks):
                counts /= self._weight
            self._total, self._weight = self._total / self._weight, 1.0
            self._changed.mark_all()

    def scores(self, history_rows: Int64Array, history_offsets: Int64Array, num_rows: int) -> Float32Array:
        """x(u, j) of B histories and the first `num_rows` rows: float32 [B, num_rows]."""
        self.extend(num_rows)
        batch_size = len(history_offsets) - 1
        found = np.zeros((batch_size, num_rows), np.float32)
        if num_rows:
            add_scores(
                self._lines.ravel(), self._counts.ravel(), self._before.ravel(), self._num_clicks,
                history_rows, history_offsets, self.history_length, self.history_decay, self._norm(num_rows),
                1 / self._weight, found,
            )  # fmt: skip
        return found

    def item_vectors(self, rows: Int64Array, item_hash: UInt64Array) -> SparseVectors:
        """The sparse vectors of these rows: at index h, the low 32 bits of the partner's hash,
        C[h, j] · (n + N) / ((n[j] + 1) · (n[h] + 1)).

        Of two partners with the same index (one pair in 2^32) the weaker is left out.

        Args:
            rows: int64 [n]
            item_hash: uint64 [N] hashes of all rows.
        """
        self.extend(len(item_hash))
        partner = self._partner[rows].reshape(len(rows), self.num_partners)
        counts = (self._estimate[rows] - self._before[rows]).reshape(partner.shape) / self._weight
        clicks = self._num_clicks[: self._size] / self._weight
        values = (SMOOTHING * self._norm(len(item_hash))) * counts / (clicks[rows, None] + 1) / (clicks[partner] + 1)
        indices = item_hash.astype(np.uint32)[partner]
        there: npt.NDArray[np.bool_] = (partner >= 0) & (values > 0)
        own = np.where(there, indices.astype(np.int64), -1 - np.arange(self.num_partners))
        for row in np.flatnonzero((np.diff(np.sort(own, axis=1)) == 0).any(axis=1)):
            order = np.lexsort((-values[row], own[row]))
            there[row, order[1:]] &= np.diff(own[row, order]) != 0
        offsets = np.concatenate(([0], np.cumsum(there.sum(axis=1))))
        return SparseVectors(indices[there], values[there].astype(np.float32), offsets)

    def partners(self, row: int) -> dict[int, float]:
        """Partner row → what was counted of the pair since the partner was admitted."""
        counts = (self._estimate[row] - self._before[row]) / self._weight
        return {int(p): float(c) for p, c in zip(self._partner[row].flat, counts.flat, strict=True) if p >= 0}

    def keep(self, kept: Int64Array) -> None:
        """Keeps only these rows, renumbered in this order: the catalogue has dropped the others."""
        self.extend(int(kept.max(initial=-1)) + 1)
        new_row = np.full(self._size + 1, -1, np.int32)
        new_row[kept] = np.arange(len(kept), dtype=np.int32)
        state = self.state_dict()
        state = {name: array[kept] for name, array in state.items() if name in _ROWS}
        state["partner"] = new_row[state["partner"]]  # also −1 → −1, by the last place
        gone = state["partner"] < 0
        state["estimate"][gone] = state["before"][gone] = 0
        self._take(len(kept), len(kept), state)
        self._changed.mark_all()
        self._total = float(self._num_clicks.sum())

    def snapshot(self) -> Covisit:
        """A copy, to be read by another thread."""
        copied = copy.copy(self)
        for name in ("lines", "before", "set_of", "num_clicks"):
            setattr(copied, f"_{name}", getattr(self, f"_{name}")[: self._size].copy())
        return copied

    @property
    def changes(self) -> dict[str, Changes]:
        """Name in the state → which rows have changed."""
        return dict.fromkeys(_ROWS, self._changed)

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays from which `load_state_dict` makes the same counts; its own, to be copied before the next count."""
        return {
            **{name: getattr(self, f"_{name}")[: self._size] for name in _ROWS},
            "numbers": np.array([self._weight, self._total]),
            "clicks_counted": np.array([self._clicks_counted]),
        }

    def load_state_dict(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: the counts are of another number of partners.
        """
        if (num_partners := state["partner"][:1].size) and num_partners != self.num_partners:
            raise ValueError(f"the counts are of {num_partners} partners, not of {self.num_partners}")
        self._take(len(state["partner"]), len(state["partner"]), state)
        self._changed.take(self._size)
        self._weight, self._total = map(float, state["numbers"])
        self._clicks_counted = int(state["clicks_counted"][0])

    @property
    def _partner(self) -> Int32Array:
        """[rows, sets, WAYS] rows of the partners, −1: the place is free."""
        return self._lines[:, :, 0]

    @property
    def _counts(self) -> Float32Array:
        """The lines once more, their numbers read as floats."""
        return self._lines.view(np.float32)

    @property
    def _estimate(self) -> Float32Array:
        """[rows, sets, WAYS]"""
        return self._counts[:, :, 1]

    def _take(self, size: int, room: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Makes room for so many rows; the first `size` of them are the state's."""
        num_sets = self.num_partners // WAYS
        self._lines = _lines(room, num_sets)
        self._before = np.zeros((room, num_sets, WAYS), np.float32)
        # New rows take the sets in turn, so that each has as many of the items.
        self._set_of = np.arange(room, dtype=np.int32) % num_sets
        self._num_clicks = np.zeros(room, np.float64)
        self._size = size
        for name in _ROWS:
            getattr(self, f"_{name}")[:size] = state[name]

    def _norm(self, num_rows: int) -> float:
        return (self._total / self._weight + num_rows) / SMOOTHING


def _lines(num_rows: int, num_sets: int) -> Int32Array:
    """[num_rows, num_sets, 2, WAYS]: partners and, as the bits of a float32, estimates; each set on one cache line."""
    size = num_rows * num_sets * 2 * WAYS
    memory = np.zeros(size + 16, np.int32)
    start = -memory.ctypes.data % 64 // 4
    lines = memory[start : start + size].reshape(num_rows, num_sets, 2, WAYS)
    lines[:, :, 0] = -1
    return lines
