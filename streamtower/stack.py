"""Everything that a demo runs beside itself: broker, index, topics, and the three services as processes of their own.

Station: around the data's way. The services get what any deployment gives them, environment variables; they do not know
that this is a demo.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

from streams.contract import Topics
from streams.service import EXIT_CONFIGURATION
from streamtower.datasets.clicks import Dataset
from streamtower.dev.broker import LocalBroker, free_port
from streamtower.dev.index.process import LocalIndex
from streamtower.processes import ChildProcess, ProcessError, end_all, python_module
from streamtower.topics import create_topics

NUM_PARTITIONS = 2
READY_SECONDS = 60.0
BROKER_SECONDS = 10.0
"""For the broker to answer."""
END_SECONDS = 5.0
"""For the services, all at once; broker and index then take a moment more, ten seconds in all."""
PORTS = {"streams": 9101, "trainer": 9102, "retriever": 8080}
"""Wished ports: metrics, metrics, HTTP."""


class NotEmptyError(RuntimeError):
    """A foreign server holds data under the names that this demo would use. Says what to do."""


@dataclass(frozen=True)
class Servers:
    """Where the data go. None: an embedded one, started and ended with the stack."""

    kafka: str | None = None
    """HOST:PORT of a running broker."""
    qdrant: str | None = None
    """URL of a running Qdrant."""
    qdrant_api_key: str | None = None
    topic_prefix: str = ""
    alias: str = "items"


class Stack:
    """All of it, from `start` or `with` on. `tell` gets a line for people whenever something was not as wished."""

    kafka: str
    qdrant: str

    def __init__(self, servers: Servers, directory: Path, dataset: Dataset, tell: Callable[[str], None]) -> None:
        self.servers = servers
        self.topics = Topics(servers.topic_prefix)
        self._directory = directory
        self._dataset = dataset
        self._tell = tell
        self._exits = ExitStack()
        self._broker: LocalBroker | None = None
        self._index: LocalIndex | None = None
        self._services: dict[str, ChildProcess] = {}
        self._ports: dict[str, int] = {}

    def start(self) -> None:
        """Starts broker and index, makes the topics, starts the services; does not wait for these.

        Raises:
            NotEmptyError, streamtower.topics.TopicsError, streamtower.dev's errors: what is in the way.
        """
        if self.servers.kafka is None:
            self._broker = LocalBroker(9092)
            self._exits.callback(self._broker.stop)  # before the start: that may be interrupted
            self._broker.start()
            self.kafka = self._broker.bootstrap
            self._tell_port("broker", self._broker.port, 9092)
        else:
            self.kafka = self.servers.kafka
        if self.servers.qdrant is None:
            self._index = LocalIndex(self._directory / "index", 6333)
            self._exits.callback(self._index.stop)
            self._index.start()
            self.qdrant = self._index.url
            self._tell_port("index", self._index.port, 6333)
        else:
            self.qdrant = self.servers.qdrant.rstrip("/")
        made = create_topics(
            {"bootstrap.servers": self.kafka},
            self.topics,
            num_partitions=NUM_PARTITIONS,
            timeout_seconds=BROKER_SECONDS,
        )
        if not made[self.topics.clicks]:
            self._refuse_old_clicks()
        if self.servers.qdrant is not None:
            self._refuse_old_alias()
        for service, wished in PORTS.items():
            self._ports[service] = free_port(wished)
            self._tell_port(service, self._ports[service], wished)
        self._exits.callback(self._end_services)
        for service in PORTS:
            self._spawn(service)

    @property
    def retriever(self) -> str:
        """URL of the HTTP service; fixed once all listen."""
        return f"http://127.0.0.1:{self._ports['retriever']}"

    def metrics_urls(self) -> dict[str, str]:
        """Service → URL of its metrics; fixed once all listen."""
        return {service: f"http://127.0.0.1:{port}/metrics" for service, port in self._ports.items()}

    def wait_listening(self) -> None:
        """Waits until every service listens on its port; one whose port was taken in between gets another."""
        for service in PORTS:
            self._wait_said(service, "listening", self._replace_whose_port_is_taken)

    def wait_ready(self, service: str) -> None:
        """Waits until a service says that it works, and sees that all others live meanwhile."""
        self._wait_said(service, "ready", lambda: None)

    def _wait_said(self, service: str, event: str, meanwhile: Callable[[], None]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not (process := self._services[service]).has_said(event):
            meanwhile()
            self.check()
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"{service} is not {event} after {READY_SECONDS:g} s; the end of {process.log}:\n{process.tail()}"
                )
            time.sleep(0.05)

    def _replace_whose_port_is_taken(self) -> None:
        for service, port in list(self._ports.items()):
            if self._services[service].exit_code == EXIT_CONFIGURATION and free_port(port) != port:
                self._ports[service] = free_port()
                self._tell_port(service, self._ports[service], port)
                self._spawn(service)

    def _spawn(self, service: str) -> None:
        self._services[service] = ChildProcess(
            service, python_module(service), self._directory / f"{service}.log", self._environment(service)
        )

    def check(self) -> None:
        """
        Raises:
            ProcessError: one of the processes has ended.
        """
        for name, part in (("the embedded broker", self._broker), ("the embedded index", self._index)):
            if part is not None and part.exit_code is not None:
                raise ProcessError(f"{name} ended with exit code {part.exit_code}")
        for process in self._services.values():
            process.check()

    def stop(self) -> None:
        """Ends the services, then what they need; within ten seconds nothing is left."""
        self._exits.close()

    def __enter__(self) -> Stack:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _end_services(self) -> None:
        for name, code in end_all(list(self._services.values()), END_SECONDS).items():
            if code not in (0, None):
                self._tell(f"{name} ended with exit code {code}")

    def _tell_port(self, what: str, port: int, wished: int) -> None:
        if port != wished:
            self._tell(f"port {wished} is taken: the {what} listens on {port}")

    def _environment(self, service: str) -> dict[str, str]:
        prefix = f"STREAMTOWER_{service.upper()}_"
        settings = {"kafka": self.kafka, "topic_prefix": self.servers.topic_prefix}
        settings["port" if service == "retriever" else "metrics_port"] = str(self._ports[service])
        if service != "streams":
            settings |= {
                "qdrant": self.qdrant,
                "alias": self.servers.alias,
                "model_dir": str(self._directory / "models"),
            }
            if self.servers.qdrant_api_key:
                settings["qdrant_api_key"] = self.servers.qdrant_api_key
        if service == "streams":
            settings["snapshots"] = str(self._directory / "snapshots")
        if service == "trainer":
            settings |= {
                "checkpoint_dir": str(self._directory / "checkpoints"),
                "features": json.dumps(features(self._dataset)),
                "payload_indexes": json.dumps(payload_indexes(self._dataset)),
            }
            # Suggestions: what the user has set wins. Who watches a demo waits for the second click to count.
            suggested = {"publish_interval_seconds": "1", **self._dataset.trainer}
            settings |= {name: suggested[name] for name in suggested if prefix + name.upper() not in os.environ}
        return {prefix + name.upper(): value for name, value in settings.items()}

    def _refuse_old_clicks(self) -> None:
        from confluent_kafka import Consumer, KafkaException, TopicPartition

        consumer = Consumer({"bootstrap.servers": self.kafka, "group.id": "streamtower-demo", "log_level": 2})
        deadline = time.monotonic() + BROKER_SECONDS
        try:
            for partition in range(NUM_PARTITIONS):
                place = TopicPartition(self.topics.clicks, partition)
                while True:
                    try:
                        low, high = consumer.get_watermark_offsets(place, timeout=BROKER_SECONDS)
                        break
                    except KafkaException:  # a topic that was made a moment ago may have no leader yet
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(0.1)
                if high > low:
                    raise NotEmptyError(
                        f"topic {self.topics.clicks} at {self.kafka} holds clicks already, and a demo would mix its "
                        "own with them: give --topic-prefix"
                    )
        finally:
            consumer.close()

    def _refuse_old_alias(self) -> None:
        key = self.servers.qdrant_api_key
        answer = httpx.get(f"{self.qdrant}/aliases", headers={"api-key": key} if key else {}, timeout=10)
        answer.raise_for_status()
        names = [alias["alias_name"] for alias in answer.json()["result"]["aliases"]]
        if self.servers.alias in names:
            raise NotEmptyError(
                f"alias {self.servers.alias} at {self.qdrant} is there already, and a demo would overwrite what it "
                "names: give --alias"
            )


def features(dataset: Dataset) -> dict[str, list[dict[str, str]]]:
    """The towers' feature lists, in the form of the trainer's setting `features`."""
    return {
        side: [{"name": name, "kind": kind} for name, kind in kinds.items()]
        for side, kinds in (("context", dataset.context_features), ("item", dataset.item_features))
    }


def payload_indexes(dataset: Dataset) -> dict[str, str]:
    """Payload fields that queries may filter by quickly: the categories."""
    return {name: "keyword" for name, kind in dataset.item_features.items() if kind == "categorical"}


def state_directory() -> Path:
    """Where logs of runs are kept: $XDG_STATE_HOME/streamtower, by default under ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "streamtower"
