"""The trainer as a process on a real broker and a real index: kill -9, SIGTERM, and how it says why it ended."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Producer
from qdrant_client import QdrantClient

from streams.contract import CANARY_HASH, CANARY_ID, ItemEvent, MicroBatch, Topics, encode_event
from streams.service import EXIT_BUG, EXIT_CONFIGURATION, EXIT_DEPENDENCY, load_settings
from tests.fixtures.kafka import create_topics
from tests.trainer.streams_of_clicks import micro_batch
from trainer.checkpoint import Checkpoints, State
from trainer.contract import collection_name, load_manifest, model_version_of, version_directory
from trainer.index import new_client
from trainer.metrics import Metrics
from trainer.settings import TrainerSettings

pytestmark = [pytest.mark.broker, pytest.mark.index, pytest.mark.slow]
DEADLINE_SECONDS = 90.0
ROWS = 16
SMALL = {
    "item_rows": "4096", "feature_rows": "256", "embedding_dim": "8", "row_dim": "8", "rows_per_step": "8",
    "recent_negatives": "8", "recent_window": "64", "checkpoint_interval_seconds": "0.2",
    "publish_interval_seconds": "0.1", "first_publish_interval_seconds": "1", "metrics_port": "0",
    "features": '{"item": [{"name": "brand", "kind": "categorical"}]}',
}  # fmt: skip


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)
    return found


class Running:
    """One trainer process; its log is read from a file."""

    def __init__(
        self, directory: Path, environment: dict[str, str], command: tuple[str, ...] = ("-m", "trainer")
    ) -> None:
        self._log = directory / f"log-{time.monotonic_ns()}"
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command], env=os.environ | environment, stdout=output, stderr=output
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [event for event in events if event.get("event") == name]

    def wait_ready(self) -> None:
        wait_for(lambda: self.events("ready") or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        return self._log.read_text()

    def metric(self, name: str) -> float:
        url = self.events("listening")[0]["metrics"]
        with urllib.request.urlopen(url, timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(f"streamtower_trainer_{name} "):
                    return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


class Bench:
    """Topics, index and directories of one test, and the trainers started on them."""

    def __init__(self, kafka: str, topics: Topics, qdrant_url: str, alias: str, directory: Path) -> None:
        self.topics, self.alias, self.directory = topics, alias, directory
        self.settings = SMALL | {
            "kafka": kafka,
            "topic_prefix": topics.prefix,
            "qdrant": qdrant_url,
            "alias": alias,
            "model_dir": str(directory / "models"),
            "checkpoint_dir": str(directory / "checkpoints"),
        }
        self.running: list[Running] = []
        self.producer = Producer({"bootstrap.servers": kafka, "acks": "all"})
        self.client: QdrantClient = new_client(qdrant_url, None, 10)

    def start(self, **settings: str) -> Running:
        values = self.settings | settings
        environment = {f"STREAMTOWER_TRAINER_{name.upper()}": value for name, value in values.items()}
        self.running.append(Running(self.directory, environment))
        return self.running[-1]

    def send(self, batch: MicroBatch) -> None:
        self.producer.produce(self.topics.micro_batches, batch.encode(), partition=batch.partition)
        assert self.producer.flush(DEADLINE_SECONDS) == 0

    def checkpoint(self) -> State:
        settings = load_settings(TrainerSettings, {}, **self.settings)
        checkpoints = Checkpoints(settings.checkpoint_dir, settings.identity(), Metrics())
        state = checkpoints.load()
        checkpoints.close()
        assert state is not None
        return state

    def versions(self) -> list[int]:
        names = [collection.name for collection in self.client.get_collections().collections]
        return sorted(version for name in names if (version := model_version_of(self.alias, name)) is not None)

    def live_version(self) -> int:
        (name,) = (a.collection_name for a in self.client.get_aliases().aliases if a.alias_name == self.alias)
        version = model_version_of(self.alias, name)
        assert version is not None
        return version

    def served(self) -> set[str]:
        if self.alias not in {entry.alias_name for entry in self.client.get_aliases().aliases}:
            return set()
        records, _ = self.client.scroll(self.alias, limit=10_000)
        return {record.payload["item_id"] for record in records if record.payload}


@pytest.fixture
def bench(kafka: str, topics: Topics, qdrant_url: str, alias: str, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(kafka, topics, qdrant_url, alias, tmp_path)
    yield made
    for running in made.running:
        running.process.kill()
        running.process.wait()
    made.client.close()


def unique_clicks(number: int, partition: int) -> MicroBatch:
    """Each click on an item of its own, so that the items' counts are a ledger of clicks."""
    first = number * ROWS
    items = [f"p{partition}-{offset}" for offset in range(first, first + ROWS)]
    return micro_batch(items, partition=partition, first_offset=first, ingest_time=time.time())


