"""`python -m retriever` as a process: from its settings to its exit code."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from retriever.__main__ import main
from retriever.settings import RetrieverSettings
from streams.contract import Topics
from tests.retriever.published import Publisher
from tests.retriever.running import wait_until
from tests.retriever.test_follower import produce
from tests.retriever.test_histories import make_batch

PREFIX = "STREAMTOWER_RETRIEVER_"
START_SECONDS = 60.0


def environment(**settings: object) -> dict[str, str]:
    """This environment without other STREAMTOWER variables, and these settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMTOWER_")}
    return kept | {PREFIX + name.upper(): str(value) for name, value in settings.items()}


class Process:
    """A retriever whose log lines can be waited for."""

    def __init__(self, **settings: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "retriever"],
            env=environment(port=0, **settings),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self._queue: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._queue.put(line)

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next log line of that event."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            line = json.loads(self._queue.get(timeout=max(0.01, deadline - time.monotonic())))  # every line is JSON
            self.lines.append(line)
            if line["event"] == event:
                return line

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code after the signal, within ten seconds."""
        self.process.send_signal(number)
        return self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def started(**settings: object) -> Iterator[tuple[Process, httpx.Client]]:
    process = Process(**settings)
    try:
        port = process.wait_for("listening")["port"]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:
            yield process, http
    finally:
        process.close()


@pytest.mark.index
@pytest.mark.broker
def test_a_click_in_kafka_changes_the_candidates_over_http(
    kafka: str, topics: Topics, qdrant_url: str, publisher: Publisher
) -> None:
    with started(
        kafka=kafka,
        topic_prefix=topics.prefix,
        qdrant=qdrant_url,
        alias=publisher.alias,
        model_dir=publisher.model_dir,
        version_poll_seconds=0.05,
    ) as (process, http):
        assert http.get("/healthz").status_code == 200
        assert http.get("/readyz").status_code == 503
        version = publisher.publish(1)
        assert process.wait_for("ready")["model_version"] == 1
        assert http.get("/readyz").status_code == 200

        def ask() -> dict[str, Any]:
            return http.post("/v1/candidates", json={"user_id": "u", "k": 5}).json()  # type: ignore[no-any-return]

        assert [c["item_id"] for c in ask()["candidates"]] == [item for item, _ in version.best(5, user_id="u")]
        batch = make_batch([("u", "item-3")], [["item-1", "item-2"]], partition=1)
        produce(kafka, topics.micro_batches, [(1, batch.encode())])
        wait_until(lambda: ask()["user_known"], "the click is known")
        clicked = ["item-1", "item-2", "item-3"]
        assert [c["item_id"] for c in ask()["candidates"]] == [
            item for item, _ in version.best(5, user_id="u", history=clicked, without=clicked)
        ]
        assert http.get("/v1/users/u/history").json()["items"] == clicked
        assert "streamtower_retriever_users 1.0" in http.get("/metrics").text
        assert process.end() == 0
        assert process.wait_for("stopped")
        assert all(line["service"] == "retriever" and "u" not in line.values() for line in process.lines)


@pytest.mark.index
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_without_kafka_and_ends_in_good_order(qdrant_url: str, publisher: Publisher, number: int) -> None:
    publisher.publish(1)
    with started(
        kafka="127.0.0.1:9",
        qdrant=qdrant_url,
        alias=publisher.alias,
        model_dir=publisher.model_dir,
        history_wait_seconds=1.5,
    ) as (process, http):
        waiting = http.get("/readyz")
        process.wait_for("ready")
        if waiting.status_code == 503:
            assert waiting.json()["detail"].startswith(("the users' histories", "no version published yet"))
        assert http.post("/v1/candidates", json={"user_id": "u"}).status_code == 200
        assert process.end(number) == 0


def test_without_anything_it_lives_and_says_why_it_is_not_ready(tmp_path: Any) -> None:
    with started(kafka="127.0.0.1:9", qdrant="http://127.0.0.1:9", model_dir=tmp_path, search_timeout_seconds=0.2) as (
        process,
        http,
    ):
        assert http.get("/healthz").status_code == 200
        wait_until(lambda: "Qdrant did not answer" in http.get("/readyz").text, "the reason is told")
        assert http.get("/v1/version").headers["retry-after"] == "1"
        assert process.end() == 0


def refused(**settings: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "retriever"], env=environment(**settings), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 78
    return done.stderr


def test_wrong_settings_are_refused_all_at_once() -> None:
    told = refused(prot=80, port=70_000, qdrant="localhost:6333", max_users=0, api_keys='["short"]')
    for name in ("PROT", "PORT", "QDRANT", "MAX_USERS", "API_KEYS_0"):
        assert f"  - {PREFIX}{name}: " in told
    assert "short" not in told.replace("shorter", "")


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(port=port)


def test_help_lists_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    shown = capsys.readouterr().out
    for name, field in RetrieverSettings.model_fields.items():
        assert f"{PREFIX}{name.upper()}" in shown
        assert " ".join((field.description or "").split()) in shown


def test_every_setting_of_its_own_is_explained() -> None:
    own = RetrieverSettings.__annotations__.keys() - {"model_config"}
    assert len(own) >= 15
    for name in own:
        assert RetrieverSettings.model_fields[name].description, name
