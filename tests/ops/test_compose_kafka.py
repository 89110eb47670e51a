"""Apache Kafka itself, started with the broker settings of docker-compose.yml, and the topics made by its command.

Only the addresses are others: the container's names and ports stand for 127.0.0.1 and free ports here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource

from streams.contract import Topics
from tests.fixtures.kafka import MAX_MESSAGE_BYTES

Compose = dict[str, Any]
READY_SECONDS = 60.0
OF_THE_IMAGE = ("KAFKA_HEAP_OPTS",)
"""Read by the image's scripts; no property of the broker."""


@dataclass(frozen=True)
class Broker:
    properties: dict[str, str]
    """As Compose gives them, with this machine's addresses."""
    ports: dict[str, int]
    """By the listener's name."""


@pytest.fixture(scope="module")
def broker(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    if not (home := os.environ.get("STREAMTOWER_KAFKA_HOME")):
        pytest.skip("STREAMTOWER_KAFKA_HOME is unset: no Apache Kafka to start here")
    from streamtower.dev.broker import free_port
    from streamtower.processes import ChildProcess, end_all

    folder = tmp_path_factory.mktemp("kafka")
    environment = compose["services"]["kafka"]["environment"]
    properties = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): value
        for name, value in environment.items()
        if name.startswith("KAFKA_") and name not in OF_THE_IMAGE
    }
    ports = {entry.split("://")[0]: free_port() for entry in properties["listeners"].split(",")}
    properties["listeners"] = ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items())
    properties["advertised.listeners"] = ",".join(
        f"{name}://127.0.0.1:{ports[name]}"
        for name in (entry.split("://")[0] for entry in properties["advertised.listeners"].split(","))
    )
    properties["controller.quorum.voters"] = f"1@127.0.0.1:{ports['CONTROLLER']}"
    properties["log.dirs"] = str(folder / "data")
    process = ChildProcess(
        "Apache Kafka",
        [
            str(Path(home).resolve() / "kafka-server"),
            str(folder),
            str(ports["EXTERNAL"]),
            *(f"{name}={value}" for name, value in properties.items()),
        ],
        folder / "output",
        {"KAFKA_HEAP": "512m"},
    )
    try:
        _wait_ready(process, folder / "server.log")
        yield Broker(properties, ports)
    finally:
        end_all([process], 20)


def _wait_ready(process: Any, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not (log.exists() and "Kafka Server started" in log.read_text(errors="replace")):
        process.check()
        if time.monotonic() > deadline:
            pytest.fail(f"Apache Kafka did not start: {process.tail()}")
        time.sleep(0.1)


@pytest.mark.broker
def test_apache_kafka_knows_every_setting_and_takes_its_value(broker: Broker) -> None:
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{broker.ports['INTERNAL']}"})
    [answer] = admin.describe_configs([ConfigResource(ConfigResource.Type.BROKER, "1")]).values()
    taken = {name: entry.value for name, entry in answer.result(30).items()}
    assert {name: taken.get(name, "unknown") for name in broker.properties} == broker.properties


@pytest.mark.broker
@pytest.mark.parametrize("listener", ["INTERNAL", "EXTERNAL"])
def test_a_client_is_sent_on_to_the_listener_that_it_came_by(broker: Broker, listener: str) -> None:
    metadata = AdminClient({"bootstrap.servers": f"127.0.0.1:{broker.ports[listener]}"}).list_topics(timeout=30)
    assert [(node.host, node.port) for node in metadata.brokers.values()] == [("127.0.0.1", broker.ports[listener])]


def run_topics(compose: Compose, bootstrap: str, *further: str) -> str:
    """The command of the service `topics` as Compose gives it, with another broker."""
    program, *command = compose["services"]["topics"]["command"]
    assert program == "streamtower"
    command = [bootstrap if part == "kafka:19092" else part for part in command]
    done = subprocess.run(
        [sys.executable, "-m", program, *command, *further],
        env={name: value for name, value in os.environ.items() if not name.startswith("STREAMTOWER_")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.broker
def test_the_topics_command_makes_what_the_services_count_on(compose: Compose, broker: Broker) -> None:
    bootstrap = f"127.0.0.1:{broker.ports['INTERNAL']}"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    assert run_topics(compose, bootstrap).count(": made") == 4
    topics = Topics()
    names = (topics.clicks, topics.items, topics.dead_letters, topics.micro_batches)
    there = admin.list_topics(timeout=30).topics
    assert {name: len(there[name].partitions) for name in names} == dict.fromkeys(names, 2)
    answers = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, name) for name in names])
    configs = {resource.name: answer.result(30) for resource, answer in answers.items()}
    for name in (topics.clicks, topics.dead_letters, topics.micro_batches):
        assert int(configs[name]["max.message.bytes"].value) >= MAX_MESSAGE_BYTES
    assert configs[topics.items]["cleanup.policy"].value == "compact"
    assert run_topics(compose, bootstrap).count(": was there") == 4, "a second start must change nothing"


@pytest.mark.broker
def test_the_topics_command_works_on_any_broker(compose: Compose, kafka: str) -> None:
    """On the broker of all other tests, under a prefix of its own, which is cleaned up."""
    from tests.fixtures.kafka import topics_on

    with topics_on(kafka) as topics:
        assert run_topics(compose, kafka, "--topic-prefix", topics.prefix).count(": was there") == 4
