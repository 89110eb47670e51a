"""A state comes back from its snapshot bit for bit, or the snapshot is passed over: torn, foreign, too new, unread."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.broker import DependencyError
from streams.metrics import Metrics
from streams.service import ConfigurationError
from streams.snapshot import SnapshotKeeper, Snapshots, TornSnapshotError, decode, encode
from streams.state import PartitionState, StateConfig
from tests.streams.test_state import SMALL, assert_equal_states, clicks_of

CLICKS = clicks_of(200)


def state_at(next_offset: int, config: StateConfig = SMALL) -> PartitionState:
    state = PartitionState(config)
    state.learn(CLICKS.rows(0, next_offset), next_offset)
    return state


class Bench:
    """The snapshots below one URL, as a process has them that was just started."""

    def __init__(
        self, url: object, config: StateConfig = SMALL, topic_id: str = "t1", keep: int = 3, topic: str = "clicks"
    ) -> None:
        self.metrics = Metrics()
        self.snapshots = Snapshots(str(url), topic, lambda: topic_id, config, self.metrics, keep=keep)

    def save(self, next_offset: int, committed: int = 10**9, partition: int = 0) -> None:
        self.snapshots.save(partition, state_at(next_offset).state(), committed)

    def load(self, at_most: int = 10**9, above: int = 0, partition: int = 0) -> int | None:
        state = self.snapshots.load(partition, above, at_most)
        if state is None:
            return None
        assert_equal_states(state, state_at(state.next_offset))
        return state.next_offset

    def skipped(self, reason: str) -> float | None:
        return self.metrics.registry.get_sample_value("streamtower_streams_snapshots_skipped_total", {"reason": reason})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(params=["directory", "elsewhere"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "snapshots") if request.param == "directory" else f"memory://{tmp_path.name}"


def test_the_newest_that_is_not_above_the_offset_comes_back_and_goes_on_as_if_nothing_was(url: str) -> None:
    Bench(url).save(50)
    Bench(url).save(100)
    Bench(url).save(120)
    Bench(url).save(70, partition=1)
    assert Bench(url).load(at_most=119) == 100
    assert Bench(url).load(at_most=120) == 120
    assert Bench(url).load(at_most=49) is None
    assert Bench(url).load(at_most=119, above=100) is None
    assert (Bench(url).load(partition=1), Bench(url).load(partition=2)) == (70, None)
    restored = Bench(url).snapshots.load(0, 0, 100)
    assert restored is not None
    restored.learn(CLICKS.rows(100, 200), 200)
    assert_equal_states(restored, state_at(200))


def test_a_torn_one_is_told_by_its_checksum_and_the_one_before_is_taken(tmp_path: Path) -> None:
    Bench(tmp_path).save(50)
    Bench(tmp_path).save(100)
    newest = files(tmp_path)[-1]
    whole = newest.read_bytes()
    for torn in (whole[:-1], whole[: len(whole) // 2], b"", whole[:100] + b"\0" + whole[101:], whole + b"more"):
        newest.write_bytes(torn)
        bench = Bench(tmp_path)
        assert bench.load() == 50
        assert bench.skipped("torn") == 1


@given(data=st.data())
def test_no_change_of_a_single_byte_passes(data: st.DataObject) -> None:
    whole = encode({"a": np.arange(40, dtype=np.uint64), "b": np.array(3)})
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TornSnapshotError):
        decode(bytes(changed))


@given(st.binary(max_size=200))
def test_foreign_bytes_do_not_pass(data: bytes) -> None:
    with pytest.raises(TornSnapshotError):
        decode(data)


def test_one_of_another_offset_or_with_other_arrays_is_torn_even_if_its_checksum_fits(tmp_path: Path) -> None:
    Bench(tmp_path).save(50)
    (path,) = files(tmp_path)
    arrays = state_at(50).state()
    for wrong in (
        state_at(51).state(),
        {name: array for name, array in arrays.items() if name != "drift.counts"},
        arrays | {"another": np.zeros(1)},
        arrays | {"drift.counts": arrays["drift.counts"].astype(np.int64)},
        arrays | {"histories.items": arrays["histories.items"][:, :1]},
    ):
        path.write_bytes(encode(wrong))
        bench = Bench(tmp_path)
        assert bench.load() is None
        assert bench.skipped("torn") == 1


@pytest.mark.parametrize(
    "other",
    [
        {"config": replace(SMALL, alpha=0.02)},
        {"config": replace(SMALL, history_length=4)},
        {"topic_id": "t2"},
    ],
    ids=["another rate", "another length", "a topic made anew"],
)
def test_one_of_other_settings_or_another_topic_is_passed_over_and_left_alone(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    Bench(tmp_path).save(50)
    bench = Bench(tmp_path, **other)
    assert bench.load() is None
    assert bench.skipped("foreign") == 1
    assert Bench(tmp_path, topic="another-clicks").load() is None
    assert Bench(tmp_path).load() == 50


def test_the_newest_are_kept_and_one_below_the_committed_offset_among_them(url: str) -> None:
    bench = Bench(url, keep=2)
    for offset in (10, 20, 30, 40):
        bench.save(offset, committed=offset)
    assert [bench.load(at_most) for at_most in (40, 39, 29)] == [40, 30, None]
    for offset in (50, 60, 70):
        bench.save(offset, committed=45)
    assert [bench.load(at_most) for at_most in (70, 69, 59, 39)] == [70, 60, 40, None]


def test_what_a_killed_process_had_begun_to_write_is_removed_in_time(tmp_path: Path) -> None:
    Bench(tmp_path).save(50)
    (path,) = files(tmp_path)
    fresh, old = (path.with_name(f".{path.name}.{pid}") for pid in (1, 2))
    fresh.write_bytes(b"x")
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    bench = Bench(tmp_path)
    assert bench.load() == 50
    bench.save(60)
    assert (fresh.exists(), old.exists()) == (True, False)


def test_a_place_that_cannot_be_written_to_refuses_to_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"snapshots '.*file' cannot be written to"):
        Bench(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="nowhere"):
        Bench("nowhere://bucket")

    class Broken(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        protocol = "broken"

        def pipe_file(self, *_: object, **__: object) -> None:
            raise OSError("away")

    fsspec.register_implementation("broken", Broken, clobber=True)
    with pytest.raises(DependencyError, match="away"):
        Bench("broken://bucket")


def test_one_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    Bench(tmp_path).save(50)
    (path,) = files(tmp_path)
    path.unlink()
    path.mkdir()
    bench = Bench(tmp_path)
    assert bench.load() is None
    assert bench.skipped("unreadable") == 1


class Keeping:
    """A keeper over one worker, and where it saves."""

    def __init__(self, folder: Path) -> None:
        self.bench = Bench(folder)
        self.worker = SimpleNamespace(state=state_at(50), is_replaying=False, committed=0)
        partitions = SimpleNamespace(workers={0: self.worker})
        self.keeper = SnapshotKeeper(partitions, self.bench.snapshots, self.bench.metrics, 1.0)

    def save_all(self) -> list[int]:
        """Offsets of the snapshots that are there after it."""
        asyncio.run(self.keeper.save_all())
        return [int(path.name[:20]) for path in files(self.bench_folder())]

    def bench_folder(self) -> Path:
        return Path(self.bench.snapshots._root)

    def move(self, next_offset: int, committed: int) -> None:
        self.worker.state, self.worker.committed = state_at(next_offset), committed


def test_a_state_is_saved_when_it_has_moved_and_not_while_it_is_replayed(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path)
    keeping.worker.is_replaying = True
    assert keeping.save_all() == []
    keeping.worker.is_replaying = False
    assert keeping.save_all() == [50]
    (path,) = files(tmp_path)
    path.unlink()
    keeping.move(50, 50)
    assert keeping.save_all() == [], "nothing has moved"
    keeping.move(60, 60)
    assert keeping.save_all() == [60]
    keeping.worker.state = None
    assert keeping.save_all() == [60]


def test_no_further_one_is_taken_before_the_last_one_can_be_used(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path)
    assert keeping.save_all() == [50]
    keeping.move(60, 49)
    assert keeping.save_all() == [50]
    keeping.move(70, 50)
    assert keeping.save_all() == [50, 70]


def test_a_failure_to_write_is_counted_and_the_work_goes_on(tmp_path: Path) -> None:
    keeping = Keeping(tmp_path / "snapshots")
    assert keeping.save_all() == [50]
    folder = keeping.bench_folder() / "00000"
    (whole,) = files(folder)
    data = whole.read_bytes()
    whole.unlink()
    folder.rmdir()
    folder.write_bytes(b"a file where a directory should be")
    keeping.move(60, 60)
    asyncio.run(keeping.keeper.save_all())
    assert keeping.bench.metrics.registry.get_sample_value("streamtower_streams_snapshot_failures_total") == 1
    folder.unlink()
    folder.mkdir()
    whole.write_bytes(data)
    assert keeping.save_all() == [50, 60], "tried again, for it was not saved"


FULL_DISK = """
import resource, signal, sys
from tests.streams.test_snapshot import Bench
bench = Bench(sys.argv[1])
bench.save(50)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
try:
    bench.save(60)
except OSError as error:
    print(error.strerror)
"""


def test_a_disk_that_takes_no_more_leaves_the_one_before_and_nothing_half_written(tmp_path: Path) -> None:
    told = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "File too large"
    assert [path.name[:20] for path in files(tmp_path)] == [f"{50:020d}"]
    assert Bench(tmp_path).load() == 50
