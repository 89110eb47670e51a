"""The chain as processes that may be killed, stopped and started again one by one."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from streams.contract import Topics
from streamtower.dev.broker import free_port
from streamtower.processes import ChildProcess

READY_SECONDS = 90.0
ROOT = Path(__file__).parents[3]


class Member:
    """One process, as often as it is started."""

    end_codes: frozenset[int] = frozenset({0})
    """Exit codes that are right after SIGTERM."""

    def __init__(self, name: str, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.process: ChildProcess | None = None
        self.told_to_end = False
        """Whether its end, when it comes, is no surprise."""
        self._command, self._log, self._environment = command, log, environment
        self._log_start = 0

    @property
    def kind(self) -> str:
        return self.name.split("-")[0]

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.exit_code is None

    def start(self) -> None:
        self.told_to_end = False
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self.process = ChildProcess(self.name, self._line(), self._log, self._environment)

    def _line(self) -> list[str]:
        return [sys.executable, *self._command]

    def send(self, number: int) -> None:
        if self.process and self.is_running:
            self.told_to_end = self.told_to_end or number in (signal.SIGKILL, signal.SIGTERM)
            os.kill(self.process.pid, number)

    def end(self) -> int:
        """SIGTERM, and its exit code; it has as long as a container gets."""
        assert self.process
        self.send(signal.SIGTERM)
        return self.process.end(time.monotonic() + 30)

    def kill(self) -> None:
        """Whatever state it is in, it is gone when this returns."""
        if self.process:
            self.send(signal.SIGCONT)
            self.send(signal.SIGKILL)
            self.process.end(time.monotonic() + 10)

    @property
    def is_ready(self) -> bool:
        """Whether it has said so since its last start."""
        return self.is_running and self.num_ready > 0

    @property
    def num_ready(self) -> int:
        """How often it has said so since its last start; workers do in each rebalance."""
        if self.process is None:
            return 0
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().count(b'"event": "ready"')


class ApacheNode(Member):
    """One node of Apache Kafka, on its data again after each start."""

    end_codes = frozenset({0, 128 + signal.SIGTERM})  # as Java says it

    def __init__(
        self, home: Path, folder: Path, *, name: str = "broker", port: int = 0, properties: tuple[str, ...] = ()
    ) -> None:
        folder.mkdir(parents=True)
        self.port = port or _free_port_pair()
        self.bootstrap = f"127.0.0.1:{self.port}"
        super().__init__(name, [], folder / "output", {"KAFKA_HEAP": "320m"})
        self._server = [str(home.resolve() / "kafka-server"), str(folder), str(self.port), *properties]

    def _line(self) -> list[str]:
        return self._server

    @property
    def is_ready(self) -> bool:
        try:
            AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0}).list_topics(timeout=1)
        except KafkaException:
            return False
        return self.is_running


def cluster_of_three(home: Path, folder: Path) -> list[ApacheNode]:
    """Three nodes, each of which may be away: what is acknowledged is on two of them at least."""
    ports: list[int] = []
    while len(ports) < 3:
        if not {port := _free_port_pair(), port + 1} & {taken + more for taken in ports for more in (-1, 0, 1)}:
            ports.append(port)
    voters = ",".join(f"{number}@127.0.0.1:{port + 1}" for number, port in enumerate(ports, 1))
    replicated = (
        f"controller.quorum.voters={voters}",
        "offsets.topic.replication.factor=3",
        "transaction.state.log.replication.factor=3",
        "default.replication.factor=3",
        "min.insync.replicas=2",
    )
    return [
        ApacheNode(
            home,
            folder / str(number),
            name=f"broker-{number}",
            port=port,
            properties=(f"node.id={number}", *replicated),
        )
        for number, port in enumerate(ports, 1)
    ]


def _free_port_pair() -> int:
    while True:
        with closing(socket.socket()) as first, closing(socket.socket()) as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except (OSError, OverflowError):
                continue
            return int(first.getsockname()[1])


def wait_until(condition: Callable[[], object], what: str, seconds: float = READY_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


class Chain:
    """Streams (several workers), trainer, retriever and index on a broker that is there. To be ended with `close`."""

    def __init__(
        self,
        kafka: str,
        topics: Topics,
        directory: Path,
        *,
        num_workers: int = 2,
        batch_size: int = 64,
        batch_age_seconds: float = 0.25,
        static_members: bool = False,
    ) -> None:
        directory.mkdir(parents=True)
        self.directory, self.topics, self.batch_size = directory, topics, batch_size
        self.ledger, self.models, self.checkpoints = (directory / name for name in ("ledger", "models", "checkpoints"))
        self.alias = "items"
        index_port, http_port = free_port(), free_port()
        self.qdrant, self.retriever = f"http://127.0.0.1:{index_port}", f"http://127.0.0.1:{http_port}"
        # One thread each: there are more processes than processors.
        common = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        common["PYTHONPATH"] = str(ROOT)

        def settings(service: str, **values: object) -> dict[str, str]:
            values = {"kafka": kafka, "topic_prefix": topics.prefix, **values}
            return common | {f"STREAMTOWER_{service}_{name.upper()}": str(value) for name, value in values.items()}

        def worker(number: int) -> Member:
            name = f"streams-{number}"
            environment = settings(
                "STREAMS",
                metrics_port=0,
                batch_size=batch_size,
                batch_age_seconds=batch_age_seconds,
                commit_interval_seconds=0.2,
                snapshots=directory / "snapshots",
                snapshot_interval_seconds=2,
                group_instance_id=name if static_members else "",
            )
            return Member(name, ["-m", "streams"], directory / f"{name}.log", environment)

        place = {"qdrant": self.qdrant, "alias": self.alias, "model_dir": self.models}
        self.workers = [worker(number) for number in range(num_workers + 1)]
        """The last one only joins now and then."""
        self.trainer = Member(
            "trainer",
            [str(Path(__file__).with_name("ledgered_trainer.py")), str(self.ledger)],
            directory / "trainer.log",
            settings(
                "TRAINER",
                **place,
                metrics_port=0,
                checkpoint_dir=self.checkpoints,
                checkpoint_interval_seconds=1,
                publish_interval_seconds=0.5,
                first_publish_interval_seconds=2,
                full_publish_interval_seconds=6,
                embedding_dim=16,
                row_dim=16,
                item_rows=4096,
                feature_rows=1024,
                evaluation_rows=4,
                recent_negatives=32,
            ),
        )
        self.retrieving = Member(
            "retriever",
            ["-m", "retriever"],
            directory / "retriever.log",
            settings("RETRIEVER", **place, port=http_port, version_poll_seconds=0.2, history_length=20),
        )
        self.index = Member(
            "index",
            ["-m", "streamtower.dev.index", "--dir", str(directory / "index"), "--port", str(index_port)],
            directory / "index.log",
            common,
        )

    @property
    def members(self) -> list[Member]:
        return [*self.workers, self.trainer, self.retrieving, self.index]

    def start(self) -> None:
        """Everything but the spare worker; returns when all of it is ready, the retriever only listens."""
        regular = [member for member in self.members if member is not self.workers[-1]]
        for member in regular:
            member.start()
        for member in regular:
            if member is not self.retrieving:
                wait_until(lambda member=member: member.is_ready, f"{member.name} is ready; its log: {self.directory}")

    def retriever_answers(self) -> bool:
        try:
            return httpx.get(f"{self.retriever}/readyz", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        for member in self.members:
            member.kill()
