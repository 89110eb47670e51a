"""Checkpoints: whole or passed over, bound to their settings, and as good as never having stopped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.checkpoints import fingerprint
from tests.trainer.small_trainer import CONFIG, IDENTITY, Trainer
from tests.trainer.streams_of_clicks import click_stream
from trainer.checkpoint import CheckpointError, Checkpoints, State
from trainer.columns import Kept
from trainer.item_events import ItemChange
from trainer.metrics import Metrics
from trainer.progress import Positions, Progress


def new_checkpoints(directory: Path, **values: object) -> Checkpoints:
    return Checkpoints(directory, values.pop("identity", IDENTITY), Metrics(), **values)  # type: ignore[arg-type]


def write(directory: Path, steps: list[int], **values: object) -> None:
    trainer = Trainer(directory / "unused", click_stream(3))
    trainer.run()
    shutil.rmtree(directory / "unused")
    checkpoints = new_checkpoints(directory, **values)
    for step in steps:
        trainer.progress.step = step
        assert checkpoints.finish(trainer.progress, trainer.model) == trainer.progress
    checkpoints.close()


def load(directory: Path, **values: object) -> State | None:
    checkpoints = new_checkpoints(directory, **values)
    try:
        return checkpoints.load()
    finally:
        checkpoints.close()


def test_there_is_nothing_to_load_in_a_new_directory(tmp_path: Path) -> None:
    assert load(tmp_path / "new") is None


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    changes = [ItemChange("item-1", {"brand": "a", "price": 3.5}, b'{"title": "One"}'), ItemChange("item-2", gone=True)]
    trainer = Trainer(tmp_path, [*click_stream(4), changes, *click_stream(2, partition=1)])
    trainer.run()
    state = load(tmp_path)
    assert state is not None
    assert state.progress == trainer.progress
    assert state.progress.learnt == {0: 64, 1: 32}
    assert state.progress.positions == Positions({0: 4, 1: 2}, {0: 1})
    assert fingerprint(state.progress, state.model) == fingerprint(trainer.progress, trainer.model.state_dict())


def test_a_checkpoint_is_a_copy_of_the_moment_it_was_taken(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "unused", click_stream(2))
    trainer.run()
    before = fingerprint(trainer.progress, trainer.model.state_dict())
    checkpoints = new_checkpoints(tmp_path)
    checkpoints.save(trainer.progress, trainer.model)
    for tensor in trainer.learner.state_dict().values():
        tensor.zero_()
    trainer.catalogue.take([ItemChange("item-1", {"brand": "z"}, b"{}"), ItemChange("new")], 99)
    trainer.progress.learnt[0] = 99
    checkpoints.collect(wait=True)
    checkpoints.close()
    state = load(tmp_path)
    assert state is not None and fingerprint(state.progress, state.model) == before


TURNS = st.lists(st.sampled_from(["learn", "learn", "items", "save", "fail", "restart"]), max_size=14)


@settings(max_examples=20, deadline=None)
@given(TURNS, st.sampled_from([{"max_items": 25}, {}, {"admit_clicks": 2}, {"expire_clicks": 48, "admit_clicks": 2}]))
def test_whatever_came_between_two_checkpoints_the_newest_is_what_there_was(
    turns: list[str], bounds: dict[str, int]
) -> None:
    batches = iter(click_stream(20, num_items=200))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), **bounds)  # type: ignore[arg-type]
        saved = None
        for number, turn in enumerate([*turns, "save", "restart"], 1):
            trainer.progress.step = number
            if turn == "learn":
                trainer.model.learn(next(batches), number)
            elif turn == "items":
                gone = [ItemChange(f"item-{number + 100}", gone=True)] if number % 2 else []
                changes = [ItemChange(f"item-{n * number}", {"brand": "b" * n}, b"{}") for n in range(3)]
                trainer.model.take([*changes, *gone], number)
            elif turn == "restart":
                trainer.checkpoints.close()
                trainer = Trainer(Path(folder), **bounds)  # type: ignore[arg-type]
                assert fingerprint(trainer.progress, trainer.model.state_dict()) == saved or saved is None
            else:
                newest = max((int(path.name[1:13]) for path in Path(folder).glob("c*")), default=0)
                blocks = [Path(folder) / f".c{newest + 1:012d}{on}" for on in ("", *[f"-{n:012d}" for n in range(20)])]
                for path in blocks if turn == "fail" else []:
                    path.touch()
                written = trainer.checkpoints.finish(trainer.progress, trainer.model)
                assert (written is None) == (turn == "fail")
                for path in blocks:
                    path.unlink(missing_ok=True)
                if written:
                    saved = fingerprint(trainer.progress, trainer.model.state_dict())
        trainer.checkpoints.close()


def test_a_checkpoint_holds_the_rows_that_changed_and_a_full_one_comes_when_they_are_a_quarter(tmp_path: Path) -> None:
    checkpoints = new_checkpoints(tmp_path, keep=100)
    trainer = Trainer(tmp_path / "unused", click_stream(1))
    trainer.run()
    for number, batch in enumerate(click_stream(12, seed=1), 1):
        trainer.progress.step = number
        trainer.model.learn(batch, number)
        assert checkpoints.finish(trainer.progress, trainer.model)
    checkpoints.close()
    names = sorted(path.name for path in tmp_path.glob("c*"))
    assert names[0] == "c000000000001" and "-" in names[1]
    sizes = {name: Kept.read(tmp_path / name / "columns.safetensors").num_bytes for name in names}
    full = [name for name in names if "-" not in name]
    assert len(full) >= 2
    for name in names:
        below = [size for other, size in sizes.items() if other == f"c{name[14:]}"]
        assert all(sizes[name] <= size / 4 for size in below)
    rows = Kept.read(tmp_path / names[1] / "columns.safetensors").rows
    touched = trainer.catalogue.find(click_stream(2, seed=1)[1].item_hash)
    assert set(touched.tolist()) <= set(rows["catalogue"].tolist())
    assert 0 < len(rows["tables.items"]) < 100 < CONFIG.item_rows


def test_a_restarted_trainer_saves_its_changes_on_top_of_what_it_has_loaded(tmp_path: Path) -> None:
    for number, batch in enumerate(click_stream(3, rows=8)):
        trainer = Trainer(tmp_path)
        trainer.model.learn(batch, number)
        trainer.progress.step = number
        assert trainer.checkpoints.finish(trainer.progress, trainer.model)
        trainer.checkpoints.close()
    names = sorted(path.name for path in tmp_path.glob("c*"))
    assert names == ["c000000000001", *[f"c00000000000{n}-000000000001" for n in (2, 3)]]
    state = load(tmp_path)
    assert state is not None
    assert fingerprint(state.progress, state.model) == fingerprint(trainer.progress, trainer.model.state_dict())


def test_if_a_full_one_is_damaged_the_full_one_before_it_is_taken(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "unused", click_stream(3))
    trainer.run()
    for _ in range(2):
        checkpoints = new_checkpoints(tmp_path)
        for _ in range(5):
            trainer.progress.step += 1
            assert checkpoints.finish(trainer.progress, trainer.model)
        checkpoints.close()
    names = sorted(path.name for path in tmp_path.glob("c*"))
    on = "-000000000006"
    assert names == ["c000000000001", "c000000000006", *[f"c{n:012d}{on}" for n in (8, 9, 10)]]
    path = tmp_path / "c000000000006" / "columns.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    state = load(tmp_path)
    assert state is not None and state.progress.step == trainer.progress.step - 9


def test_changes_are_read_on_no_other_full_one_than_theirs(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    write(tmp_path / "other", [3])
    shutil.rmtree(tmp_path / "c000000000001")
    (tmp_path / "other" / "c000000000001").rename(tmp_path / "c000000000001")
    state = load(tmp_path)
    assert state is not None and state.progress.step == 3


def test_a_checkpoint_of_an_earlier_format_is_refused_as_that(tmp_path: Path) -> None:
    write(tmp_path, [1])
    path = tmp_path / "c000000000001" / "manifest.json"
    plain = msgspec.json.decode(path.read_bytes())
    del plain["base"]
    plain |= {"format": 3, "checksum": ""}
    plain["checksum"] = xxhash.xxh3_128_hexdigest(msgspec.json.encode(plain))
    path.write_bytes(msgspec.json.encode(plain))
    with pytest.raises(CheckpointError, match="has format 3; this code reads 5: move the directory away"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "emptied"])
def test_whatever_file_is_damaged_the_checkpoint_before_is_loaded(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "whole", [1, 2])
    names = sorted(path.name for path in (tmp_path / "whole" / "c000000000002-000000000001").iterdir())
    assert names == ["columns.safetensors", "manifest.json", "progress.json"]
    for name in names:
        directory = tmp_path / name
        shutil.copytree(tmp_path / "whole", directory)
        path = directory / "c000000000002-000000000001" / name
        data = bytearray(path.read_bytes())
        if damage == "truncated":
            path.write_bytes(data[:-1])
        elif damage == "one bit":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        elif damage == "missing":
            path.unlink()
        else:
            path.write_bytes(b"")
        state = load(directory)
        assert state is not None and state.progress.step == 1, name


def test_a_manifest_nested_too_deep_to_be_read_is_torn(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    (tmp_path / "c000000000002-000000000001" / "manifest.json").write_bytes(b'{"identity":{"a":' + b"[" * 100_000)
    state = load(tmp_path)
    assert state is not None and state.progress.step == 1


def test_a_directory_in_which_nothing_is_whole_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    for path in tmp_path.glob("c*/progress.json"):
        path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        load(tmp_path)


def test_what_an_interrupted_write_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    (tmp_path / "c000000000002-000000000001").rename(tmp_path / ".c000000000002-000000000001")
    state = load(tmp_path)
    assert state is not None and state.progress.step == 1
    assert [path.name for path in sorted(tmp_path.glob("*c0*"))] == ["c000000000001"]


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    write(tmp_path, [1])
    other = {"towers": {**IDENTITY["towers"], "embedding_dim": 16}, "seed": 4}  # type: ignore[dict-item]
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, identity=other)
    assert "towers.embedding_dim: 8 there, 16 here" in str(caught.value)
    assert "seed: 3 there, 4 here" in str(caught.value)
    assert "item_rows" not in str(caught.value)
    assert load(tmp_path) is not None


def test_only_the_newest_stay(tmp_path: Path) -> None:
    write(tmp_path, [1, 2, 3, 4, 5], keep=2)
    on = "-000000000001"
    assert sorted(path.name for path in tmp_path.glob("c*")) == [
        "c000000000001",
        *[f"c00000000000{n}{on}" for n in (4, 5)],
    ]
    state = load(tmp_path)
    assert state is not None and state.progress.step == 5


def test_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    write(tmp_path, [3])
    assert sorted(path.name for path in tmp_path.glob("c*"))[-1] == "c000000000003"


def test_two_trainers_cannot_use_one_directory(tmp_path: Path) -> None:
    first = new_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="another trainer"):
        new_checkpoints(tmp_path)
    first.close()
    new_checkpoints(tmp_path).close()


def test_a_checkpoint_that_cannot_be_written_is_counted_and_leaves_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, [1])
    metrics = Metrics()
    checkpoints = Checkpoints(tmp_path, IDENTITY, metrics)
    (tmp_path / ".c000000000002").write_text("in the way")
    state = checkpoints.load()
    assert state is not None
    trainer = Trainer(tmp_path / "other", click_stream(1))
    trainer.run()
    assert checkpoints.finish(Progress(step=2), trainer.model) is None
    checkpoints.close()
    assert metrics.registry.get_sample_value("streamtower_trainer_checkpoint_failures_total") == 1
    again = load(tmp_path)
    assert again is not None and again.progress.step == 1


def test_the_time_for_which_learning_stops_is_measured(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, click_stream(2), interval=0.0)
    trainer.run()
    saved = trainer.value("checkpoint_seconds_count")
    assert saved >= 1 and trainer.value("checkpoint_pause_seconds_count") == saved
    assert (
        0
        < trainer.value("checkpoint_pause_seconds_sum")
        < trainer.value("stage_seconds_total", stage="checkpoint") + (trainer.value("checkpoint_seconds_sum"))
    )


TROUBLE = """
import os, resource, signal, sys
from pathlib import Path
from tests.fuzz.checkpoints import fingerprint
from tests.trainer.small_trainer import IDENTITY, Trainer
from tests.trainer.streams_of_clicks import click_stream
from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.metrics import Metrics
folder, trouble = Path(sys.argv[1]), sys.argv[2]
trainer = Trainer(folder / "c", click_stream(3))
trainer.run()
trainer.checkpoints = Checkpoints(folder / "c", IDENTITY, trainer.metrics)
if trouble == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000))
else:
    (folder / "c").chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65_534)
