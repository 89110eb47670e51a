"""CORE: a model's state as named columns, of which a checkpoint takes the rows that changed.

Station: between the parts of a model, which own their arrays and mark what they change, and `checkpoint`, which knows
no part. It decides nothing about files but how columns lie in one.

A column is an array with a row each along its first axis, rows of different lengths (`Ragged`), or a list of texts. The
columns of one table have their rows in common and one `Changes`; a column without is small and copied whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from trainer.features import Int64Array, bag_offsets, ranges

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Ragged:
    """n rows of different lengths; row i is values[starts[i] : starts[i] + lengths[i].sum()]."""

    starts: Int64Array
    """[n]"""
    lengths: Int64Array
    """[n, S] of S parts that lie one after the other."""
    values: Array
    """[v] with holes where nobody's row is."""

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def packed(cls, lengths: Int64Array, values: Array) -> Ragged:
        """Rows that lie one after the other, without holes."""
        return cls(bag_offsets(lengths.sum(1))[:-1], lengths, values)

    @classmethod
    def of_texts(cls, texts: Sequence[bytes]) -> Ragged:
        """A row each."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        return cls.packed(lengths[:, None], np.frombuffer(b"".join(texts), np.uint8))

    def texts(self, decoded: bool) -> list[str] | list[bytes]:
        """What `of_texts` was given; as texts again, if they are to be decoded."""
        data = self.values.tobytes()
        ends = (self.starts + self.lengths.sum(1)).tolist()
        texts = [data[start:end] for start, end in zip(self.starts.tolist(), ends, strict=True)]
        return [text.decode() for text in texts] if decoded else texts

    def take(self, rows: Int64Array) -> Ragged:
        """These rows, in this order; a copy without holes."""
        lengths = self.lengths[rows]
        return Ragged.packed(lengths, self.values[ranges(self.starts[rows], lengths.sum(1))])


Column = Array | Ragged | list[str] | list[bytes]


class Changes:
    """Which rows of a table have changed since they were last taken; at first, all of them."""

    def __init__(self, table: str) -> None:
        """`table`: its name, unlike that of any other table."""
        self.table = table
        self._all = True
        self._marks = np.zeros(0, np.bool_)

    def mark(self, rows: Int64Array) -> None:
        """These rows of those there were when they were last taken; newer ones count as changed anyway."""
        self._marks[rows[rows < len(self._marks)]] = True

    def mark_all(self) -> None:
        """All rows: also when they were renumbered, or when there are fewer."""
        self._all = True

    def take(self, num_rows: int) -> Int64Array | None:
        """int64 rows that have changed, rising; None: all. From here on nothing has."""
        known = len(self._marks)
        rows = None if self._all else np.concatenate([np.flatnonzero(self._marks), np.arange(known, num_rows)])
        self._all = False
        if known == num_rows:
            self._marks[:] = False
        else:
            self._marks = np.zeros(num_rows, np.bool_)
        return rows


class HasState(Protocol):
    """A model, as a checkpoint sees it."""

    def state_dict(self) -> dict[str, Column]:
        """All that is needed to go on, by name: the model's own columns, to be copied before it changes."""

    @property
    def changes(self) -> dict[str, Changes]:
        """Name → what has changed, of the columns of tables."""

    def load_state_dict(self, state: dict[str, Column]) -> None:
        """Takes over what `state_dict` gave; nothing has changed since."""


