"""Snapshots of partitions' states, in a directory or at any fsspec URL, so that a replay is short.

Station: beside the partition. A snapshot holds a state and the offset that it reflects, and nothing depends on it but
time: without one, the same state comes from a replay of the clicks, for as long as Kafka still has them.

Files are URL/TOPIC/PARTITION/OFFSET-IDENTITY.snapshot. Identity is a digest of the topic's own id and of every setting
that the state depends on; files of another one are never read. A file ends with the checksum of all that is before it,
so a torn one can be told. In a directory it is written aside, synced and renamed; object stores put whole objects.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import cramjam
import fsspec
import numpy as np
import numpy.typing as npt
import structlog
import xxhash
from fsspec.implementations.local import LocalFileSystem

from streams.broker import DependencyError
from streams.metrics import Metrics
from streams.service import ConfigurationError
from streams.state import PartitionState, StateConfig

FORMAT = 3
_MAGIC = b"streamtower snapshot\n"
_NAME = re.compile(r"^(\d{20})-([0-9a-f]{16})\.snapshot$")
_CHECKSUM_BYTES = 16
_LEFT_SECONDS = 600.0

log = structlog.get_logger("streams")


class TornSnapshotError(ValueError):
    """A file that is not, byte for byte, what was written."""


def encode(state: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Arrays as bytes: magic, zstd of an .npz, checksum."""
    raw = io.BytesIO()
    np.savez(raw, allow_pickle=False, **state)
    body = _MAGIC + bytes(cramjam.zstd.compress(raw.getbuffer(), level=1))
    return body + xxhash.xxh3_128_digest(body)


