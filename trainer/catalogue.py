"""Every known item: its id, features, payload, clicks, log frequency and newest embedding, one row each.

Station: between the micro-batches and item events that name items, and the towers, the evaluation and the index that
need all of them. It learns nothing and talks to nobody.

Items come from clicks (id alone) and from item events (features, payload). An item that is gone (tombstone) keeps its
row, marked deleted, so that a late click does not bring it back: only an item event does. When `max_items` rows are
full, a sixteenth of them makes room: deleted items first, then those untouched for longest. Items that are neither
clicked nor changed for `expire_clicks` clicks of all items are dropped too: age is told by clicks and not by a clock,
so that the same stream drops the same items at the same click. A dropped item (a deleted one too) that is clicked again
comes back as new, without features until its next item event.

Rows are renumbered when items are dropped; nothing outside may keep a row number across `admit` or `take`.

Shapes: n items asked for, N rows, D embedding size, H half-lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from streams.contract import Float32Array, Float64Array, Int64Array, UInt64Array, hash_ids
from streams.hash_table import SlotIndex
from trainer.admission import Admission
from trainer.columns import Changes, Column
from trainer.embeddings import Embeddings
from trainer.gone import Gone
from trainer.item_events import ItemChange
from trainer.towers import ItemFeatures, ItemInputs, encode_item_features

NO_PAYLOAD = b"{}"
EXPIRY_PARTS = 16
"""Items are looked through for expired ones after each so manieth part of `expire_clicks`."""
EMBED_ITEMS = 8_192
"""Items embedded at a time."""
_ROWS = ("item_hash", "num_clicks", "log_count", "added", "touched", "seen", "deleted")
"""Of the state, the arrays with a row for each item."""
_NUMBERS = ("clicks_counted", "num_dropped", "num_expired")


class Catalogue:
    """Known items, columnar. `step` arguments are the trainer's rising count of changes: see `loop`."""

    def __init__(
        self,
        features: ItemFeatures,
        *,
        embedding_dim: int,
        half_life_clicks: float = 5_000.0,
        further_half_lives: Sequence[float] = (),
        uniform_ratio: float = 0.02,
        max_items: int = 1_000_000,
        admit_clicks: int = 1,
        expire_clicks: int = 0,
    ) -> None:
        """
        Args:
            features: an empty store; the catalogue numbers its rows.
            embedding_dim: D.
            half_life_clicks: clicks of all items after which an earlier click counts half, > 0: of log q.
            further_half_lives: of further log frequencies, each > 0; inf: no click fades. H = 1 + their number.
            uniform_ratio: share of clicks taken as spread evenly over all items, in (0, 1]: the floor of log q.
            max_items: most rows, ≥ 1; the items of one micro-batch may come on top for the moment.
            admit_clicks: with this click an unknown item has its row, ≥ 1; for those that wait there is room for an
                eighth of `max_items`.
            expire_clicks: clicks of all items for which an item may be neither clicked nor changed, give or take a
                sixteenth; 0: any number.
        """
        self.features = features
        self.max_items = max_items
        self.admission = Admission(admit_clicks, max(1, max_items // 8))
        self._expire_clicks = expire_clicks
        self._rates: Float64Array = math.log(2) / np.array([half_life_clicks, *further_half_lives], np.float64)
        self._log_uniform_ratio = math.log(uniform_ratio)
        self._rows = SlotIndex()
        self._item_ids: list[str] = []
        self._payloads: list[bytes] = []
        self._size = 0
        self._item_hash = np.zeros(0, np.uint64)
        self._num_clicks = np.zeros(0, np.int64)
        self._log_count = np.zeros((0, len(self._rates)), np.float64)
        self._added, self._touched, self._seen, self._published = (np.zeros(0, np.int64) for _ in range(4))
        self._deleted = np.zeros(0, np.bool_)
        self.embeddings = Embeddings(embedding_dim)
        self._changed = Changes("catalogue")
        self.clicks_counted = 0
        """Clicks counted so far: the clock of the decay."""
        self._log_total: Float64Array = np.full(len(self._rates), -math.inf)
        self.num_deleted = 0
        self.num_dropped = 0
        """Rows dropped to make room, so far."""
        self.num_expired = 0
        """Rows dropped because of their age, so far."""
        self.gone = Gone(max_items)
        """Items that were deleted or dropped, until they are forgotten: what the index may still hold. More go only
        where no version has been published for long, and the next one is made without any of them."""
        self.on_keep: Callable[[Int64Array], None] = lambda kept: None
        """Called with the old numbers of the rows that stay when items are dropped, in their new order."""

    def __len__(self) -> int:
        """Rows, deleted items included."""
        return self._size

    @property
    def num_items(self) -> int:
        """Items that may be served."""
        return self._size - self.num_deleted

    @property
    def item_hash(self) -> UInt64Array:
        """uint64 [N] of all rows."""
        return self._item_hash[: self._size]

    @property
    def num_clicks(self) -> Int64Array:
        """int64 [N] clicks counted since the item has its row."""
        return self._num_clicks[: self._size]

    @property
    def added(self) -> Int64Array:
        """int64 [N] step at which the item became known, or came back."""
        return self._added[: self._size]

    @property
    def touched(self) -> Int64Array:
        """int64 [N] step of the last click or change."""
        return self._touched[: self._size]

    @property
    def published(self) -> Int64Array:
        """int64 [N] step of the copy that the live version has of the item, −1 before the first; the publisher's."""
        return self._published[: self._size]

    @property
    def deleted(self) -> Any:
        """bool [N] whether the item is gone."""
        return self._deleted[: self._size]

    @property
    def embedding(self) -> Float32Array:
        """float32 [N, D] of all rows: see `embeddings`."""
        return self.embeddings.array

    def item_id(self, row: int) -> str:
        """The caller's id."""
        return self._item_ids[row]

    def payload(self, row: int) -> bytes:
        """A JSON object."""
        return self._payloads[row]

    def find(self, item_hash: UInt64Array) -> Int64Array:
        """Rows of these items, −1 where unknown: int64 [n]."""
        return self._rows.find(item_hash, self._item_hash)

    def serves(self, item_hash: UInt64Array) -> npt.NDArray[np.bool_]:
        """bool [n] whether these items may be served: they are known, and not gone."""
        rows = self.find(item_hash)
        known = rows >= 0
        known[known] = ~self._deleted[rows[known]]
        return known

    def inputs(self, item_hash: UInt64Array) -> ItemInputs:
        """Inputs of the item tower for any items, known or not."""
        return self.features.gather(item_hash, self.find(item_hash))

    def inputs_of_rows(self, rows: Int64Array) -> ItemInputs:
        """Inputs of the item tower for these rows."""
        return self.features.gather(self.item_hash[rows], rows)

    def admit(self, item_hash: UInt64Array, item_ids: Sequence[str] | pa.StringArray, step: int) -> Int64Array:
        """Touches these items, makes rows for the unknown ones, returns the rows: int64 [n]. Repeats are allowed."""
        rows = self.find(item_hash)
        if np.any(rows < 0):
            _, first = np.unique(item_hash, return_index=True)
            first = np.sort(first[rows[first] < 0])
            self._touch(rows[rows >= 0], step)
            self._make_room(len(first), step)
            self._extend(item_hash[first], [str(item_ids[int(row)]) for row in first], step)
            self.admission.forget(item_hash[first])
            rows = self.find(item_hash)
        self._touch(rows, step)
        return rows

    def admit_clicked(self, item_hash: UInt64Array, item_ids: pa.StringArray, step: int) -> Int64Array:
        """`admit` for clicks, each of them given once: −1 for an item that has to wait for more clicks."""
        rows = self.find(item_hash)
        rows[rows < 0] = np.where(self.admission.admitted(item_hash[rows < 0]), 0, -1)
        let = np.flatnonzero(rows >= 0)
        rows[let] = self.admit(item_hash[let], item_ids.take(let), step)
        return rows

    def expire(self, counted_before: int, step: int) -> None:
        """Drops the items whose time is over, if it is time to look, since so many clicks had been counted."""
        part = max(1, self._expire_clicks // EXPIRY_PARTS)
        if self._expire_clicks and counted_before // part < self.clicks_counted // part:
            kept = np.flatnonzero(self.clicks_counted - self._seen[: self._size] < self._expire_clicks)
            if num_expired := self._size - len(kept):
                self.num_expired += num_expired
                self._keep(kept, step)

    def count(self, rows: Int64Array) -> None:
        """Counts one click for each of these rows, in this order.

        With k clicks counted before, the decayed count of an item after click t is c(t) = Σ 2^−((t − t_i) / half-life)
        over its clicks t_i. Kept is log c(t) + λt with λ = ln 2 / half-life, which no later click of another item
        changes: untouched items all fall at the same rate, and no value overflows.
        """
        n = len(rows)
        if n == 0:
            return
        last = self.clicks_counted + n
        distinct, inverse = np.unique(rows, return_inverse=True)
        self._num_clicks[distinct] += np.bincount(inverse)
        for h, rate in enumerate(self._rates.tolist()):
            weight = np.exp(rate * (np.arange(1, n + 1) - n))
            added = np.log(np.bincount(inverse, weight)) + rate * last
            self._log_count[distinct, h] = np.logaddexp(self._log_count[distinct, h], added)
            self._log_total[h] = np.logaddexp(self._log_total[h], math.log(weight.sum()) + rate * last)
        self.clicks_counted = last

    @property
    def log_totals(self) -> Float64Array:
        """float64 [H] those of all items: log q is the difference of `log_counts`. 0 before the first click."""
        return self._log_total.copy() if self.clicks_counted else np.zeros(len(self._rates))

    def log_counts(self, rows: Int64Array | slice = slice(None), floor: Float64Array | None = None) -> Float64Array:
        """float64 [n, H] logs of the decayed click counts, ≥ `floor`, on a scale where untouched items stand still."""
        return np.maximum(self._log_count[: self._size][rows], self.log_floor if floor is None else floor)

    @property
    def log_floor(self) -> Float64Array:
        """float64 [H] log counts of an item without clicks: of a share of uniform_ratio / number of items."""
        return self.log_totals + self._log_uniform_ratio - math.log(max(self.num_items, 1))

    def log_qs(self, rows: Int64Array | slice = slice(None)) -> Float64Array:
        """float64 [n, H] logs of the items' shares of the clicks, as each half-life sees them."""
        return self.log_counts(rows) - self.log_totals

    def popularity_features(self) -> Float32Array:
        """float32 [N, H] `log_qs` of all rows."""
        features = (self._log_count[: self._size] - self.log_totals).astype(np.float32)
        return np.maximum(features, (self.log_floor - self.log_totals).astype(np.float32), out=features)

    def log_q(self, rows: Int64Array | slice = slice(None)) -> Float64Array:
        """float64 [n] log of the items' shares of the recent clicks."""
        return np.asarray(self.log_qs(rows)[:, 0])

    def popularity(self) -> Float32Array:
        """float32 [N] log q, −inf where the item is gone."""
        return np.where(self.deleted, -np.inf, self.log_q()).astype(np.float32)

    def embed(self, rows: Int64Array, embed_items: Callable[[ItemInputs], Float32Array]) -> None:
        """Gives these rows the embeddings that `embed_items` has for them."""
        for start in range(0, len(rows), EMBED_ITEMS):
            part = rows[start : start + EMBED_ITEMS]
            self.embeddings.set(part, embed_items(self.inputs_of_rows(part)))

    def take(self, changes: Sequence[ItemChange], step: int) -> Int64Array:
        """Takes item changes; of several of one item the last counts.

        Returns:
            int64 [n] rows of the items that have new features. A gone item that was not known has a row from here on,
            marked deleted, so that no click from before brings it in; but only where there is room for it.
        """
        newest = {change.item_id: change for change in changes}
        put = [change for change in newest.values() if not change.gone]
        item_ids = [change.item_id for change in put]
        rows = self.admit(hash_ids(item_ids), item_ids, step)
        for row, change in zip(rows.tolist(), put, strict=True):
            self.features.replace(row, encode_item_features(self.features.config, change.features))
            self._payloads[row] = change.payload
        back = rows[self._deleted[rows]]
        self._deleted[back] = False
        self._added[back] = step
        self.gone.came(self._item_hash[back])
        gone_ids = [change.item_id for change in newest.values() if change.gone]
        gone_hash = hash_ids(gone_ids)
        unknown = np.flatnonzero(self.find(gone_hash) < 0)[: max(0, self.max_items - self._size)]
        self.admit(gone_hash[unknown], [gone_ids[place] for place in unknown], step)
        gone = self.find(gone_hash)
        gone = gone[gone >= 0]
        gone = gone[~self._deleted[gone]]
        self._deleted[gone] = True
        self._touch(gone, step)
        self.gone.went(self._item_hash[gone], step)
        self.num_deleted += len(gone) - len(back)
        return rows

    @property
    def changes(self) -> dict[str, Changes]:
        """Name in the state → which rows have changed: those that were touched, or embedded."""
        features = [f"features.{name}" for name in self.features.state_dict()]
        embedded = {f"embeddings.{name}": changes for name, changes in self.embeddings.changes.items()}
        return dict.fromkeys([*_ROWS, "item_id", "payload", *features], self._changed) | embedded

    def state_dict(self) -> dict[str, Column]:
        """Everything but `published`; its own columns, to be copied before the next change."""
        numbers = {name: np.array(getattr(self, name)) for name in _NUMBERS}
        return {
            **{name: getattr(self, f"_{name}")[: self._size] for name in _ROWS},
            "item_id": self._item_ids,
            "payload": self._payloads,
            **numbers,
            "log_total": self.log_totals,
            **{f"features.{name}": column for name, column in self.features.state_dict().items()},
            **{f"waiting.{name}": column for name, column in self.admission.state_dict().items()},
            **{f"embeddings.{name}": column for name, column in self.embeddings.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave, into an empty catalogue.

        Raises:
            ValueError: item features or embeddings are of another configuration.
        """
        if state["log_count"].shape[1] != len(self._rates):
            raise ValueError(f"there are {state['log_count'].shape[1]} half-lives, not {len(self._rates)}")
        parts: dict[str, Any] = {"features.": self.features, "waiting.": self.admission, "embeddings.": self.embeddings}
        for stem, part in parts.items():
            part.load_state_dict({name.removeprefix(stem): state[name] for name in state if name.startswith(stem)})
        self._item_ids, self._payloads = list(state["item_id"]), list(state["payload"])
        self._size = len(self._item_ids)
        for name in _ROWS:
            setattr(self, f"_{name}", np.array(state[name]))
        self._published = np.full(self._size, -1, np.int64)
        self._number_rows()
        for name in _NUMBERS:
            setattr(self, name, int(state[name]))
        if self.clicks_counted:
            self._log_total = np.array(state["log_total"], np.float64)
        gone = np.flatnonzero(self._deleted)
        for row in gone[np.argsort(self._touched[gone], kind="stable")]:  # who was told so by now is not known
            self.gone.went(self._item_hash[row : row + 1], int(self._touched[row]))
        self._changed.take(self._size)

    def _touch(self, rows: Int64Array, step: int) -> None:
        self._touched[rows] = step
        self._seen[rows] = self.clicks_counted
        self._changed.mark(rows)

    def _columns(self, change: Callable[[Any, float], Any]) -> None:
        for name, fill in (
            ("item_hash", 0), ("num_clicks", 0), ("log_count", -math.inf), ("added", 0), ("touched", 0),
            ("seen", 0), ("published", -1), ("deleted", False),
        ):  # fmt: skip
            setattr(self, f"_{name}", change(getattr(self, f"_{name}"), fill))

    def _extend(self, item_hash: UInt64Array, item_ids: list[str], step: int) -> None:
        start, self._size = self._size, self._size + len(item_ids)
        if self._size > len(self._item_hash):
            room = max(self._size, 2 * len(self._item_hash), 1024) - start
            self._columns(
                lambda column, fill: np.concatenate(
                    [column[:start], np.full((room, *column.shape[1:]), fill, column.dtype)]
                )
            )
        self._item_hash[start : self._size] = item_hash
        self._rows.add(self._item_hash, self._size)
        self._added[start : self._size] = step
        self._item_ids += item_ids
        self._payloads += [NO_PAYLOAD] * len(item_ids)
        self.features.append(len(item_ids))
        self.embeddings.extend(self._size)
        self.gone.came(item_hash)

    def _make_room(self, num_new: int, step: int) -> None:
        if self._size + num_new <= self.max_items:
            return
        num_kept = max(0, min(self.max_items - self.max_items // 16, self.max_items - num_new))
        at_hand = self.touched == step
        oldest_first = np.lexsort((self.touched, ~self.deleted, at_hand))
        self.num_dropped += self._size - num_kept
        self._keep(np.sort(oldest_first[self._size - num_kept :]), step)

    def _keep(self, kept: Int64Array, step: int) -> None:
        """Drops all rows but these, which are rising; those that were served are gone."""
        served = ~self.deleted
        served[kept] = False
        self.gone.went(self.item_hash[served], step)
        self._columns(lambda column, fill: column[kept])
        self._item_ids = [self._item_ids[row] for row in kept]
        self._payloads = [self._payloads[row] for row in kept]
        self.features.keep(kept)
        self.embeddings.keep(kept)
        self.on_keep(kept)
        self._size = len(kept)
        self._changed.mark_all()
        self._number_rows()

    def _number_rows(self) -> None:
        self._rows = SlotIndex()
        self._rows.add(self._item_hash, self._size)
        self.num_deleted = int(self._deleted.sum())
