"""CORE: ids and features → rows of embedding tables and numbers, ready for the towers.

Station: between the micro-batch or the item catalogue and `towers`. Which features there are is configuration
(`TowerConfig`); every id and value is hashed to a row, so nothing is ever unknown and there is no vocabulary. It holds
no weights: those are the towers'. Other packages import all of it through `trainer.towers`.

Shapes: B queries, N items, S bags per input, v table rows in all bags together.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from trainer.rewards import Task, problems_of

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

ID_HASH_SEED = 0x5EED
"""Seed of the 64-bit hash of ids. The same as `streams.contract.HASH_SEED`, which this module must not import."""
FEATURE_HASH_SEED = 0xFEA7
"""Seed of the hash that gives a feature's value its row; changing it makes every trained feature row meaningless."""
MAX_WORDS = 64
"""Words of a text that count, from its start: a bound on the work that one item can cause."""

FeatureKind = Literal["categorical", "multi", "text", "number", "item"]
"""categorical: one value. multi: several values, averaged. text: lower-case words, averaged. number: standardised.
item: an item id, looked up in the item rows that history and candidates share (a seed item being watched now)."""

Value = str | int | float | bool | None
"""One feature value as it comes from JSON; None, "" and non-finite numbers mean that it is missing."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Feature:
    """One feature of the query (context) or of the item, by the name that clicks or item events give it."""

    name: str
    kind: FeatureKind


@dataclass(frozen=True)
class TowerConfig:
    """Shape of both towers: with the weights, all that it takes to build them again.

    Raises:
        ValueError: on construction; the message lists every problem, one a line.
    """

    embedding_dim: int = 64
    """Size of query and item embeddings, 1 … 4096."""
    row_dim: int = 64
    """Size of a table row, 1 … 4096."""
    item_rows: int = 2**18
    """Rows of the item table, a power of two; ids that hash to the same row share it."""
    user_rows: int = 2**16
    """Rows of the user table, a power of two; used with `use_user_id` alone."""
    feature_rows: int = 2**17
    """Rows of the table of all categorical, multi and text values, a power of two."""
    history_length: int = 20
    """Newest items of a history that count, 1 … 1000."""
    history_decay: float = 0.8
    """Weight of a history item relative to the next newer one, in (0, 1]; 1 is the plain mean."""
    use_history_length: bool = False
    """Whether the query tower knows how many items the history has."""
    use_user_id: bool = False
    """Whether the query tower has a row per user."""
    context: tuple[Feature, ...] = ()
    """Query features, from the clicks' context."""
    item: tuple[Feature, ...] = ()
    """Item features, from the item events."""
    hidden: tuple[int, ...] = ()
    """Sizes of the ReLU layers before the last, linear one, in both towers; () makes the towers linear."""
    temperature: float = 0.12
    """Logits are cosines divided by it, in (0, 10]."""
    popularity_dims: int = 0
    """Log frequencies for each of which the query tower gives a weight of its own, 0 … 1000; 0: it gives none."""
    tasks: tuple[Task, ...] = ()
    """Rewards with a head each, see `rewards`; (): the clicks' own reward alone, without a head."""

    def __post_init__(self) -> None:
        problems = []

        def require(name: str, kind: type, test: Any, wanted: str) -> None:
            value = getattr(self, name)
            right_type = isinstance(value, (int, float) if kind is float else kind)
            if not right_type or (kind is not bool and isinstance(value, bool)) or not test(value):
                problems.append(f"{name} must be {wanted}, not {value!r}")

        for name in ("embedding_dim", "row_dim"):
            require(name, int, lambda value: 1 <= value <= 4096, "an integer of 1 … 4096")
        for name in ("item_rows", "user_rows", "feature_rows"):
            require(name, int, lambda value: 2 <= value <= 2**31 and value.bit_count() == 1, "a power of two, 2 … 2^31")
        require("history_length", int, lambda value: 1 <= value <= 1000, "an integer of 1 … 1000")
        require("history_decay", float, lambda value: 0 < value <= 1, "a number in (0, 1]")
        require("temperature", float, lambda value: 0 < value <= 10, "a number in (0, 10]")
        require("popularity_dims", int, lambda value: 0 <= value <= 1000, "an integer of 0 … 1000")
        require("use_history_length", bool, lambda value: True, "true or false")
        require("use_user_id", bool, lambda value: True, "true or false")
        if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in self.hidden):
            problems.append(f"hidden must hold sizes of at least 1, not {list(self.hidden)!r}")
        for side in ("context", "item"):
            features: tuple[Feature, ...] = getattr(self, side)
            names = [feature.name for feature in features]
            for feature in features:
                if not isinstance(feature.name, str) or not feature.name:
                    problems.append(f"{side}: a feature's name must be a text that is not empty, not {feature.name!r}")
                elif names.count(feature.name) > 1:
                    problems.append(f"{side}: the feature {feature.name!r} is listed {names.count(feature.name)} times")
                if feature.kind not in get_args(FeatureKind):
                    known = ", ".join(get_args(FeatureKind))
                    problems.append(f"{side}: feature {feature.name!r} has kind {feature.kind!r}; kinds are {known}")
        problems += problems_of(self.tasks, [feature.name for feature in self.context])
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: see `from_dict`."""
        plain = dataclasses.asdict(self) | {"tasks": {task.name: task.weight for task in self.tasks}}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TowerConfig:
        """The configuration in plain data; what is absent has its default.

        Raises:
            ValueError: lists every problem, one a line: unknown names, wrong types, values out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        problems = [f"{name!r} is no setting of the towers" for name in plain if name not in known]
        values = {name: value for name, value in plain.items() if name in known}
        for side in {"context", "item", "hidden"} & values.keys():
            if not isinstance(values[side], (list, tuple)):
                problems.append(f"{side} must be a list, not {values.pop(side)!r}")
            elif side == "hidden":
                values[side] = tuple(values[side])
            else:
                entries = values.pop(side)
                bad = [
                    entry for entry in entries if not (isinstance(entry, Mapping) and set(entry) == {"name", "kind"})
                ]
                problems += [f"{side}: a feature has a name and a kind, not {entry!r}" for entry in bad]
                values[side] = tuple(Feature(**entry) for entry in entries if entry not in bad)
        if not isinstance(values.get("tasks", {}), Mapping):
            problems.append(f"tasks must be an object of names and weights, not {values.pop('tasks')!r}")
        elif "tasks" in values:
            values["tasks"] = tuple(Task(*task) for task in values["tasks"].items())
        try:
            config = cls(**values)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return config


