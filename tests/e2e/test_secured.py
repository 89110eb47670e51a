"""The chain with everything closed: Kafka behind TLS and a password, Qdrant behind TLS and a key, the retriever behind
keys; and no secret in a log, an error or a metric."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from streams.service import EXIT_CONFIGURATION, EXIT_DEPENDENCY
from streamtower.dev.index.process import LocalIndex
from tests.fixtures.secured_kafka import PASSWORD, ApacheKafka
from tests.retriever.running import Wire

ROOT = Path(__file__).parent.parent.parent
QDRANT_KEY, API_KEY, FILE_KEY = "the-secret-of-qdrant", "the-secret-of-callers", "the-other-secret-of-callers"
SECRETS = (PASSWORD, QDRANT_KEY, API_KEY, FILE_KEY)
SERVICES = ("streams", "trainer", "retriever")
SMALL = {
    "item_rows": "4096", "feature_rows": "256", "embedding_dim": "8", "row_dim": "8",
    "publish_interval_seconds": "0.2", "first_publish_interval_seconds": "1",
}  # fmt: skip


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(0.05)
    return found


class TlsWire(Wire):
    """A relay that speaks TLS on the side of the callers."""

    def __init__(self, url: str, certificate: Path, key: Path) -> None:
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)
        super().__init__(url)

    @property
    def url(self) -> str:
        return super().url.replace("http:", "https:")

    async def _join(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0, ssl=self._tls)
        self._port = self._server.sockets[0].getsockname()[1]


class Member:
    """One process of the chain, with its log."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self._path = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMTOWER_")}
        with self._path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=ROOT, env=kept | environment, stdout=output, stderr=output
            )

    @property
    def log(self) -> str:
        return self._path.read_text()

    def event(self, name: str) -> dict[str, Any] | None:
        """Its first log line of that name."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{") and line.endswith("}")]
        return next((line for line in lines if line.get("event") == name), None)

    def wait_for(self, name: str) -> dict[str, Any]:
        found = wait_for(lambda: self.event(name) or self.process.poll() is not None, f"{name} is logged")
        assert found is not True, self.log
        return found  # type: ignore[no-any-return]

    def metrics(self) -> str:
        told = self.wait_for("listening")
        url = told.get("metrics") or f"http://127.0.0.1:{told['port']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read().decode()  # type: ignore[no-any-return]


@contextmanager
def started(members: list[Member]) -> Iterator[None]:
    """Ends all of them in any case."""
    try:
        yield
    except BaseException:
        for member in members:
            print(member.log[-3000:])
        raise
    finally:
        for member in members:
            member.process.kill()
            member.process.wait()


def without_secrets(*texts: str) -> bool:
    return not any(secret in text for text in texts for secret in SECRETS)


@pytest.mark.broker
@pytest.mark.index
@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_behind_tls_passwords_and_keys_the_whole_chain_works_and_tells_no_secret(
    secured_kafka: ApacheKafka, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(FILE_KEY)
    index = LocalIndex(tmp_path / "index", api_key=QDRANT_KEY)
    index.start()
    members: list[Member] = []
    with (
        ExitStack() as exits,
        started(members),
        closing(TlsWire(index.url, secured_kafka.certificate, secured_kafka.certificate.with_name("key.pem"))) as wire,
    ):
        exits.callback(index.stop)
        secured = {
            "KAFKA": secured_kafka.tls_bootstrap, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_USERNAME": "app",
            "KAFKA_CA_FILE": str(secured_kafka.certificate), "KAFKA_PASSWORD": PASSWORD, "TOPIC_PREFIX": "secured-",
        }  # fmt: skip
        index_is = {"QDRANT": wire.url, "QDRANT_API_KEY": QDRANT_KEY, "MODEL_DIR": str(tmp_path / "models")}
        own = {
            "STREAMS": {"METRICS_PORT": "0", "SNAPSHOTS": str(tmp_path / "snapshots")},
            "TRAINER": index_is | {"METRICS_PORT": "0", "CHECKPOINT_DIR": str(tmp_path / "checkpoints")},
            "RETRIEVER": index_is | {"PORT": "0", "API_KEYS": json.dumps([API_KEY]), "API_KEYS_FILE": str(keys)},
        }
        own["TRAINER"] |= {name.upper(): value for name, value in SMALL.items()}

        def environment(service: str, **other: str) -> dict[str, str]:
            values = secured | own[service.upper()] | other
            made = {f"STREAMTOWER_{service.upper()}_{name}": value for name, value in values.items()}
            return made | {"SSL_CERT_FILE": str(secured_kafka.certificate)}

        def command(*arguments: str) -> Member:
            made = Member(tmp_path, "streamtower", *arguments, **environment("streams"))
            members.append(made)
            assert made.process.wait(90) == 0, made.log
            return made

        command("topics")
        for service in SERVICES:
            members.append(Member(tmp_path, service, **environment(service)))
        streams, trainer, retriever = members[1:]
        streams.wait_for("ready")
        command("produce", "synthetic", "--limit", "3000", "--now")
        port = retriever.wait_for("listening")["port"]
        retriever.wait_for("ready")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as http:
            for key, status in ((API_KEY, 200), (FILE_KEY, 200), (QDRANT_KEY, 401)):
                asked = http.post(
                    "/v1/candidates", json={"history": [], "k": 5}, headers={"authorization": f"Bearer {key}"}
                )
                assert asked.status_code == status, asked.text
                assert without_secrets(asked.text)
                assert status != 200 or len(asked.json()["candidates"]) == 5
        assert without_secrets(*(member.metrics() for member in (streams, trainer, retriever)))

        wrong = [
            Member(tmp_path, "trainer", **environment(
                "trainer", KAFKA_PASSWORD="another", KAFKA_DEADLINE_SECONDS="3",
                CHECKPOINT_DIR=str(tmp_path / "other"), MODEL_DIR=str(tmp_path / "other-models"),
            )),
            Member(tmp_path, "retriever", **environment("retriever", KAFKA_PASSWORD="another")),
        ]  # fmt: skip
        members += wrong
        assert wrong[0].process.wait(90) == EXIT_DEPENDENCY
        wait_for(lambda: wrong[1].event("kafka does not answer"), "the retriever says that it may not read Kafka")
        for member in (streams, trainer, retriever):
            member.process.send_signal(signal.SIGTERM)
        assert [member.process.wait(30) for member in (streams, trainer, retriever)] == [0, 0, 0]
        assert without_secrets(*(member.log for member in members))


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
def test_neither_a_dead_dependency_nor_a_refused_setting_makes_a_service_tell_a_secret(
    service: str, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(FILE_KEY)
    values = {
        "KAFKA": "127.0.0.1:9", "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_USERNAME": "app",
        "KAFKA_PASSWORD": PASSWORD,
    }  # fmt: skip
    if service == "streams":
        values |= {"METRICS_PORT": "0", "SNAPSHOTS": "", "DEPENDENCY_DEADLINE_SECONDS": "2"}
    else:
        values |= {
            "QDRANT": "http://127.0.0.1:9", "QDRANT_API_KEY": QDRANT_KEY, "MODEL_DIR": str(tmp_path / "models")
        }  # fmt: skip
    if service == "trainer":
        checkpoints = str(tmp_path / "checkpoints")
        values |= {"METRICS_PORT": "0", "CHECKPOINT_DIR": checkpoints, "KAFKA_DEADLINE_SECONDS": "2"}
        values |= {name.upper(): value for name, value in SMALL.items()}
    if service == "retriever":
        values |= {"PORT": "0", "API_KEYS": json.dumps([API_KEY]), "API_KEYS_FILE": str(keys)}

    def environment(**other: str) -> dict[str, str]:
        return {f"STREAMTOWER_{service.upper()}_{name}": value for name, value in (values | other).items()}

    refused = {"KAFKA_USERNAME": ""}
    if service == "retriever":
        keys_that_are_none = tmp_path / "no-keys"
        keys_that_are_none.write_text(f"{FILE_KEY}\nshort")
        refused |= {"API_KEYS": API_KEY, "API_KEYS_FILE": str(keys_that_are_none)}
    dead, wrong = Member(tmp_path, service, **environment()), Member(tmp_path, service, **environment(**refused))
    with started([dead, wrong]):
        assert wrong.process.wait(90) == EXIT_CONFIGURATION
        if service == "retriever":  # it lives on, and serves what it has
            assert without_secrets(dead.metrics())
            wait_for(lambda: dead.event("not ready") or len(dead.log.splitlines()) > 2, "it says what it lacks")
            dead.process.send_signal(signal.SIGTERM)
            assert dead.process.wait(30) == 0
        else:
            assert dead.process.wait(90) == EXIT_DEPENDENCY
        assert dead.log.strip() and wrong.log.strip()
        assert without_secrets(dead.log, wrong.log)
