"""A whole retriever over real HTTP inside the test's process, Kafka left out; and a wire to Qdrant that can be cut."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvloop
from prometheus_client import CollectorRegistry

from retriever.assembly import Assembly, assemble
from retriever.histories import HistoryTable
from retriever.metrics import Metrics
from retriever.settings import RetrieverSettings
from retriever.versions import Versions

DEADLINE_SECONDS = 20.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """The first truthy answer of `condition`; fails the test when none comes."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)
    return answer


@dataclass
class Running:
    """A retriever that answers at `http.base_url`."""

    http: httpx.Client
    service: Assembly

    @property
    def table(self) -> HistoryTable:
        return self.service.histories

    @property
    def metrics(self) -> Metrics:
        return self.service.metrics

    @property
    def versions(self) -> Versions:
        return self.service.versions

    def ask(self, **body: Any) -> dict[str, Any]:
        """The answer to a request for candidates, which must succeed."""
        answer = self.http.post("/v1/candidates", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def value(self, name: str, **labels: str) -> float:
        """A metric's value, by the name after streamtower_retriever_."""
        found = self.metrics.registry.get_sample_value(f"streamtower_retriever_{name}", labels)
        assert found is not None, f"no metric {name} {labels}"
        return found

    def wait_for_version(self, model_version: int) -> None:
        """Until that version is served."""
        wait_until(
            lambda: self.versions.served and self.versions.served.manifest.model_version == model_version,
            f"version {model_version} is served",
        )


@contextmanager
def running(settings: RetrieverSettings) -> Iterator[Running]:
    """Starts what `python -m retriever` runs, without the stream and the signals; ends it afterwards."""
    listener = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()
    made: list[tuple[Assembly, Callable[[], object]]] = []

    async def serve() -> None:
        service = assemble(settings, Metrics(CollectorRegistry()))
        server = service.server()
        loop = asyncio.get_running_loop()
        made.append((service, lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)))
        following = asyncio.create_task(service.watch.run(settings.version_poll_seconds))
        started.set()
        await server.serve(sockets=[listener])
        following.cancel()
        await service.index.close()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(DEADLINE_SECONDS)
        port = listener.getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http:
            yield Running(http, made[0][0])
    finally:
        for _, end in made:
            end()
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()


class Wire:
    """A TCP relay to Qdrant that can be cut (connections refused and dropped) and joined again: a Qdrant killed."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 6333)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self._port = 0
        self.num_connections = 0
        self.heads = 0
        """Requests with a head that asked for an answer as it is, not compressed."""
        self.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def join(self) -> None:
        """Lets connections through."""
        self._run(self._join())

    def cut(self) -> None:
        """Drops every connection and refuses new ones."""
        self._run(self._cut())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_SECONDS)

    async def _join(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for relay in list(self._relays):
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    def _look_at(self, data: bytes) -> None:
        self.heads += data.lower().count(b"\r\naccept-encoding: identity\r\n")

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        self.num_connections += 1
        try:
            there_reader, there_writer = await asyncio.open_connection(*self._target)
            try:
                pumps = [_pump(reader, there_writer, self._look_at), _pump(there_reader, writer, lambda _: None)]
                await asyncio.wait([asyncio.ensure_future(p) for p in pumps], return_when=asyncio.FIRST_COMPLETED)
            finally:
                there_writer.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._relays.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look_at: Callable[[bytes], None]) -> None:
    try:
        while data := await reader.read(65_536):
            look_at(data)
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