@dataclass(frozen=True)
class Bags:
    """Weighted sets of table rows: `num_bags` bags for each input, bag number = input · num_bags + slot."""

    rows: Tensor
    """int64 [v]"""
    offsets: Tensor
    """int64 [n · num_bags + 1]; bag b is rows[offsets[b]:offsets[b + 1]]."""
    weights: Tensor
    """float32 [v], summing to 1 in each bag that is not empty."""
    num_bags: int

    def take(self, indices: Int64Array) -> Bags:
        """The bags of these inputs, in this order."""
        offsets = self.offsets.numpy()
        if self.num_bags == 0:
            return self
        lengths = np.diff(offsets).reshape(-1, self.num_bags)[indices]
        picked = torch.from_numpy(ranges(offsets[: -1 : self.num_bags][indices], lengths.sum(1)))
        return Bags(self.rows[picked], torch.from_numpy(bag_offsets(lengths)), self.weights[picked], self.num_bags)


@dataclass(frozen=True)
class ItemInputs:
    """N items for the item tower."""

    items: Bags
    """Rows of the item table: slot 0 the item itself, then each feature of kind item."""
    features: Bags
    """Rows of the feature table: each categorical, multi and text feature."""
    numbers: Tensor
    """float32 [N, number features], NaN where missing."""

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: Int64Array) -> ItemInputs:
        """These items, in this order."""
        return ItemInputs(
            self.items.take(indices), self.features.take(indices), self.numbers[torch.from_numpy(indices)]
        )