@dataclass(frozen=True)
class Kept:
    """Columns as they were at one moment: of each table all rows, or those that had changed since another moment."""

    columns: dict[str, Column]
    tables: dict[str, str] = field(default_factory=dict)
    """Column → table, of the columns of tables."""
    rows: dict[str, Int64Array] = field(default_factory=dict)
    """Table → int64 [n] its rows that are here, rising; of the other tables all are here."""

    @classmethod
    def taken(cls, model: HasState, *, whole: bool) -> Kept:
        """Copies what has changed since the last call; or, if whole, all."""
        state, changes = model.state_dict(), model.changes
        lengths = {change.table: len(state[name]) for name, change in changes.items()}
        tables = {name: change.table for name, change in changes.items()}
        taken = {change.table: change.take(lengths[change.table]) for change in dict.fromkeys(changes.values())}
        rows = {table: some for table, some in taken.items() if some is not None and not whole}
        columns = {name: _copied(column, rows.get(tables.get(name, ""))) for name, column in state.items()}
        return cls(columns, tables, rows)

    @property
    def is_whole(self) -> bool:
        """Whether nothing has to lie below it."""
        return not self.rows

    @property
    def num_bytes(self) -> int:
        """Of the values."""
        return sum(_num_bytes(column) for column in self.columns.values())

    def on(self, below: Kept) -> Kept:
        """Both as one; what is in both counts as it is here.

        Raises:
            ValueError: they are not of the same columns.
        """
        if self.columns.keys() != below.columns.keys() or self.tables != below.tables:
            raise ValueError("what has changed is of other columns than what it has changed from")
        places, rows = {}, {}
        for table, here in self.rows.items():
            column = below.columns[next(name for name in self.tables if self.tables[name] == table)]
            there = below.rows.get(table, np.arange(len(column)))
            both = np.union1d(there, here)
            places[table] = [np.searchsorted(both, some) for some in (there, here)]
            if table in below.rows:
                rows[table] = both
        columns = dict(self.columns)
        for name, table in self.tables.items():
            if table in places:
                columns[name] = _joined(below.columns[name], columns[name], *places[table])
        return Kept(columns, self.tables, rows)

    def write(self, path: Path) -> None:
        """Writes a safetensors file."""
        arrays: dict[str, Array] = {f"rows/{table}": some for table, some in self.rows.items()}
        kinds = {}
        for name, column in self.columns.items():
            kinds[name] = _kind(column)
            if isinstance(column, np.ndarray):
                arrays[name] = column if column.flags.c_contiguous else np.ascontiguousarray(column)
            else:
                ragged = _ragged(column)
                arrays |= {f"{name}/lengths": ragged.lengths, f"{name}/values": ragged.values}
        save_file(arrays, os.fspath(path), {"layout": json.dumps({"kinds": kinds, "tables": self.tables})})

    @classmethod
    def read(cls, path: Path) -> Kept:
        """What `write` wrote.

        Raises:
            OSError, SafetensorError, ValueError, KeyError: it is no such file.
        """
        with safe_open(os.fspath(path), framework="np") as file:
            layout = json.loads(file.metadata()["layout"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        columns: dict[str, Column] = {}
        for name, kind in layout["kinds"].items():
            if kind == "array":
                columns[name] = arrays[name]
            else:
                ragged = Ragged.packed(arrays[f"{name}/lengths"], arrays[f"{name}/values"])
                columns[name] = ragged if kind == "ragged" else ragged.texts(kind == "text")
        rows = {name.removeprefix("rows/"): some for name, some in arrays.items() if name.startswith("rows/")}
        return cls(columns, layout["tables"], rows)


def _copied(column: Column, rows: Int64Array | None) -> Column:
    if isinstance(column, list):
        return list(column) if rows is None else [column[row] for row in rows.tolist()]  # type: ignore[return-value]
    if isinstance(column, Ragged):
        return column.take(np.arange(len(column)) if rows is None else rows)
    return column.copy() if rows is None else column[rows]


def _joined(below: Column, above: Column, below_places: Int64Array, above_places: Int64Array) -> Column:
    """A column whose rows are in one of the two, or in both: then the one of `above` counts.

    Args:
        below: [m]
        above: [n] of the same kind.
        below_places: int64 [m] places of its rows in the result.
        above_places: int64 [n] places of its rows.
    """
    size = 1 + max(below_places.max(initial=-1), above_places.max(initial=-1))
    if isinstance(below, np.ndarray) and isinstance(above, np.ndarray):
        result = np.empty((size, *below.shape[1:]), below.dtype)
        result[below_places], result[above_places] = below, above
        return result
    order = np.zeros(size, np.int64)
    order[below_places], order[above_places] = np.arange(len(below)), len(below) + np.arange(len(above))
    if isinstance(below, list) and isinstance(above, list):
        both: list[Any] = below + above
        return [both[place] for place in order.tolist()]
    if isinstance(below, Ragged) and isinstance(above, Ragged):
        lengths, values = (
            np.concatenate([getattr(part, name) for part in (below, above)]) for name in ("lengths", "values")
        )
        return Ragged.packed(lengths, values).take(order)
    raise ValueError(f"a column is {_kind(above)} and was {_kind(below)}")


def _kind(column: Column) -> str:
    if isinstance(column, list):
        return "text" if column and isinstance(column[0], str) else "bytes"
    return "ragged" if isinstance(column, Ragged) else "array"


def _ragged(column: Ragged | list[str] | list[bytes]) -> Ragged:
    if isinstance(column, Ragged):
        return column
    return Ragged.of_texts([text.encode() if isinstance(text, str) else text for text in column])


def _num_bytes(column: Column) -> int:
    if isinstance(column, list):
        return sum(map(len, column)) + 8 * len(column)
    return column.nbytes if isinstance(column, np.ndarray) else column.values.nbytes + column.lengths.nbytes
