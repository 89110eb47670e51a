"""Checkpoints: whichever byte of whichever file is damaged, what is loaded is what was saved, or nothing is."""

from __future__ import annotations

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
    """A full checkpoint and one with the changes since, of which one file at a time is exchanged.

    An input is the file's name, a NUL, and its bytes.
    """

    def __init__(self, folder: Path) -> None:
        items = [ItemChange("item-1", {"brand": "a"}, b'{"n": 1}')]
        trainer = Trainer(folder / "unused", [*click_stream(2), items])
        trainer.run()
        self._checkpoints = Checkpoints(folder, IDENTITY, Metrics())
        assert self._checkpoints.finish(trainer.progress, trainer.model)
        self._full = fingerprint(trainer.progress, trainer.model.state_dict())
        trainer.progress.step += 1
        trainer.model.learn(click_stream(3)[2], trainer.progress.step)
        assert self._checkpoints.finish(trainer.progress, trainer.model)
        self._newest = fingerprint(trainer.progress, trainer.model.state_dict())
        self._folder = folder
        files = sorted(path for path in folder.glob("c*/*") if path.parent.name != "unused")
        self._whole = {str(path.relative_to(folder)): path.read_bytes() for path in files}
        assert len({name.partition("/")[0] for name in self._whole}) == 2
        self.corpus = tuple(name.encode() + b"\0" + data for name, data in self._whole.items())

    def close(self) -> None:
        """Gives the directory free."""
        self._checkpoints.close()

    def check(self, data: bytes) -> bool:
        """Whether the newest checkpoint is loaded with this file in it, or below it.

        Raises:
            AssertionError: what is loaded is neither what was saved nor what was saved before.
        """
        name, _, content = data.partition(b"\0")
        chosen = name.decode(errors="replace")
        if chosen not in self._whole:
            return False
        path = self._folder / chosen
        path.write_bytes(content)
        try:
            state = self._checkpoints.load()
        except CheckpointError:
            return False
        finally:
            path.write_bytes(self._whole[chosen])
        assert state is not None
        loaded = fingerprint(state.progress, state.model)
        is_newest = loaded == self._newest
        assert is_newest or (loaded == self._full and "-" in chosen), f"{chosen} is damaged, and was loaded"
        return is_newest


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
