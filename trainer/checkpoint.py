"""Checkpoints: model, optimizer, catalogue, random state, offsets and publish position on disk, as one atomic unit.

Station: between the loop and the disk. It knows no Kafka and no index. Nothing is pickled: tensors are safetensors, the
catalogue is Arrow, the rest is JSON, so that reading a checkpoint runs no code of it.

A checkpoint is a directory cNNNNNNNNNNNN, rising. It is written under another name, its files and itself are synced,
and then it is renamed; its manifest, written last, holds the size and checksum of each file. So a torn one can be told,
and is passed over for the one before.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import structlog
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, from_numpy

from trainer.metrics import Metrics
from trainer.progress import Progress

FORMAT = 2
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
MODEL_FILE = "model.safetensors"
FEATURES_FILE = "features.safetensors"
CATALOGUE_FILE = "catalogue.arrow"
SCORING_FILE = "scoring.safetensors"
NO_SCORING: Mapping[str, npt.NDArray[Any]] = {}

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

    def own_checksum(self) -> str:
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(self, checksum="")))


@dataclass(frozen=True)
class State:
    """What a checkpoint holds."""

    progress: Progress
    learner: Mapping[str, Tensor]
    catalogue: Mapping[str, Any]
    scoring: Mapping[str, npt.NDArray[Any]]


class HasState(Protocol):
    """Learner and catalogue, as a checkpoint sees them."""

    def state_dict(self) -> Mapping[str, Any]:
        """All that is needed to go on."""


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
        self._interval, self._last = interval_seconds, rising()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._written: Progress | None = None
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
                    return _read(path)
            except (OSError, ValueError, KeyError, msgspec.DecodeError, pa.ArrowException) as error:
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

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint and the one before is written."""
        return self._thread is None and self._rising() >= self._last + self._interval

    def save(
        self,
        progress: Progress,
        learner: HasState,
        catalogue: HasState,
        scoring: Mapping[str, npt.NDArray[Any]] = NO_SCORING,
    ) -> None:
        """Copies the state of all as it is now, and writes it in the background.

        Args:
            progress: of this moment.
            learner: its `state_dict` are tensors, copied here.
            catalogue: the arrays and lists of its `state_dict` are copies already.
            scoring: arrays of the served score and the co-visitation counts; copies already.

        Raises:
            RuntimeError: the one before is still being written; see `due`.
        """
        if self._thread is not None:
            raise RuntimeError("a checkpoint is being written; wait until `collect` has given it")
        started = time.perf_counter()
        state = State(
            msgspec.json.decode(msgspec.json.encode(progress), type=Progress),
            {name: tensor.clone() for name, tensor in learner.state_dict().items()},
            catalogue.state_dict(),
            scoring,
        )
        self._metrics.checkpoint_pause.observe(time.perf_counter() - started)
        taken, self._last = self._clock(), self._rising()

        def write() -> None:
            try:
                self._write(state, taken)
                self._written = state.progress
            except BaseException as error:
                self._failure = error

        # A daemon: it must not keep a process alive that ends for another reason.
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(
        self,
        progress: Progress,
        learner: HasState,
        catalogue: HasState,
        scoring: Mapping[str, npt.NDArray[Any]] = NO_SCORING,
    ) -> Progress | None:
        """The last checkpoint, on disk when this returns; what it holds, or None if it could not be written."""
        self.collect(wait=True)
        self.save(progress, learner, catalogue, scoring)
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

    def _write(self, state: State, taken: float) -> None:
        started = time.monotonic()
        names = [path.name for path in self._directory.glob("c[0-9]*")]
        number = max((int(name[1:]) for name in names), default=0) + 1
        path = self._directory / f"c{number:012d}"
        aside = self._directory / f".{path.name}"
        aside.mkdir()
        try:
            save_file(dict(state.learner), aside / MODEL_FILE)
            for name, arrays in ((FEATURES_FILE, state.catalogue["features"]), (SCORING_FILE, state.scoring)):
                save_file({key: from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}, aside / name)
            _write_catalogue(aside / CATALOGUE_FILE, state.catalogue)
            (aside / PROGRESS_FILE).write_bytes(msgspec.json.encode(state.progress))
            files = {name: _checksum(aside / name) for name in sorted(os.listdir(aside))}
            manifest = _Manifest(FORMAT, self._identity, taken, files)
            manifest.checksum = manifest.own_checksum()
            (aside / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
            sync_directory(aside)
            aside.rename(path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync(self._directory)
        for old in sorted(self._directory.glob("c[0-9]*"))[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        seconds = time.monotonic() - started
        self._metrics.checkpoint_seconds.observe(seconds)
        self._metrics.checkpoint_timestamp.set(taken)
        log.info(
            "checkpoint",
            checkpoint=path.name,
            seconds=round(seconds, 3),
            clicks_learnt=state.progress.clicks_learnt,
            size_bytes=sum(size for size, _ in files.values()),
        )


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
        raise CheckpointError(f"{path} has format {manifest.format}; this code reads {FORMAT}")
    for name, wanted in manifest.files.items():
        if (found := _checksum(path / name)) != wanted:
            raise ValueError(f"{name} has size and checksum {found} and should have {wanted}")
    return manifest


_COLUMNS = ("item_hash", "num_clicks", "added", "touched", "deleted")
_NUMBERS = ("clicks_counted", "num_dropped")


def _write_catalogue(path: Path, catalogue: Mapping[str, Any]) -> None:
    columns = {name: pa.array(catalogue[name]) for name in _COLUMNS}
    log_count = catalogue["log_count"]
    columns["log_count"] = pa.FixedSizeListArray.from_arrays(log_count.ravel(), log_count.shape[1])
    columns["item_id"] = pa.array(catalogue["item_id"], pa.large_string())
    columns["payload"] = pa.array(catalogue["payload"], pa.large_binary())
    table = pa.RecordBatch.from_pydict(columns)
    numbers = {name: msgspec.json.encode(catalogue[name]) for name in _NUMBERS}
    table = table.replace_schema_metadata(numbers | {"log_total": msgspec.json.encode(catalogue["log_total"].tolist())})
    with pa.OSFile(os.fspath(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(table)


def _read(path: Path) -> State:
    with pa.OSFile(os.fspath(path / CATALOGUE_FILE)) as source:
        table = pa.ipc.open_file(source).get_batch(0)
    catalogue: dict[str, Any] = {name: table.column(name).to_numpy(zero_copy_only=False) for name in _COLUMNS}
    catalogue |= {name: table.column(name).to_pylist() for name in ("item_id", "payload")}
    catalogue |= {name: msgspec.json.decode(table.schema.metadata[name.encode()]) for name in _NUMBERS}
    catalogue["log_total"] = np.array(msgspec.json.decode(table.schema.metadata[b"log_total"]), np.float64)
    log_count = table.column("log_count")
    num_half_lives = log_count.type.list_size
    catalogue["log_count"] = log_count.flatten().to_numpy(zero_copy_only=False).reshape(-1, num_half_lives)
    catalogue["features"] = {name: tensor.numpy() for name, tensor in load_file(path / FEATURES_FILE).items()}
    progress = msgspec.json.decode((path / PROGRESS_FILE).read_bytes(), type=Progress)
    scoring = {name: tensor.numpy() for name, tensor in load_file(path / SCORING_FILE).items()}
    return State(progress, load_file(path / MODEL_FILE), catalogue, scoring)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf for part, inner in value.items() for key, leaf in _flat(inner, f"{name}.{part}".strip(".")).items()
    }
