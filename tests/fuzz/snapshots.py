"""Snapshots: a file with damage is never taken for the state that was saved, nor for another one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from streams.metrics import Metrics
from streams.snapshot import Snapshots, TornSnapshotError, decode, encode
from streams.state import PartitionState, StateConfig
from streams.validate import validate

CONFIG = StateConfig(num_buckets=8, num_hashes=2, max_users=4, history_length=3)


def _state() -> PartitionState:
    clicks = [b'{"user_id":"u%d","item_id":"i%d","event_time":%d}' % (n % 5, n % 3, n) for n in range(20)]
    state = PartitionState(CONFIG)
    state.learn(validate(clicks, np.arange(20), np.arange(20.0))[0], 20)
    return state


CORPUS = (encode(_state().state()), encode({"a": np.arange(40, dtype=np.uint64), "next_offset": np.array(3)}))
WORDS = (b"streamtower snapshot\n", b"\x28\xb5\x2f\xfd", b"PK\3\4", b"\x93NUMPY", b"\0" * 16, *CORPUS)


def check(data: bytes) -> bool:
    """Whether the input is accepted as a snapshot.

    Raises:
        AssertionError: it is accepted although it is no snapshot that was ever written.
    """
    try:
        decode(data)
    except TornSnapshotError:
        return False
    assert data in CORPUS, "damaged, and accepted"
    return True


def load(data: bytes) -> PartitionState | None:
    """What a worker makes of a file with these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(folder, "clicks", lambda: "", CONFIG, Metrics())
        snapshots.save(0, _state().state(), 20)
        (path,) = Path(folder).rglob("*.snapshot")
        path.write_bytes(data)
        return snapshots.load(0, 0, 100)
