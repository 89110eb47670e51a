"""The user's own clicks and items, from CSV, Parquet or JSON lines.

Station: a source of clicks beside the public and the invented ones. A file is read whole, as Arrow columns, because it
need not be in time order; a file beyond memory has to be cut by time first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from streams.contract import ItemEvent
from streamtower.datasets.clicks import Clicks, Dataset, DatasetError, time_order

USER_NAMES = ("user_id", "user")
ITEM_NAMES = ("item_id", "item")
TIME_NAMES = ("event_time", "ts", "timestamp")
REWARD_NAMES = ("reward",)
PEOPLES_NAMES = ("title", "name", "description", "category")
ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".jsonl", ".jsonl.gz")
TEXT_WORDS = 3.0
"""A column of strings with at least this many words on average is text; below, categories."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a clicks file mean what; None: the first usual name that is there."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    reward: str | None = None
    context: Sequence[str] = ()


def file_dataset(
    path: Path,
    columns: Columns | None = None,
    *,
    items: Path | None = None,
    kinds: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Dataset:
    """The clicks of a file in time order, with the items of another one.

    Rows without user, item or time are left out and counted.

    Args:
        path: its name ends with one of ENDINGS.
        columns: names, where they are not the usual ones.
        items: file with a column for the item's id; all other columns are its features. JSON lines in the form of
            ItemEvent do as well.
        kinds: name → kind of a context column or item feature, where the guess from the values is wrong.
        seed: of the order of clicks of one user at one moment.

    Raises:
        DatasetError: what is missing or unreadable, and which columns there are.
    """
    kinds = dict(kinds or {})
    columns = columns or Columns()
    ids = tuple(name for name in (columns.user, columns.item) if name) + USER_NAMES + ITEM_NAMES
    clicks, num_skipped = _clicks(_flat(_read(path, ids)), columns, path, seed)
    events, features = _items(_read(items, ids), columns, items) if items else ([], {})
    context = {name: _kind(column) for name, column in clicks.context.items()}
    if unknown := sorted(set(kinds) - set(context) - set(features)):
        raise DatasetError(f"no context column or item feature is named {', '.join(unknown)}")
    return Dataset(
        name=path.name,
        num_clicks=len(clicks),
        clicks=clicks.pieces,
        items=lambda: iter(events),
        context_features={name: kinds.get(name, kind) for name, kind in context.items()},
        item_features={name: kinds.get(name, kind) for name, kind in features.items()},
        item_name=next((name for name in PEOPLES_NAMES if name in features), None),
        num_items=len(events),
        num_skipped=num_skipped,
    )


def _read(path: Path, ids: Sequence[str]) -> pa.Table:
    name = path.name.lower()
    if not name.endswith(ENDINGS):
        raise DatasetError(f"{path}: the name must end with one of {', '.join(ENDINGS)}")
    try:
        if name.endswith(".parquet"):
            return pq.read_table(path)
        if name.endswith((".jsonl", ".jsonl.gz")):
            with pa.input_stream(path) as stream:
                return pyarrow.json.read_json(stream)
        parse = pyarrow.csv.ParseOptions(delimiter="\t" if ".tsv" in name else ",")
        with pa.input_stream(path) as stream:
            names = pyarrow.csv.open_csv(stream, parse_options=parse).schema.names
        # Ids must stay as they are written: as numbers they would lose leading zeros, or digits.
        types = {name: pa.string() for name in names if name in ids or name.endswith("_id")}
        convert = pyarrow.csv.ConvertOptions(column_types=types)
        with pa.input_stream(path) as stream:
            return pyarrow.csv.read_csv(stream, parse_options=parse, convert_options=convert)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def _flat(table: pa.Table) -> pa.Table:
    """The table with the fields of a nested `context` as columns of their own, as in a file of ClickEvents."""
    index = table.schema.get_field_index("context")
    if index < 0 or not pa.types.is_struct(table.schema.field(index).type):
        return table
    nested = table.column(index)
    for field in table.schema.field(index).type:
        if field.name not in table.schema.names:
            table = table.append_column(field.name, pc.struct_field(nested, field.name))
    return table.remove_column(index)


def _find(table: pa.Table, wished: str | None, usual: Sequence[str], what: str, path: Path) -> str:
    there = table.schema.names
    names = [wished] if wished else [name for name in usual if name in there]
    if not names or names[0] not in there:
        looked_for = wished or " or ".join(usual)
        raise DatasetError(
            f"{path} has no column {looked_for} for the {what}; its columns are {', '.join(there)}. "
            f"Say which one it is with --{what}"
        )
    return names[0]


def _clicks(table: pa.Table, columns: Columns, path: Path, seed: int) -> tuple[Clicks, int]:
    names = {
        "user": _find(table, columns.user, USER_NAMES, "user", path),
        "item": _find(table, columns.item, ITEM_NAMES, "item", path),
        "time": _find(table, columns.time, TIME_NAMES, "time", path),
    }
    context = [_find(table, name, (), "context", path) for name in columns.context]
    reward = columns.reward or next((name for name in REWARD_NAMES if name in table.schema.names), None)
    if reward:
        _find(table, reward, (), "reward", path)
    user_id = _strings(table.column(names["user"]))
    item_id = _strings(table.column(names["item"]))
    event_time = _seconds(table.column(names["time"]), names["time"], path)
    known = np.isfinite(event_time)
    for ids in (user_id, item_id):
        known &= pc.greater(pc.fill_null(pc.binary_length(ids), 0), 0).to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(known)
    if not len(rows):
        raise DatasetError(f"{path} has no row with user, item and time")
    user_id = user_id.take(pa.array(rows))
    order = time_order(user_id, event_time[rows], np.random.default_rng(seed))
    rows, taken = rows[order], pa.array(rows[order])
    return Clicks(
        user_id.take(pa.array(order)),
        item_id.take(taken),
        event_time[rows],
        _rewards(table.column(reward), reward, path)[rows] if reward else None,
        {name: _feature(table.column(name)).take(taken) for name in context},
    ), len(table) - len(rows)


def _rewards(column: pa.ChunkedArray, name: str, path: Path) -> npt.NDArray[np.float64]:
    try:
        rewards: npt.NDArray[np.float64] = pc.fill_null(column.cast(pa.float64()), 1.0).to_numpy()
    except pa.ArrowException as error:
        raise DatasetError(f"{path}: column {name} holds no rewards: {error}") from error
    if not (np.isfinite(rewards) & (rewards >= 0)).all():
        raise DatasetError(f"{path}: column {name} has rewards that are negative or not finite")
    return rewards


def _one(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def _strings(column: pa.ChunkedArray) -> pa.StringArray:
    array = _one(column)
    if pa.types.is_floating(array.type):  # whole numbers that a missing value has turned into 12.0
        whole = array.cast(pa.int64(), safe=False)
        if pc.all(pc.equal(whole.cast(array.type), array), min_count=0).as_py():
            array = whole
    return array.cast(pa.string())


def _feature(column: pa.ChunkedArray) -> pa.Array:
    """A context column in one of the two types that a click's context has in a micro-batch: double or string."""
    array = _one(column)
    numeric = pa.types.is_integer(array.type) or pa.types.is_floating(array.type)
    return array.cast(pa.float64(), safe=False) if numeric else _without_empty(array.cast(pa.string()))


def _without_empty(array: pa.StringArray) -> pa.StringArray:
    """Nulls for empty strings: that is how CSV writes that nothing is known."""
    return pc.if_else(pc.equal(array, ""), pa.scalar(None, pa.string()), array)


def _seconds(column: pa.ChunkedArray, name: str, path: Path) -> npt.NDArray[np.float64]:
    """Seconds since the epoch [n], NaN where there is none. Numbers may be seconds, milli-, micro- or nanoseconds."""
    array = _one(column)
    try:
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            zoned = pc.any(pc.match_substring_regex(array, r"(Z|[+-]\d\d:?\d\d)$")).as_py()
            array = _without_empty(array.cast(pa.string())).cast(pa.timestamp("us", tz="UTC" if zoned else None))
        if pa.types.is_date(array.type):
            array = array.cast(pa.timestamp("ms"))
        if pa.types.is_timestamp(array.type):
            return _divided(array.cast(pa.int64()), {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[array.type.unit])
        if pa.types.is_integer(array.type):
            largest = max(abs(bound.as_py() or 0) for bound in pc.min_max(array).values())
            return _divided(array.cast(pa.int64()), _per_second(largest))
        seconds: npt.NDArray[np.float64] = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:
        raise DatasetError(
            f"{path}: column {name} holds no times (seconds since the epoch, or 2026-01-31T12:00:00Z): {error}"
        ) from error
    return np.divide(seconds, _per_second(float(np.nanmax(np.abs(seconds), initial=0.0))))


def _per_second(largest: float) -> int:
    """The unit in which a number stands for a time: 1e11 seconds are the year 5138, 1e11 milliseconds 1973."""
    return next((per for limit, per in ((1e17, 10**9), (1e14, 10**6), (1e11, 10**3)) if largest >= limit), 1)


def _divided(ticks: pa.Int64Array, per_second: int) -> npt.NDArray[np.float64]:
    """Seconds [n], NaN for null; whole seconds and the rest apart, as a double cannot hold nanoseconds of today."""
    whole, rest = np.divmod(pc.fill_null(ticks, 0).to_numpy(), per_second)
    seconds: npt.NDArray[np.float64] = whole + rest / per_second
    seconds[ticks.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return seconds


def _items(table: pa.Table, columns: Columns, path: Path) -> tuple[list[ItemEvent], dict[str, str]]:
    id_name = _find(table, columns.item if columns.item in table.schema.names else None, ITEM_NAMES, "item", path)
    ids = _strings(table.column(id_name)).to_pylist()
    structs = [table.schema.get_field_index(name) for name in ("features", "payload")]
    if structs[0] >= 0 and pa.types.is_struct(table.schema.field(structs[0]).type):
        features = table.column(structs[0]).combine_chunks()
        feature_columns = {f.name: pa.chunked_array(pc.struct_field(features, f.name)) for f in features.type}
        payloads = table.column(structs[1]).to_pylist() if structs[1] >= 0 else [{}] * len(ids)
    else:
        feature_columns = {name: table.column(name) for name in table.schema.names if name != id_name}
        payloads = None
    kinds = {name: _kind(_one(column)) for name, column in feature_columns.items()}
    values = {name: _plain(_one(column)).to_pylist() for name, column in feature_columns.items()}

    def rows() -> Iterator[ItemEvent]:
        for row, item_id in enumerate(ids):
            if item_id:
                known = {name: column[row] for name, column in values.items() if column[row] is not None}
                payload = known if payloads is None else {k: v for k, v in payloads[row].items() if v is not None}
                yield ItemEvent(item_id, features=known, payload=payload)

    return list(rows()), kinds


def _plain(array: pa.Array) -> pa.Array:
    """Values that JSON knows: times and other types become strings."""
    kind = array.type
    simple = (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_list(kind)
    )
    return array if simple else _without_empty(array.cast(pa.string()))


def _kind(array: pa.Array) -> str:
    """The kind of feature that a column's values look like."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return "multi"
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        return "number"
    if pa.types.is_string(array.type):
        words = pc.mean(pc.list_value_length(pc.utf8_split_whitespace(pc.drop_null(array)))).as_py()
        if words is not None and words >= TEXT_WORDS:
            return "text"
    return "categorical"