trainer.progress.step = 77
print(trainer.checkpoints.finish(trainer.progress, trainer.model), trainer.value("checkpoint_failures_total"))
trainer.checkpoints.close()
if trouble != "full":
    try:
        Checkpoints(folder / "c", IDENTITY, trainer.metrics)
    except CheckpointError as error:
        print(error)
    if os.getuid() == 0:
        os.seteuid(0)
    (folder / "c").chmod(0o755)
again = Checkpoints(folder / "c", IDENTITY, trainer.metrics)
print(sorted(path.name for path in (folder / "c").iterdir() if path.name != "lock"), again.load().progress.step)
again.close()
"""


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_a_disk_that_takes_nothing_leaves_the_one_before_and_nothing_half_written(trouble: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # for a user without rights, where the test runs as root
        command = [sys.executable, "-c", TROUBLE, folder, trouble]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if not line.startswith("20")]
    assert told[0] == "None 1.0" and told[-1] == "['c000000000001', 'c000000000002'] 3"
    assert ("File too large" if trouble == "full" else "Permission denied") in done.stdout + done.stderr
    if trouble == "read-only":
        assert "c cannot be written to" in told[1]


def test_a_clock_that_jumps_back_changes_neither_the_order_nor_the_times_of_checkpoints(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "unused", click_stream(1))
    trainer.run()
    clock, rising = iter([1_000_000.0, 3.0]), [0.0]
    checkpoints = new_checkpoints(tmp_path, interval_seconds=30.0, clock=lambda: next(clock), rising=lambda: rising[0])
    for step in (1, 2):
        trainer.progress.step = step
        assert checkpoints.due  # the first at once
        assert checkpoints.finish(trainer.progress, trainer.model)
        assert not checkpoints.due
        rising[0] += 30.0
    checkpoints.close()
    state = load(tmp_path)
    assert state is not None and state.progress.step == 2
