"""Finds the data set that a name or a path means.

Station: what the command line asks; it decides nothing about the data themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streamtower.datasets.clicks import Dataset, DatasetError
from streamtower.datasets.completejourney import Progress, completejourney_dataset
from streamtower.datasets.files import Columns, file_dataset
from streamtower.datasets.synthetic import synthetic_dataset

NAMES = ("completejourney", "synthetic")


def open_dataset(
    data: str,
    *,
    items: Path | None = None,
    columns: Columns | None = None,
    kinds: Mapping[str, str] | None = None,
    num_clicks: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """The data set named `data`, or the file at that path.

    Args:
        data: one of NAMES, or a path.
        items, columns, kinds: for files, as in `file_dataset`.
        num_clicks: of the synthetic one; its shock comes at half of them.
        seed: of invented clicks and of the order within one moment.
        progress: told how far the first preparation of a public data set is.

    Raises:
        DatasetError: there is none, or it cannot be read.
    """
    if data in NAMES and (items or columns or kinds):
        raise DatasetError(f"{data} brings its items and columns with it: these options are for files")
    if data == "completejourney":
        return completejourney_dataset(seed=seed, progress=progress)
    if data == "synthetic":
        return synthetic_dataset(num_clicks, seed=seed) if num_clicks else synthetic_dataset(seed=seed)
    path = Path(data)
    if not path.is_file():
        raise DatasetError(f"there is no file {data}, and no data set of that name; known names: {', '.join(NAMES)}")
    return file_dataset(path, columns, items=items, kinds=kinds, seed=seed)