@dataclass(frozen=True)
class QueryInputs:
    """B queries for the query tower."""

    items: Bags
    """Rows of the item table: slot 0 the decayed history, then each context feature of kind item."""
    features: Bags
    """Rows of the feature table: each categorical, multi and text feature."""
    numbers: Tensor
    """float32 [B, number features], NaN where missing."""
    users: Bags
    """Rows of the user table: one per query with `use_user_id`, else no bags."""

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: Int64Array) -> QueryInputs:
        """These queries, in this order."""
        numbers = self.numbers[torch.from_numpy(indices)]
        return QueryInputs(self.items.take(indices), self.features.take(indices), numbers, self.users.take(indices))


def query_inputs(
    config: TowerConfig,
    user_hash: UInt64Array | None,
    history_values: UInt64Array,
    history_offsets: Int64Array,
    context: Mapping[str, Sequence[Value]] | None = None,
) -> QueryInputs:
    """Queries as the query tower takes them. Total: any hash, any history, any context value has an answer.

    Args:
        user_hash: uint64 [B]; None where nobody is known, which is the same as a user without clicks.
        history_values: uint64 [h] item hashes, newest last; only the last `history_length` of each row count.
        history_offsets: int64 [B + 1] row i's history is history_values[history_offsets[i]:history_offsets[i + 1]].
        context: columns [B] by name. Columns that the configuration does not name are not looked at; a column that is
            not there counts as missing in every row.
    """
    num_rows = len(history_offsets) - 1
    context = {} if context is None else context
    missing: Sequence[Value] = [None] * num_rows
    columns = {feature.name: context.get(feature.name, missing) for feature in config.context}
    encoded = [
        [_encode(config, feature, columns[feature.name][row]) for row in range(num_rows)] for feature in config.context
    ]
    sides = list(zip(config.context, encoded, strict=True))
    references = [values for feature, values in sides if feature.kind == "item"]
    tokens = [values for feature, values in sides if feature.kind not in ("item", "number")]
    numbers = [values for feature, values in sides if feature.kind == "number"]

    ends = np.asarray(history_offsets[1:], dtype=np.int64)
    lengths = np.minimum(np.diff(history_offsets), config.history_length)
    positions = ranges(ends - lengths, lengths)
    age = np.repeat(ends - 1, lengths) - positions
    weights = config.history_decay ** age.astype(np.float64)
    total = np.bincount(np.repeat(np.arange(num_rows), lengths), weights, minlength=num_rows)
    weights /= np.repeat(total, lengths)
    history = (rows_of(history_values[positions], config.item_rows), lengths, weights.astype(np.float32))

    users = []
    if config.use_user_id:
        known = np.zeros(0, dtype=np.uint64) if user_hash is None else user_hash
        ones = np.full(num_rows, int(user_hash is not None))
        users = [(rows_of(known, config.user_rows), ones, np.ones(len(known), np.float32))]
    return QueryInputs(
        items=_interleave([history, *map(_column, references)], num_rows),
        features=_interleave(list(map(_column, tokens)), num_rows),
        numbers=torch.from_numpy(np.array(numbers, dtype=np.float32).reshape(len(numbers), num_rows).T.copy()),
        users=_interleave(users, num_rows),
    )


@dataclass(frozen=True)
class EncodedItem:
    """One item's features as rows and numbers, in the order of the configuration."""

    references: list[list[int]]
    """Rows of the item table for each feature of kind item."""
    tokens: list[list[int]]
    """Rows of the feature table for each categorical, multi and text feature."""
    numbers: list[float]
    """NaN where missing."""


