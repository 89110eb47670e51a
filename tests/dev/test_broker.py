"""The embedded broker: answers, survives a taken port, leaves no process however its starter ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from streamtower.dev.broker import BrokerError, LocalBroker, free_port

pytestmark = pytest.mark.broker


def wait_gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_records_come_back_as_they_were_sent() -> None:
    large = os.urandom(2_000_000)
    with LocalBroker(port=0) as broker:
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        admin.create_topics([NewTopic("clicks", 2)])["clicks"].result(10)
        producer = Producer({"bootstrap.servers": broker.bootstrap, "acks": "all", "message.max.bytes": 4 << 20})
        for value in (b"small", None, large):
            producer.produce("clicks", value, b"key", partition=1)
        assert producer.flush(10) == 0
        consumer = Consumer(
            {
                "bootstrap.servers": broker.bootstrap,
                "group.id": "g",
                "enable.auto.commit": False,
                "fetch.message.max.bytes": 4 << 20,
            }
        )
        try:
            consumer.assign([TopicPartition("clicks", 1, 0)])
            records = [consumer.poll(10) for _ in range(3)]
            assert [(r.offset(), r.key(), r.value()) for r in records] == [
                (0, b"key", b"small"),
                (1, b"key", None),
                (2, b"key", large),
            ]
        finally:
            consumer.close()
    assert wait_gone(broker.pid)


def test_a_taken_port_gives_another_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wished = taken.getsockname()[1]
        with LocalBroker(port=wished) as broker:
            assert broker.port != wished
            assert broker.bootstrap == f"127.0.0.1:{broker.port}"
            assert AdminClient({"bootstrap.servers": broker.bootstrap}).list_topics(timeout=10).topics == {}


def test_a_free_wished_port_is_used() -> None:
    wished = free_port()
    with LocalBroker(port=wished) as broker:
        assert broker.port == wished


def test_two_brokers_share_nothing() -> None:
    with LocalBroker(port=0) as one, LocalBroker(port=0) as other:
        admin = AdminClient({"bootstrap.servers": one.bootstrap})
        admin.create_topics([NewTopic("only-here", 1)])["only-here"].result(10)
        assert AdminClient({"bootstrap.servers": other.bootstrap}).list_topics(timeout=10).topics == {}


def test_a_broker_that_does_not_answer_in_time_is_an_error_and_leaves_no_process() -> None:
    broker = LocalBroker(port=0, ready_seconds=0.0)
    with pytest.raises(BrokerError, match="did not answer"):
        broker.start()
    assert wait_gone(broker.pid)


def test_stopping_twice_is_harmless_and_it_can_start_again() -> None:
    broker = LocalBroker(port=0)
    with broker, pytest.raises(BrokerError, match="runs already"):
        broker.start()
    broker.stop()
    with broker:
        assert psutil.pid_exists(broker.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG, which only Linux has")
def test_kill_9_of_the_starter_leaves_no_broker() -> None:
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\nfrom streamtower.dev.broker import LocalBroker\n"
            "with LocalBroker(port=0) as broker:\n    print(broker.pid, flush=True)\n    time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    with starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert psutil.Process(pid).is_running()
        starter.kill()
    assert wait_gone(pid)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_as_a_script_it_prints_its_address_and_ends_in_order(signum: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "streamtower.dev.broker", "--port", str(free_port())], stdout=subprocess.PIPE
    ) as script:
        assert script.stdout is not None
        bootstrap = script.stdout.readline().decode().strip()
        assert AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=10).brokers
        (child,) = psutil.Process(script.pid).children()
        script.send_signal(signum)
        assert script.wait(10) == 0
        assert wait_gone(child.pid)