def test_killed_again_and_again_it_learns_every_click_exactly_once(bench: Bench) -> None:
    sent = 0
    for life in range(4):
        running = bench.start()
        running.wait_ready()
        for _ in range(30):
            bench.send(unique_clicks(sent, 0))
            bench.send(unique_clicks(sent, 1))
            if sent % 5 == 4:  # what streams does after a crash of its own
                bench.send(unique_clicks(sent - 2, 0))
            sent += 1
        if life < 3:
            wait_for(lambda r=running: r.metric("clicks_learnt_total") > 0 and r.events("checkpoint"))
            running.end(signal.SIGKILL)
    clicks = {f"p{partition}-{offset}" for partition in (0, 1) for offset in range(sent * ROWS)}
    wait_for(lambda: running.metric("consumer_lag_messages") == 0 and len(bench.served()) == len(clicks))
    assert bench.served() == clicks
    assert running.end() == 0
    state = bench.checkpoint()
    assert state.progress.learnt == {0: sent * ROWS, 1: sent * ROWS}
    assert state.progress.clicks_learnt == len(clicks)
    item_id, num_clicks = (state.model[f"catalogue.{name}"] for name in ("item_id", "num_clicks"))
    counts = dict(zip(item_id, num_clicks.tolist(), strict=True))
    assert counts == dict.fromkeys(clicks, 1)


def test_told_to_stop_it_saves_everything_and_the_next_life_begins_there(bench: Bench) -> None:
    for name in ("with features", "gone"):
        value = encode_event(ItemEvent(name, {"brand": "x"}, {"title": name}))
        bench.producer.produce(bench.topics.items, value, name)
    bench.producer.produce(bench.topics.items, None, "gone")
    running = bench.start(checkpoint_interval_seconds="80000")
    running.wait_ready()
    for number in range(10):
        bench.send(unique_clicks(number, 0))
    wait_for(lambda: running.metric("clicks_learnt_total") == 10 * ROWS and len(bench.served()) == 10 * ROWS + 1)
    wait_for(lambda: running.metric("click_to_servable_seconds_count") == 10 * ROWS)
    version = running.metric("index_version")
    # The first, before any click: to copy all tables later would hold up clicks.
    assert [event["clicks_learnt"] for event in running.events("checkpoint")] == [0]
    assert running.end() == 0
    state = bench.checkpoint()
    assert state.progress.learnt == {0: 10 * ROWS} and state.progress.clicks_learnt == 10 * ROWS
    assert "with features" in bench.served() and "gone" not in bench.served()

    running = bench.start()
    running.wait_ready()
    assert running.events("ready")[0]["clicks_learnt"] == 10 * ROWS
    wait_for(lambda: running.metric("index_version") > version)
    live = int(running.metric("index_version"))
    manifest = load_manifest(version_directory(bench.directory / "models", live))
    assert manifest.source_offsets == {0: 10 * ROWS} and manifest.num_items == 10 * ROWS + 1
    assert running.metric("clicks_learnt_total") == 0
    assert running.end(signal.SIGINT) == 0


def test_rolled_back_it_publishes_again_what_it_learns_after_the_clicks_that_spoilt_it(bench: Bench) -> None:
    running = bench.start(guard="rollback")
    running.wait_ready()
    bench.send(unique_clicks(0, 0))
    wait_for(lambda: running.metric("checkpoint_timestamp_seconds") and bench.served() >= {"p0-0"})
    wait_for(lambda: len(bench.served()) == ROWS)
    wait_for(lambda: any(event["clicks_learnt"] == ROWS for event in running.events("checkpoint")))
    bench.send(dataclasses.replace(unique_clicks(1, 0), reward=np.full(ROWS, 3e38, np.float32)))
    wait_for(lambda: running.events("rolled back"))
    bench.send(unique_clicks(2, 0))
    clicks = {f"p0-{offset}" for offset in [*range(ROWS), *range(2 * ROWS, 3 * ROWS)]}
    wait_for(lambda: bench.served() == clicks)
    assert running.metric("publishing_held") == 0 and running.metric("rollbacks_total") == 1
    assert running.metric("clicks_passed_over_total") == ROWS
    assert running.end() == 0
    progress = bench.checkpoint().progress
    assert (progress.learnt, progress.clicks_learnt) == ({0: 3 * ROWS}, 2 * ROWS)


def test_killed_while_it_publishes_it_leaves_the_served_version_and_cleans_up_at_the_next_start(bench: Bench) -> None:
    for number in range(20):
        bench.send(unique_clicks(number, 0))
    # A call for every point: long enough a publish to be killed in its middle. No deltas.
    running = bench.start(publish_batch_points="1", publish_interval_seconds="3600", canary_queries="0")
    running.wait_ready()
    wait_for(lambda: len(bench.served()) == 20 * ROWS)

    def being_filled() -> int | None:
        versions = bench.versions()
        newer = [version for version in versions if version > bench.live_version()]
        return newer[0] if newer and bench.client.count(collection_name(bench.alias, newer[0])).count else None

    unfinished = wait_for(being_filled)
    running.end(signal.SIGKILL)
    live = bench.live_version()
    assert live < unfinished and unfinished in bench.versions()
    assert 0 < bench.client.count(collection_name(bench.alias, unfinished)).count < 20 * ROWS
    assert len(bench.served()) == 20 * ROWS
    assert not version_directory(bench.directory / "models", unfinished).exists()
    running = bench.start()
    running.wait_ready()
    wait_for(lambda: running.metric("index_version") > unfinished)
    assert unfinished not in bench.versions() and len(bench.served()) == 20 * ROWS
    assert running.end() == 0