def decode(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `encode`.

    Raises:
        TornSnapshotError: these bytes did not come out of `encode`.
    """
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if not body.startswith(_MAGIC) or xxhash.xxh3_128_digest(body) != checksum:
        raise TornSnapshotError(f"{len(data)} bytes whose checksum does not fit")
    with np.load(io.BytesIO(cramjam.zstd.decompress(body[len(_MAGIC) :])), allow_pickle=False) as arrays:
        return dict(arrays)


class Snapshots:
    """The snapshots of one clicks topic. `save` and `load` block: threads only.

    Args:
        url: a directory, or a URL of any kind that fsspec and the installed packages know.
        topic: name of the clicks topic.
        topic_id: asks the broker for the topic's own id, "" where it has none; asked once.
        config: what states are made from.
        keep: newest snapshots of a partition that stay, ≥ 1.

    Raises:
        ConfigurationError: there is no such kind of URL, or a directory cannot be written to.
        DependencyError: a place elsewhere cannot be written to.
    """

    def __init__(
        self,
        url: str,
        topic: str,
        topic_id: Callable[[], str],
        config: StateConfig,
        metrics: Metrics,
        *,
        keep: int = 3,
    ) -> None:
        self._topic, self._topic_id, self._config = topic, topic_id, config
        self._metrics, self._keep = metrics, keep
        self._known_identity: str | None = None
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigurationError([f"snapshots {url!r}: {error}"]) from error
        self._root = f"{root.rstrip('/')}/{topic}"
        self._is_local = isinstance(self._files, LocalFileSystem)
        try:
            self._write(f"{self._root}/probe-{os.getpid()}", b"can this be written?")
            self._files.rm_file(f"{self._root}/probe-{os.getpid()}")
        except Exception as error:
            problem = f"snapshots {url!r} cannot be written to: {error!r}"
            if self._is_local:
                raise ConfigurationError([f"{problem}; name a directory of the service's own, or none"]) from error
            raise DependencyError(problem) from error

    def save(self, partition: int, state: Mapping[str, npt.NDArray[Any]], committed: int) -> None:
        """Writes a state, as `PartitionState.state` gives it, and removes what is older than the newest `keep`.

        The newest one that is not above the committed offset stays in any case: a worker that starts there can use it.

        Raises:
            OSError, and whatever an fsspec file system raises: it is not written; those before it stand.
        """
        started = time.monotonic()
        data = encode(state)
        self._write(f"{self._folder(partition)}/{int(state['next_offset']):020d}-{self._identity()}.snapshot", data)
        offsets = self._offsets(partition)
        usable = next((offset for offset in offsets if offset <= committed), None)
        for offset in offsets[self._keep :]:
            if offset != usable:
                self._files.rm_file(self._path(partition, offset))
        if self._is_local:
            _remove_left(Path(self._folder(partition)))
        seconds = time.monotonic() - started
        self._metrics.snapshots.inc()
        self._metrics.snapshot_seconds.observe(seconds)
        self._metrics.snapshot_timestamp.set(time.time())
        log.info(
            "snapshot",
            partition=partition,
            next_offset=int(state["next_offset"]),
            size_bytes=len(data),
            seconds=round(seconds, 3),
        )

    def load(self, partition: int, above: int, at_most: int) -> PartitionState | None:
        """The newest whole state with above < next_offset ≤ at_most, or None. What cannot be read is passed over.

        Raises:
            DependencyError: the topic's id could not be had.
        """
        try:
            offsets = self._offsets(partition, warn=True)
        except DependencyError:
            raise
        except Exception as error:
            self._skip("unreadable", self._folder(partition), error)
            return None
        for offset in offsets:
            if not above < offset <= at_most:
                continue
            path = self._path(partition, offset)
            try:
                state = PartitionState(self._config)
                layout = {name: array.dtype.kind for name, array in state.state().items()}
                arrays = decode(self._files.cat_file(path))
                if {name: array.dtype.kind for name, array in arrays.items()} != layout or arrays[
                    "next_offset"
                ] != offset:
                    raise TornSnapshotError("its arrays are not those of a state at its offset")
                state.restore(arrays)
                return state
            except (ValueError, KeyError) as error:
                self._skip("torn", path, error)
            except Exception as error:
                self._skip("unreadable", path, error)
        return None

    def _skip(self, reason: str, path: str, error: object) -> None:
        self._metrics.snapshots_skipped.labels(reason).inc()
        log.warning("snapshot passed over", reason=reason, snapshot=path, error=repr(error))

    def _identity(self) -> str:
        if self._known_identity is None:
            identity = [FORMAT, self._topic_id(), asdict(self._config)]
            self._known_identity = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
        return self._known_identity

    def _folder(self, partition: int) -> str:
        return f"{self._root}/{partition:05d}"

    def _path(self, partition: int, offset: int) -> str:
        return f"{self._folder(partition)}/{offset:020d}-{self._identity()}.snapshot"

    def _offsets(self, partition: int, warn: bool = False) -> list[int]:
        """Of the snapshots that are ours, newest first."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._folder(partition), detail=False)
        except FileNotFoundError:
            return []
        found = [match for path in paths if (match := _NAME.match(path.rsplit("/", 1)[-1]))]
        foreign = [match[0] for match in found if match[2] != self._identity()]
        if foreign and warn:
            self._skip("foreign", self._folder(partition), f"of other settings or another topic: {sorted(foreign)}")
        return sorted((int(match[1]) for match in found if match[2] == self._identity()), reverse=True)

    def _write(self, path: str, data: bytes) -> None:
        self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if self._is_local:
            write_aside(Path(path), data)
        else:
            self._files.pipe_file(path, data)


def write_aside(path: Path, data: bytes) -> None:
    """Puts a file in place, there whole or not at all, also after a power cut."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_left(folder: Path) -> None:
    """What processes that were killed had begun to write."""
    for aside in folder.glob(".*.snapshot.*"):
        if time.time() - aside.stat().st_mtime > _LEFT_SECONDS:
            aside.unlink(missing_ok=True)


class Kept(Protocol):
    """One partition, as far as its state is saved."""

    state: PartitionState | None
    is_replaying: bool
    committed: int


class KeptPartitions(Protocol):
    """All of them."""

    @property
    def workers(self) -> Mapping[int, Kept]: ...


class SnapshotKeeper:
    """Saves each partition's state every so often, one at a time, so that one copy is in memory.

    A worker starts at the committed offset and can use no snapshot above it. So while commits stand still, no further
    one is taken.
    """

    def __init__(
        self, partitions: KeptPartitions, snapshots: Snapshots, metrics: Metrics, interval_seconds: float
    ) -> None:
        self._partitions, self._snapshots, self._metrics = partitions, snapshots, metrics
        self._interval_seconds = interval_seconds
        self._saved: dict[int, int] = {}

    async def run(self) -> None:
        """Saves until cancelled. What cannot be saved is logged and counted; the snapshots before it stand."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            await self.save_all()

    async def save_all(self) -> None:
        """Saves every state that has moved on since its last snapshot."""
        for partition, worker in list(self._partitions.workers.items()):
            saved = self._saved.get(partition, -1)
            if worker.state is None or worker.is_replaying or not saved <= worker.committed:
                continue
            if worker.state.next_offset == saved:
                continue
            state = worker.state.state()  # between two micro-batches, for nothing here waits in the middle of one
            try:
                await asyncio.to_thread(self._snapshots.save, partition, state, worker.committed)
                self._saved[partition] = int(state["next_offset"])
            except Exception as error:
                self._metrics.snapshot_failures.inc()
                log.error("snapshot not written", partition=partition, error=repr(error))
