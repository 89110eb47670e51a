"""The service on Apache Kafka: behind TLS and a password, and through a broker's sudden death."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from streams.contract import Topics
from streams.service import EXIT_DEPENDENCY
from tests.fixtures.kafka import create_topics
from tests.streams.references import expected_rows
from tests.streams.running import Service, committed, micro_batches, next_offsets, produce, read_all, wait_for
from tests.streams.stand_ins import click, random_clicks
from tests.streams.test_partition import assert_rows, rows_of
from tests.streams.test_service import BATCH_SIZE, THROUGH_PAUSES, Stream

pytestmark = [pytest.mark.broker, pytest.mark.slow]

PASSWORD = "correct-horse"


class ApacheKafka:
    """One node that can be killed and started again on its data, in the clear and behind TLS and a password."""

    def __init__(self, home: Path, folder: Path) -> None:
        self._home, self._folder = home, folder
        self.port, self.tls_port = _free_ports()
        self.bootstrap, self.tls_bootstrap = f"127.0.0.1:{self.port}", f"127.0.0.1:{self.tls_port}"
        self.certificate = folder / "certificate.pem"
        key = folder / "key.pem"
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=127.0.0.1",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-keyout",
                str(key),
                "-out",
                str(self.certificate),
            ],
            check=True,
            capture_output=True,
        )
        self._store = folder / "store.pem"
        self._store.write_text(key.read_text() + self.certificate.read_text())

    def start(self) -> None:
        from streamtower.dev.broker import die_with_parent  # the extra `embedded`

        listeners = f"PLAINTEXT://127.0.0.1:{self.port},SASL_SSL://127.0.0.1:{self.tls_port}"
        login = "org.apache.kafka.common.security.plain.PlainLoginModule"
        log = self._folder / "server.log"
        seen = log.stat().st_size if log.exists() else 0
        with (self._folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                die_with_parent(
                    [
                        str(self._home / "kafka-server"),
                        str(self._folder),
                        str(self.port),
                        f"listeners={listeners},CONTROLLER://127.0.0.1:{self.port + 1}",
                        f"advertised.listeners={listeners}",
                        "ssl.keystore.type=PEM",
                        f"ssl.keystore.location={self._store}",
                        "sasl.enabled.mechanisms=PLAIN",
                        f'listener.name.sasl_ssl.plain.sasl.jaas.config={login} required user_app="{PASSWORD}";',
                    ]
                ),
                stdout=output,
                stderr=output,
                env=os.environ | {"KAFKA_HEAP": "384m"},
            )
        wait_for(
            lambda: log.exists() and "Kafka Server started" in log.read_text(errors="replace")[seen:],
            "Apache Kafka has started",
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _free_ports() -> tuple[int, int]:
    """One whose next one is free as well, for the controller, and another."""
    for _ in range(50):
        with closing(socket.socket()) as first, closing(socket.socket()) as second, closing(socket.socket()) as third:
            first.bind(("127.0.0.1", 0))
            third.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except (OSError, OverflowError):
                continue
            return first.getsockname()[1], third.getsockname()[1]
    pytest.fail("no two free ports in a row")


@pytest.fixture(scope="module")
def apache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    if not (home := os.environ.get("STREAMTOWER_KAFKA_HOME")):
        pytest.skip("STREAMTOWER_KAFKA_HOME is unset: no Apache Kafka to start here")
    node = ApacheKafka(Path(home).resolve(), tmp_path_factory.mktemp("apache"))
    node.start()
    try:
        yield node
    finally:
        node.kill()


def make_topics(node: ApacheKafka, prefix: str) -> Topics:
    topics = Topics(prefix)
    create_topics(node.bootstrap, {topics.clicks: {}, topics.micro_batches: {}, topics.dead_letters: {}})
    return topics


def test_behind_tls_and_a_password_it_works_and_with_a_wrong_one_it_says_so(apache: ApacheKafka) -> None:
    topics = make_topics(apache, "tls-")
    produce(apache.bootstrap, topics.clicks, 1, [*random_clicks(500, 1), b"no"])
    secured = {
        "kafka_security_protocol": "SASL_SSL",
        "kafka_ca_file": apache.certificate,
        "kafka_username": "app",
        "kafka_password": PASSWORD,
        "batch_age_seconds": 0.1,
    }
    with Service(apache.tls_bootstrap, topics, **secured).wait_until_ready() as service:
        wait_for(lambda: next_offsets(apache.bootstrap, topics) == {0: 0, 1: 501}, "all clicks passed on")
        assert service.stop() == 0
        assert PASSWORD not in service.log.read_text()
    # from the committed offset on: the replay goes the same way
    produce(apache.bootstrap, topics.clicks, 1, [click("late")])
    with Service(apache.tls_bootstrap, topics, **secured).wait_until_ready() as service:
        wait_for(lambda: next_offsets(apache.bootstrap, topics) == {0: 0, 1: 502}, "the last click passed on")
        assert service.events("replayed")[0]["num_records"] == 501
        assert service.stop() == 0
    assert [letter.value() for letter in read_all(apache.bootstrap, topics.dead_letters)] == [b"no"]
    wrong = {**secured, "kafka_password": "another", "dependency_deadline_seconds": 3}
    with Service(apache.tls_bootstrap, topics, **wrong) as service:
        assert service.process.wait(60) == EXIT_DEPENDENCY
        assert "uthentication" in service.log.read_text()


def test_through_the_death_of_the_broker_every_click_is_there_once_and_the_same(apache: ApacheKafka) -> None:
    topics = make_topics(apache, "death-")
    stream = Stream(apache.bootstrap, topics.clicks)
    try:
        with Service(apache.bootstrap, topics, **THROUGH_PAUSES).wait_until_ready() as service:
            wait_for(lambda: min(committed(apache.bootstrap, topics).values()) > 500, "something committed")
            os.kill(apache.process.pid, signal.SIGKILL)
            apache.process.wait()
            time.sleep(2)  # away for a moment, not merely restarted
            apache.start()
            behind = stream.written
            wait_for(lambda: stream.written > behind + 1_000, "clicks are written again", 120)
            written = stream.finish()
            ends = {partition: values_in(apache, topics, partition) for partition in written}
            wait_for(
                lambda: all(
                    next_offsets(apache.bootstrap, topics)[p] >= len(values) // BATCH_SIZE * BATCH_SIZE
                    for p, values in ends.items()
                ),
                "all clicks passed on",
                120,
            )
            assert service.stop() == 0
    finally:
        stream.finish()
    for partition, batches in micro_batches(apache.bootstrap, topics).items():
        # What the producer wrote twice because it heard no acknowledgement are two clicks.
        values = ends[partition][: len(ends[partition]) // BATCH_SIZE * BATCH_SIZE]
        assert len(values) >= len(written[partition]) - BATCH_SIZE
        rows = [row for row in rows_of(batches) if row.offset < len(values)]
        assert_rows(rows, expected_rows(values, BATCH_SIZE))


def values_in(node: ApacheKafka, topics: Topics, partition: int) -> list[bytes | None]:
    messages = read_all(node.bootstrap, topics.clicks)
    return [message.value() for message in messages if message.partition() == partition]
