"""Checkpoints: whole or passed over, bound to their settings, and as good as never having stopped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.small_trainer import IDENTITY, Trainer
from tests.trainer.streams_of_clicks import click_stream
from trainer.checkpoint import CheckpointError, Checkpoints, State
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
        assert checkpoints.finish(trainer.progress, trainer.learner, trainer.catalogue) == trainer.progress
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
    wanted = trainer.learner.state_dict()
    assert state.learner.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state.learner[name], tensor) and state.learner[name].dtype == tensor.dtype, name
    for name, column in trainer.catalogue.state_dict().items():
        found = state.catalogue[name]
        if name == "features":
            assert found.keys() == column.keys()
            for key, array in column.items():
                np.testing.assert_array_equal(found[key], array)
        else:
            np.testing.assert_array_equal(found, column, err_msg=name)


def test_a_checkpoint_is_a_copy_of_the_moment_it_was_taken(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "unused", click_stream(2))
    trainer.run()
    before = {name: tensor.clone() for name, tensor in trainer.learner.state_dict().items()}
    checkpoints = new_checkpoints(tmp_path)
    checkpoints.save(trainer.progress, trainer.learner, trainer.catalogue)
    for tensor in trainer.learner.state_dict().values():
        tensor.zero_()
    trainer.progress.learnt[0] = 99
    checkpoints.collect(wait=True)
    checkpoints.close()
    state = load(tmp_path)
    assert state is not None and state.progress.learnt == {0: 32}
    assert all(torch.equal(state.learner[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "emptied"])
def test_whatever_file_is_damaged_the_checkpoint_before_is_loaded(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "whole", [1, 2])
    names = sorted(path.name for path in (tmp_path / "whole" / "c000000000002").iterdir())
    assert names == [
        "catalogue.arrow",
        "features.safetensors",
        "manifest.json",
        "model.safetensors",
        "progress.json",
        "scoring.safetensors",
    ]
    for name in names:
        directory = tmp_path / name
        shutil.copytree(tmp_path / "whole", directory)
        path = directory / "c000000000002" / name
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


def test_a_directory_in_which_nothing_is_whole_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    for path in tmp_path.glob("c*/progress.json"):
        path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        load(tmp_path)


def test_what_an_interrupted_write_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    write(tmp_path, [1, 2])
    (tmp_path / "c000000000002").rename(tmp_path / ".c000000000002")
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
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["c000000000004", "c000000000005"]
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
    assert checkpoints.finish(Progress(step=2), trainer.learner, trainer.catalogue) is None
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
state = (trainer.progress, trainer.learner, trainer.catalogue, trainer.model.scoring_state())
print(trainer.checkpoints.finish(*state), trainer.value("checkpoint_failures_total"))
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
print([path.name for path in (folder / "c").iterdir() if path.name != "lock"], again.load().progress.step)
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
    assert told[0] == "None 1.0" and told[-1] == "['c000000000001'] 3"
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
        assert not checkpoints.due
        rising[0] += 30.0
        assert checkpoints.due
        assert checkpoints.finish(trainer.progress, trainer.learner, trainer.catalogue)
    checkpoints.close()
    state = load(tmp_path)
    assert state is not None and state.progress.step == 2