def test_canaries_are_shown_and_learnt_nowhere(bench: Bench) -> None:
    running = bench.start()
    running.wait_ready()
    bench.send(unique_clicks(0, 0))
    canary = micro_batch([CANARY_ID] * ROWS, first_offset=ROWS, ingest_time=time.time())
    bench.send(dataclasses.replace(canary, event_time=np.full(ROWS, 77.5)))
    bench.send(unique_clicks(2, 0))
    wait_for(lambda: len(bench.served()) == 2 * ROWS + 1)
    (point,) = bench.client.retrieve(bench.alias, [CANARY_HASH])
    assert point.payload is not None and point.payload["event_time"] == 77.5
    assert running.end() == 0
    state = bench.checkpoint()
    assert state.progress.learnt == {0: 3 * ROWS} and state.progress.clicks_learnt == 2 * ROWS
    assert CANARY_ID not in state.model["catalogue.item_id"]


def test_a_record_that_breaks_the_contract_ends_it_as_a_bug(bench: Bench) -> None:
    bench.send(unique_clicks(0, 0))
    bench.producer.produce(bench.topics.micro_batches, b"nonsense", partition=0)
    assert bench.producer.flush(DEADLINE_SECONDS) == 0
    running = bench.start()
    assert running.process.wait(DEADLINE_SECONDS) == EXIT_BUG
    assert "BrokenRecordError" in running.log() and "micro-batches[0]@1" in running.log()


def test_without_kafka_it_ends_as_a_missing_dependency(bench: Bench) -> None:
    running = bench.start(kafka="127.0.0.1:9", kafka_deadline_seconds="0.5")
    assert running.process.wait(DEADLINE_SECONDS) == EXIT_DEPENDENCY
    assert running.events("kafka is away")


def test_started_before_its_broker_it_waits_for_it_and_its_topics(bench: Bench) -> None:
    broker_module = pytest.importorskip("streamtower.dev.broker", reason="the extra `embedded` is not installed")
    port = broker_module.free_port()
    running = bench.start(kafka=f"127.0.0.1:{port}", topic_prefix="")
    wait_for(lambda: running.events("waiting for kafka"))
    with broker_module.LocalBroker(port=port) as broker:
        topics = Topics()
        create_topics(broker.bootstrap, {topics.clicks: {}, topics.micro_batches: {}, topics.items: {}})
        running.wait_ready()
        assert running.end() == 0


def test_told_to_stop_while_it_waits_for_kafka_it_stops(bench: Bench) -> None:
    running = bench.start(kafka="127.0.0.1:9", kafka_deadline_seconds="600")
    wait_for(lambda: running.events("waiting for kafka"))
    assert running.end() == 0


def test_without_the_index_it_learns_all_the_same(bench: Bench) -> None:
    running = bench.start(qdrant="http://127.0.0.1:9", qdrant_attempts="2")
    running.wait_ready()
    bench.send(unique_clicks(0, 0))
    wait_for(lambda: running.metric("clicks_learnt_total") == ROWS and running.events("publish failed"))
    assert running.end() == 0
    assert bench.checkpoint().progress.clicks_learnt == ROWS


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"item_rows": "1000"}, "item_rows must be a power of two"),
        ({"itemrows": "1000"}, "STREAMTOWER_TRAINER_ITEMROWS: no such setting"),
        ({"model_dir": "/dev/null/models"}, "STREAMTOWER_TRAINER_MODEL_DIR"),
        ({"checkpoint_dir": "/dev/null/checkpoints"}, "STREAMTOWER_TRAINER_CHECKPOINT_DIR"),
        ({"metrics_host": "192.0.2.1"}, "STREAMTOWER_TRAINER_METRICS_PORT"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(bench: Bench, settings: dict[str, str], says: str) -> None:
    running = bench.start(**settings)
    assert running.process.wait(DEADLINE_SECONDS) == EXIT_CONFIGURATION
    assert "trainer cannot start:" in running.log() and says in running.log()


def test_a_checkpoint_of_other_settings_is_refused(bench: Bench) -> None:
    running = bench.start()
    running.wait_ready()
    assert running.end() == 0
    running = bench.start(seed="1")
    assert running.process.wait(DEADLINE_SECONDS) == EXIT_CONFIGURATION
    assert "seed: 0 there, 1 here" in running.log()


def test_settings_are_judged_before_torch_is_loaded() -> None:
    code = "import sys, trainer.__main__; print(*({'torch', 'confluent_kafka', 'qdrant_client'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_help_lists_every_setting_with_its_meaning() -> None:
    done = subprocess.run([sys.executable, "-m", "trainer", "--help"], capture_output=True, text=True, check=True)
    for name in TrainerSettings.model_fields:
        assert f"STREAMTOWER_TRAINER_{name.upper()} " in done.stdout
    assert "Size of query and item embeddings." in done.stdout
