"""Checkpoints: whichever byte of whichever file is damaged, what is loaded is what was saved, or nothing is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import structlog

from tests.fuzz.mutator import JSON_WORDS
from tests.trainer.small_trainer import IDENTITY, Trainer
from tests.trainer.streams_of_clicks import click_stream
from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.columns import Column, Ragged
from trainer.item_events import ItemChange
from trainer.metrics import Metrics
from trainer.progress import Progress

WORDS = (*JSON_WORDS, b'"files":', b'"../', b'"format":', b'"identity":', b'"checksum":""', b'"step":')


class CheckpointFiles:
    """One checkpoint, of which one file at a time is exchanged. An input is the file's name, a NUL, and its bytes."""

    def __init__(self, folder: Path) -> None:
        trainer = Trainer(folder / "made", [*click_stream(2), [ItemChange("item-1", {"brand": "a"}, b'{"n": 1}')]])
        trainer.run()
        trainer.checkpoints.close = lambda: None  # type: ignore[method-assign]
        (saved,) = (folder / "made").glob("c0*")
        directory = folder / "one"
        directory.mkdir()
        self._checkpoint = directory / saved.name
        shutil.copytree(saved, self._checkpoint)
        self._checkpoints = Checkpoints(directory, IDENTITY, Metrics())
        self._whole = {path.name: path.read_bytes() for path in sorted(self._checkpoint.iterdir())}
        self.corpus = tuple(name.encode() + b"\0" + data for name, data in self._whole.items())
        state = self._checkpoints.load()
        assert state is not None
        self._fingerprint = fingerprint(state.progress, state.model)

    def close(self) -> None:
        """Gives the directory free."""
        self._checkpoints.close()

    def check(self, data: bytes) -> bool:
        """Whether a checkpoint with this file is loaded.

        Raises:
            AssertionError: it is, and is not what was saved.
        """
        name, _, content = data.partition(b"\0")
        chosen = name.decode(errors="replace")
        if chosen not in self._whole:
            return False
        path = self._checkpoint / chosen
        path.write_bytes(content)
        try:
            state = self._checkpoints.load()
        except CheckpointError:
            return False
        finally:
            path.write_bytes(self._whole[chosen])
        assert state is not None and fingerprint(state.progress, state.model) == self._fingerprint, (
            f"{chosen} is damaged, and was loaded"
        )
        return True


def fingerprint(progress: Progress, model: Mapping[str, Column]) -> dict[str, Any]:
    """All of a checkpoint, in a form that can be compared."""
    return {name: plain(column) for name, column in model.items()} | {"progress": msgspec.json.encode(progress)}


def plain(column: Column) -> Any:
    """A column as what compares with ==."""
    if isinstance(column, Ragged):
        packed = column.take(np.arange(len(column)))
        return plain(packed.lengths), plain(packed.values)
    return tuple(column) if isinstance(column, list) else (str(column.dtype), column.shape, column.tobytes())


@contextmanager
def checkpoint_files(folder: Path) -> Iterator[CheckpointFiles]:
    """A checkpoint to damage; warnings about torn ones are not shown."""
    with structlog.testing.capture_logs():
        made = CheckpointFiles(folder)
        try:
            yield made
        finally:
            made.close()
