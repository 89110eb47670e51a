"""Columns: what is taken bit by bit is, put together, what was there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.columns import Changes, Column, Kept, Ragged


class Table:
    """A model of one table with a column of each kind, and of a column without rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, str, bytes, list[int]]] = []
        self.number = 0
        self.changed = Changes("rows")

    @property
    def changes(self) -> dict[str, Changes]:
        return dict.fromkeys(["vector", "id", "payload", "values"], self.changed)

    def state_dict(self) -> dict[str, Column]:
        values = [value for row in self.rows for value in [-1, *row[3]]]
        lengths = np.array([[len(row[3])] for row in self.rows], np.int64).reshape(-1, 1)
        starts = np.concatenate(([0], np.cumsum(lengths + 1)))[:-1] + 1  # with a hole before each
        return {
            "vector": np.array([[row[0], -row[0]] for row in self.rows], np.float32).reshape(-1, 2),
            "id": [row[1] for row in self.rows],
            "payload": [row[2] for row in self.rows],
            "values": Ragged(starts.astype(np.int64), lengths, np.array(values, np.int64)),
            "number": np.array(self.number),
        }


def plain(state: dict[str, Column]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, column in state.items():
        if isinstance(column, Ragged):
            found[name] = [column.take(np.array([row])).values.tolist() for row in range(len(column))]
        else:
            found[name] = column if isinstance(column, list) else column.tolist()
    return found


ROW = st.tuples(st.integers(-9, 9), st.text(max_size=3), st.binary(max_size=3), st.lists(st.integers(0, 9), max_size=3))
TURN = st.one_of(
    st.tuples(st.just("append"), st.lists(ROW, max_size=4)),
    st.tuples(st.just("change"), st.integers(0, 20), ROW),
    st.tuples(st.just("keep"), st.sets(st.integers(0, 20))),
    st.tuples(st.just("take")),
)


@given(st.lists(TURN, max_size=25))
def test_whatever_changes_what_was_taken_bit_by_bit_is_what_is_there(turns: list[tuple[Any, ...]]) -> None:
    table, kept = Table(), Kept.taken(Table(), whole=True)
    changes: Kept | None = None
    with tempfile.TemporaryDirectory() as folder:
        for kind, *what in [*turns, ("take",)]:
            table.number += 1
            if kind == "append":
                table.rows += what[0]
            elif kind == "change" and what[0] < len(table.rows):
                table.rows[what[0]] = what[1]
                table.changed.mark(np.array([what[0]]))
            elif kind == "keep":
                table.rows = [row for number, row in enumerate(table.rows) if number not in what[0]]
                table.changed.mark_all()
            elif kind == "take":
                taken = Kept.taken(table, whole=False)
                taken.write(Path(folder) / "taken")
                taken = Kept.read(Path(folder) / "taken")
                # Onto a whole one at once, or first onto other changes: it must not matter.
                whole = taken.on(changes.on(kept)) if changes else taken.on(kept)
                changes = taken.on(changes) if changes and not taken.is_whole else taken
                assert plain(whole.columns) == plain(changes.on(kept).columns) == plain(table.state_dict())
                if taken.is_whole:
                    kept, changes = taken, None


def test_rows_that_are_marked_or_new_are_taken_once() -> None:
    changes = Changes("rows")
    assert changes.take(4) is None
    changes.mark(np.array([3, 1, 1, 7]))
    taken = changes.take(6)
    assert taken is not None and taken.tolist() == [1, 3, 4, 5]
    taken = changes.take(6)
    assert taken is not None and taken.tolist() == []
    changes.mark_all()
    assert changes.take(2) is None


def test_what_is_taken_is_a_copy_and_holds_no_more_than_what_changed() -> None:
    table = Table()
    table.rows = [(1.0, "a", b"a", [1]), (2.0, "b", b"b", [2, 2]), (3.0, "c", b"c", [])]
    Kept.taken(table, whole=False)
    table.rows[1] = (5.0, "ä", b"", [7])
    table.changed.mark(np.array([1]))
    taken = Kept.taken(table, whole=False)
    table.rows[1] = (6.0, "x", b"x", [8])
    assert plain(taken.columns) == {
        "vector": [[5.0, -5.0]],
        "id": ["ä"],
        "payload": [b""],
        "values": [[7]],
        "number": 0,
    }
    assert {name: rows.tolist() for name, rows in taken.rows.items()} == {"rows": [1]}


def test_changes_of_other_columns_are_refused() -> None:
    table = Table()
    below = Kept.taken(table, whole=True)
    taken = Kept.taken(table, whole=False)
    less = {name: column for name, column in below.columns.items() if name != "id"}
    with pytest.raises(ValueError, match="other columns"):
        taken.on(Kept(less, below.tables))
