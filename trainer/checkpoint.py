"""Checkpoints: model, optimizer, catalogue, random state, offsets and publish position on disk, as one atomic unit.

Station: between the loop and the disk. It knows no Kafka and no index, and of the model nothing but columns with names.
Nothing is pickled: columns are safetensors, the rest is JSON, so that reading a checkpoint runs no code of it.

A checkpoint is a directory cNNNNNNNNNNNN, rising. It is written under another name, its files and itself are synced,
and then it is renamed; its manifest, written last, holds the size and checksum of each file. So a torn one can be told,
and is passed over for the one before.

Of tables, only the rows that changed are copied and written: a checkpoint cNNNNNNNNNNNN-BBBBBBBBBBBB holds those that
changed since the full one BBBBBBBBBBBB, and is read on top of it. So each one needs a full one and no other. When it
has grown to a quarter of the full one, both are written together as the next full one, beside the loop. As many full
ones are kept as checkpoints: if one is damaged, there is one before.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog
import xxhash
from safetensors import SafetensorError

from trainer.columns import Column, HasState, Kept
from trainer.metrics import Metrics
from trainer.progress import Progress

FORMAT = 5
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
COLUMNS_FILE = "columns.safetensors"
FULL_AGAIN_RATIO = 0.25
"""Share of a full checkpoint that the changes since may have before there is the next full one."""

log = structlog.get_logger()


class CheckpointError(Exception):
    """The checkpoint directory cannot be used: says what was found and what to do."""


class _Manifest(msgspec.Struct):
    format: int
    identity: dict[str, Any]
    """The settings that the checkpoint is bound to."""
    created_at: float
    files: dict[str, tuple[int, str]]
    """Name → size in bytes and xxh3-128."""
    checksum: str = ""
    """xxh3-128 of this manifest without its checksum: damaged settings must not pass for other settings."""
    base: str = ""
    """Checksum of the manifest of the full checkpoint that this one is on top of; "": it is full itself."""

    def own_checksum(self) -> str:
        plain = msgspec.structs.asdict(self) | {"checksum": ""}
        if not self.base:
            del plain["base"]  # as in earlier formats, of which one is told by its number
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(plain))


@dataclass(frozen=True)
class Full:
    """A full checkpoint, on top of which others are."""

    path: Path
    checksum: str
    """Of its manifest."""
    num_bytes: int
    """Of its columns."""


@dataclass(frozen=True)
class State:
    """What a checkpoint holds."""

    progress: Progress
    model: dict[str, Column]
    """By name."""
    full: Full
    """The full checkpoint that it is, or is on top of."""
    since: Kept | None = None
    """What had changed since the full one."""


class Checkpoints:
    """The checkpoints in one directory, which one process at a time may use."""

    def __init__(
        self,
        directory: Path,
        identity: Mapping[str, Any],
        metrics: Metrics,
        *,
        keep: int = 3,
        interval_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
        rising: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes the directory and locks it.

        Args:
            directory: the checkpoints' own.
            identity: settings that a checkpoint is bound to, as JSON can hold them.
            keep: newest checkpoints that stay, ≥ 1.
            interval_seconds: time between checkpoints, for `due`.
            clock: seconds since the epoch.
            rising: seconds that never go back.

        Raises:
            CheckpointError: it cannot be written to, or another process uses it.
        """
        self._directory = directory
        self._identity = msgspec.json.decode(msgspec.json.encode(identity))
        self._metrics = metrics
        self._keep = keep
        self._clock, self._rising = clock, rising
        self._interval, self._last = interval_seconds, -math.inf
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._written: Progress | None = None
        self._full: Full | None = None
        """None: the next one is full."""
        self._since: Kept | None = None
        """What has changed since."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be written to: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise CheckpointError(f"{directory} is used by another trainer; give each its own") from error
        for left in directory.glob(".c*"):
            shutil.rmtree(left, ignore_errors=True)

    def load(self) -> State | None:
        """The newest whole checkpoint, or None where there is none at all.

        Raises:
            CheckpointError: it is of other settings, or there are checkpoints and none is whole.
        """
        found = sorted(self._directory.glob("c[0-9]*"), reverse=True)
        for path in found:
            try:
                manifest = _verified(path)
                if manifest.identity == self._identity:
                    return self._read(path, manifest)
            except (OSError, ValueError, KeyError, RecursionError, msgspec.DecodeError, SafetensorError) as error:
                log.warning("checkpoint is torn, trying the one before", checkpoint=str(path), error=str(error))
                continue
            theirs, ours = _flat(manifest.identity), _flat(self._identity)
            different = [
                f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
                for name in sorted(theirs.keys() | ours.keys())
                if theirs.get(name) != ours.get(name)
            ]
            raise CheckpointError(
                f"{path} was made with other settings ({'; '.join(different)}); set them back, or give another "
                "checkpoint_dir to begin anew"
            )
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {self._directory} is whole; move the directory away to begin "
                "anew"
            )
        return None

    def restore(self, model: HasState) -> Progress | None:
        """Loads the newest whole checkpoint into a new model, which from here on saves its changes on top of it.

        Returns:
            How far it was; None: there is no checkpoint, and nothing was changed.

        Raises:
            CheckpointError: see `load`.
            ValueError: it is of another configuration.
        """
        if (state := self.load()) is None:
            return None
        model.load_state_dict(state.model)
        self._full, self._since, self._last = state.full, state.since, self._rising()
        return state.progress

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint and the one before is written. The first of a new model is at once: it
        is full, and to copy all its tables later would hold up clicks."""
        return self._thread is None and self._rising() >= self._last + self._interval

    def save(self, progress: Progress, model: HasState) -> None:
        """Copies what has changed, as it is now, and writes it in the background.

        Args:
            progress: of this moment.
            model: gives its columns, and is told that their changes are taken.

        Raises:
            RuntimeError: the one before is still being written; see `due`.
        """
        if self._thread is not None:
            raise RuntimeError("a checkpoint is being written; wait until `collect` has given it")
        started = time.perf_counter()
        frozen = msgspec.json.decode(msgspec.json.encode(progress), type=Progress)
        taken = Kept.taken(model, whole=self._full is None)
        self._metrics.checkpoint_pause.observe(time.perf_counter() - started)
        taken_at, self._last = self._clock(), self._rising()

        def write() -> None:
            try:
                self._write(frozen, taken, taken_at)
                self._written = frozen
            except BaseException as error:
                self._failure = error

        # A daemon: it must not keep a process alive that ends for another reason.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self, progress: Progress, model: HasState) -> Progress | None:
        """The last checkpoint, on disk when this returns; what it holds, or None if it could not be written."""
        self.collect(wait=True)
        self.save(progress, model)
        return self.collect(wait=True)

    def collect(self, wait: bool = False) -> Progress | None:
        """What the checkpoint that was finished since the last call holds, if one was.

        A checkpoint that could not be written is logged and counted; the one before stands.
        """
        if self._thread is not None and wait:
            self._thread.join()
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        if self._thread is not None:
            return None
        failure, self._failure = self._failure, None
        written, self._written = self._written, None
        if failure is not None:
            self._metrics.checkpoint_failures.inc()
            log.error("checkpoint not written", error=repr(failure))
        return written

    def close(self) -> None:
        """Waits for what is being written and gives the directory free."""
        self.collect(wait=True)
        os.close(self._lock)

    def _write(self, progress: Progress, taken: Kept, taken_at: float) -> None:
        started = time.monotonic()
        full, self._full = self._full, None  # should this fail half-way, the next one is full
        columns, is_full = taken, taken.is_whole or full is None
        if full is not None and not taken.is_whole:
            columns = self._since = taken.on(self._since) if self._since else taken
            if is_full := columns.num_bytes > FULL_AGAIN_RATIO * full.num_bytes:
                manifest = _verified(full.path)
                columns = columns.on(Kept.read(full.path / COLUMNS_FILE))
                if manifest.own_checksum() != full.checksum:
                    raise ValueError(f"{full.path} is another one than was written")
            else:
                self._full = full  # what changed is in `_since`, whether or not it can be written now
        path, checksum, num_bytes = self._put(progress, columns, taken_at, None if is_full else full)
        if is_full:
            self._full, self._since = Full(path, checksum, columns.num_bytes), None
        seconds = time.monotonic() - started
        self._metrics.checkpoint_seconds.observe(seconds)
        self._metrics.checkpoint_bytes.labels("full" if is_full else "changes").inc(num_bytes)
        self._metrics.checkpoint_timestamp.set(taken_at)
        log.info(
            "checkpoint",
            checkpoint=path.name,
            seconds=round(seconds, 3),
            clicks_learnt=progress.clicks_learnt,
            size_bytes=num_bytes,
        )

    def _put(self, progress: Progress, columns: Kept, taken_at: float, on: Full | None) -> tuple[Path, str, int]:
        """Path, manifest's checksum and size of a checkpoint that is on the disk when this returns."""
        number = max((int(path.name[1:13]) for path in self._directory.glob("c[0-9]*")), default=0) + 1
        path = self._directory / (f"c{number:012d}" + (f"-{on.path.name[1:]}" if on else ""))
        aside = self._directory / f".{path.name}"
        aside.mkdir()
        try:
            columns.write(aside / COLUMNS_FILE)
            (aside / PROGRESS_FILE).write_bytes(msgspec.json.encode(progress))
            files = {name: _checksum(aside / name) for name in sorted(os.listdir(aside))}
            manifest = _Manifest(FORMAT, self._identity, taken_at, files, base=on.checksum if on else "")
            manifest.checksum = manifest.own_checksum()
            (aside / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
            sync_directory(aside)
            aside.rename(path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync(self._directory)
        there = sorted(self._directory.glob("c[0-9]*"))
        kept = {*there[-self._keep :], *[one for one in there if "-" not in one.name][-self._keep :]}
        for old in there:
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
        return path, manifest.checksum, sum(size for size, _ in files.values())

    def _read(self, path: Path, manifest: _Manifest) -> State:
        columns = Kept.read(path / COLUMNS_FILE)
        full, since = Full(path, manifest.checksum, columns.num_bytes), None
        if manifest.base:
            below = self._directory / f"c{path.name.partition('-')[2]}"
            if _verified(below).checksum != manifest.base:
                raise ValueError(f"{below} is another one than it was made on")
            lower = Kept.read(below / COLUMNS_FILE)
            full, since = Full(below, manifest.base, lower.num_bytes), columns
            columns = columns.on(lower)
        progress = msgspec.json.decode((path / PROGRESS_FILE).read_bytes(), type=Progress)
        return State(progress, columns.columns, full, since)


def sync(path: Path) -> None:
    """Brings a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Brings a directory with all its files to the disk."""
    for file in path.iterdir():
        sync(file)
    sync(path)


def _checksum(path: Path) -> tuple[int, str]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        return file.tell(), digest.hexdigest()


def _verified(path: Path) -> _Manifest:
    manifest = msgspec.json.decode((path / MANIFEST_FILE).read_bytes(), type=_Manifest)
    if manifest.checksum != manifest.own_checksum():
        raise ValueError(f"{MANIFEST_FILE} contradicts its own checksum")
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.format}; this code reads {FORMAT}: move the directory away to begin anew"
        )
    for name, wanted in manifest.files.items():
        if (found := _checksum(path / name)) != wanted:
            raise ValueError(f"{name} has size and checksum {found} and should have {wanted}")
    return manifest


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf for part, inner in value.items() for key, leaf in _flat(inner, f"{name}.{part}".strip(".")).items()
    }