def encode_item_features(config: TowerConfig, features: Mapping[str, Value | Sequence[Value]]) -> EncodedItem:
    """One item's features, as its ItemEvent gives them. Total: names unknown to the configuration are left out, and a
    value of a wrong type counts as missing."""
    encoded = [(feature.kind, _encode(config, feature, features.get(feature.name))) for feature in config.item]
    return EncodedItem(
        references=[value for kind, value in encoded if kind == "item"],
        tokens=[value for kind, value in encoded if kind not in ("item", "number")],
        numbers=[value for kind, value in encoded if kind == "number"],
    )


def _text_of(value: Value) -> str:
    """A value as text, the same for what JSON, Arrow and a caller make of it: 3 and 3.0 are "3"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value) if isinstance(value, (str, int)) else ""


def _number_of(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) <= 1e30 else math.nan


def _encode(config: TowerConfig, feature: Feature, value: Value | Sequence[Value]) -> Any:
    """A number, or the list of table rows."""
    if feature.kind == "number":
        return _number_of(value)
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [text for text in map(_text_of, values) if text]
    if feature.kind == "item":
        mask = config.item_rows - 1
        return [xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"), ID_HASH_SEED) & mask for text in texts]
    if feature.kind == "text":
        texts = [word for text in texts for word in _WORD.findall(text.lower())][:MAX_WORDS]
    mask = config.feature_rows - 1
    stem = feature.name + "\x1f"
    return [
        xxhash.xxh3_64_intdigest((stem + text).encode(errors="surrogatepass"), FEATURE_HASH_SEED) & mask
        for text in texts
    ]


def rows_of(hashes: UInt64Array, num_rows: int) -> Int64Array:
    return (hashes & np.uint64(num_rows - 1)).astype(np.int64)


def bag_offsets(lengths: Int64Array) -> Int64Array:
    """[0, running totals of `lengths`, flattened]."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def ranges(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """start, start + 1, … of each range, one range after the other."""
    before = bag_offsets(lengths)
    return np.repeat(starts - before[:-1], lengths) + np.arange(before[-1])


def mean_bags(lengths: Int64Array, rows: Int64Array) -> Bags:
    """Bags of equal weights; lengths [n, S]."""
    flat = lengths.ravel()
    weights = np.repeat((1 / np.maximum(flat, 1)).astype(np.float32), flat)
    return Bags(
        torch.from_numpy(rows),
        torch.from_numpy(bag_offsets(flat)),
        torch.from_numpy(weights),
        num_bags=lengths.shape[1],
    )


def _column(values: list[list[int]]) -> tuple[Int64Array, Int64Array, Float32Array]:
    """One slot of all inputs: rows, lengths [n], weights."""
    lengths = np.array([len(rows) for rows in values], dtype=np.int64)
    rows = np.array([row for rows in values for row in rows], dtype=np.int64)
    return rows, lengths, np.repeat((1 / np.maximum(lengths, 1)).astype(np.float32), lengths)


def _interleave(columns: list[tuple[Int64Array, Int64Array, Float32Array]], num_inputs: int) -> Bags:
    """Slots, each given for all inputs, as bags in the order of the inputs."""
    num_bags = len(columns)
    if num_bags == 0:
        return mean_bags(np.zeros((num_inputs, 0), dtype=np.int64), np.zeros(0, dtype=np.int64))
    rows, lengths, weights = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    bag = np.arange(num_inputs * num_bags).reshape(num_inputs, num_bags).T.ravel()
    order = np.argsort(np.repeat(bag, lengths), kind="stable") if num_bags > 1 else slice(None)
    offsets = bag_offsets(lengths.reshape(num_bags, num_inputs).T)
    return Bags(
        torch.from_numpy(rows[order]), torch.from_numpy(offsets), torch.from_numpy(weights[order]), num_bags=num_bags
    )
