"""`streamtower replay`: where it begins, what it refuses, and a new model that takes over."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from confluent_kafka import Producer

from streams.contract import Topics
from streamtower.retraining import find_offsets, problem_of_directories
from streamtower.topics import BrokerAwayError
from tests.trainer.test_trainer_process import ROWS, Bench, Running, bench, unique_clicks, wait_for
from trainer.contract import load_manifest, version_directory

assert bench  # a fixture
NOWHERE = {"bootstrap.servers": "127.0.0.1:1"}


@pytest.mark.parametrize(
    ("begin", "offsets"), [("beginning", {}), ("0:12", {0: 12}), ("0:12,3:0", {0: 12, 3: 0})], ids=str
)
def test_offsets_are_given_as_they_are(begin: str, offsets: dict[int, int]) -> None:
    assert find_offsets(begin, NOWHERE, Topics()) == offsets


@pytest.mark.parametrize("text", ['{"0": 5, "1": 0}', '{"model_version": 7, "source_offsets": {"0": 5, "1": 0}}'])
def test_a_file_is_offsets_or_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    assert find_offsets(str(tmp_path / "file.json"), NOWHERE, Topics()) == {0: 5, 1: 0}


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', '{"0": -1}', '{"0": 1.5}'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"file\.json"):
        find_offsets(str(tmp_path / "file.json"), NOWHERE, Topics())


@pytest.mark.parametrize("begin", ["", "yesterday", "0", "0:1,2", "0:-1", "0:1:2"])
def test_what_is_no_beginning_is_refused(begin: str) -> None:
    with pytest.raises(ValueError, match="is no time, no list"):
        find_offsets(begin, NOWHERE, Topics())


def test_a_time_needs_a_broker() -> None:
    with pytest.raises(BrokerAwayError, match=r"127\.0\.0\.1:1"):
        find_offsets("2026-01-01", NOWHERE, Topics(), 0.3)


def test_the_trainer_so_far_must_have_ended_and_have_another_directory(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert problem_of_directories(old, new) is None
    assert "give another --checkpoint-dir" in str(problem_of_directories(old, tmp_path / "new" / ".." / "old"))
    old.mkdir()
    with (old / "lock").open("w") as lock:
        assert problem_of_directories(old, new) is None
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "still runs: stop it first" in str(problem_of_directories(old, new))
    assert problem_of_directories(old, new) is None


@pytest.mark.broker
def test_a_time_is_the_first_click_that_came_in_at_or_after_it(apache_kafka: str) -> None:
    from tests.fixtures.kafka import topics_on

    with topics_on(apache_kafka) as topics:
        producer = Producer({"bootstrap.servers": apache_kafka})
        start = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
        for minute in range(5):
            moment = int((start + timedelta(minutes=minute)).timestamp() * 1000)
            producer.produce(topics.clicks, b"{}", partition=0, timestamp=moment)
            assert producer.flush(30) == 0
        config = {"bootstrap.servers": apache_kafka}
        for minute, offset in ((-1, 0), (0, 0), (1.5, 2), (4, 4), (9, 5)):
            begin = (start + timedelta(minutes=minute)).isoformat()
            assert find_offsets(begin, config, topics) == {0: offset, 1: 0}


@pytest.fixture
def ended(bench: Bench) -> Iterator[Bench]:
    """A bench on which a trainer has learnt 60 micro-batches, published them and ended."""
    running = bench.start()
    running.wait_ready()
    for number in range(60):
        bench.send(unique_clicks(number, 0))
    wait_for(lambda: len(bench.served()) == 60 * ROWS)
    assert running.end() == 0
    yield bench


def replay(bench: Bench, *arguments: str) -> Running:
    """The command, with the settings of the trainer so far."""
    environment = {f"STREAMTOWER_TRAINER_{name.upper()}": value for name, value in bench.settings.items()}
    command = ("-m", "streamtower", "replay", *arguments)
    bench.running.append(Running(bench.directory, environment, command))
    return bench.running[-1]


@pytest.mark.broker
@pytest.mark.index
@pytest.mark.slow
def test_a_replayed_model_takes_over_once_it_has_caught_up_and_follows_the_live_clicks(ended: Bench) -> None:
    versions = ended.directory / "models"
    before = max(int(path.name[1:]) for path in versions.glob("v[0-9]*"))
    running = replay(ended, "--from", f"0:{40 * ROWS}", "--checkpoint-dir", str(ended.directory / "replayed"))
    running.wait_ready()
    wait_for(lambda: running.events("published"))
    first = running.events("published")[0]["model_version"]
    manifest = load_manifest(version_directory(versions, first))
    assert first == before + 1
    # Not a part of the past was published, and nothing from before its beginning learnt.
    assert manifest.source_offsets == {0: 60 * ROWS} and manifest.num_items == 20 * ROWS
    assert running.metric("rows_already_learnt_total") == 40 * ROWS
    ended.send(unique_clicks(60, 0))
    wait_for(lambda: ended.served() == {f"p0-{offset}" for offset in range(40 * ROWS, 61 * ROWS)})
    assert running.end() == 0


@pytest.mark.broker
@pytest.mark.index
@pytest.mark.slow
def test_it_is_refused_beside_the_trainer_so_far(bench: Bench) -> None:
    running = bench.start()
    running.wait_ready()
    refused = replay(bench, "--from", "beginning", "--checkpoint-dir", str(bench.directory / "replayed"))
    assert refused.process.wait(60) == 1
    assert "still runs: stop it first" in refused.log()
    assert running.end() == 0


def test_bad_settings_and_beginnings_are_refused(tmp_path: Path) -> None:
    def run(begin: str, **environment: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "streamtower", "replay", "--from", begin, "--checkpoint-dir", str(tmp_path)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"} | environment
        )
        return done.returncode, done.stderr

    code, said = run("yesterday")
    assert code == 2 and "is no time" in said
    code, said = run("beginning", STREAMTOWER_TRAINER_SEED="-1")
    assert code == 78 and "STREAMTOWER_TRAINER_SEED" in said
