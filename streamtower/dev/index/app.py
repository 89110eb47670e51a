"""HTTP in front of the calls: routes, bodies, keys, errors as answers, health and metrics.

Station: outermost part of the local endpoint. It says in `GET /` and in every log what it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from urllib.parse import unquote

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from streamtower.dev.index import calls
from streamtower.dev.index.errors import ApiError, format_error, from_engine, is_panic
from streamtower.dev.index.storage import Storage

TITLE = "Streamtower's local Qdrant endpoint (engine qdrant-edge; for development, not a Qdrant server)"
VERSION = "1.19.0"
"""The Qdrant server whose recorded answers this endpoint is held to."""
MAX_BODY_BYTES = 32 << 20
FLUSH_SECONDS = 15.0
"""Each takes as long as a hundred points or more, however little is new; until then all is in the write-ahead log."""

log = structlog.get_logger()
_PUBLIC = {"/", "/readyz", "/livez", "/healthz"}


class Metrics:
    """The endpoint's own metrics, by the names that a Qdrant server gives to the same things."""

    def __init__(self, storage: Storage) -> None:
        self.registry = CollectorRegistry()
        labels = ["method", "endpoint"]
        self.responses = Counter("rest_responses_total", "Answers given.", [*labels, "status"], registry=self.registry)
        self.seconds = Histogram(
            "rest_responses_duration_seconds",
            "Time from the whole request to its answer.",
            labels,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0),
            registry=self.registry,
        )
        self.registry.register(_Contents(storage))


class _Contents(Collector):
    """What is stored, read when somebody asks."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def collect(self) -> Iterator[Metric]:
        about = GaugeMetricFamily("app_info", "What answers here.", labels=["name", "version"])
        about.add_metric(["streamtower local index", VERSION], 1.0)
        names = self._storage.names
        points = GaugeMetricFamily("collection_points", "Points of a collection.", labels=["id"])
        for name in names:
            points.add_metric([name], self._storage.collection(name).shard.info().points_count)
        yield about
        yield GaugeMetricFamily("collections_total", "Number of collections.", value=len(names))
        yield points


def create_app(storage: Storage, api_key: str | None = None) -> ASGIApp:
    """The ASGI application. It flushes `storage` at intervals and closes it at the end.

    Args:
        storage: open; from now on the application's.
        api_key: if given, every call but `/` and the health checks must carry it.
    """
    metrics = Metrics(storage)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        flusher = asyncio.create_task(_flush_at_intervals(storage))
        try:
            yield
        finally:
            flusher.cancel()
            storage.close()

    def plain(text: str) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def answer(request: HttpRequest) -> Response:
            return PlainTextResponse(text)

        return answer

    async def root(request: HttpRequest) -> Response:
        return _json(200, msgspec.json.encode({"title": TITLE, "version": VERSION}))

    async def scrape(request: HttpRequest) -> Response:
        return PlainTextResponse(generate_latest(metrics.registry))

    async def nowhere(request: HttpRequest, error: Exception) -> Response:
        return Response(status_code=404)

    routes = [Route(path, _endpoint(method, path, call, storage, metrics), methods=[method])
              for method, path, call in calls.CALLS]  # fmt: skip
    routes += [
        Route("/", root),
        Route("/readyz", plain("all shards are ready")),
        Route("/livez", plain("healthz check passed")),
        Route("/healthz", plain("healthz check passed")),
        Route("/metrics", scrape),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: nowhere, 405: nowhere})
    return _Gate(app, api_key)


class _Gate:
    """Lets in who has the key, and keeps an escaped slash in a name from becoming a part of the path."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["raw_path"].decode("latin-1")
            if self._api_key is not None and scope["path"] not in _PUBLIC and not self._has_key(scope):
                refusal = PlainTextResponse("Must provide an API key or an Authorization bearer token", 401)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        assert self._api_key is not None
        headers = dict(scope["headers"])
        given = headers.get(b"api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return hmac.compare_digest(given, self._api_key)


def _endpoint(
    method: str, path: str, call: calls.Call, storage: Storage, metrics: Metrics
) -> Callable[[HttpRequest], Awaitable[Response]]:
    seconds = metrics.seconds.labels(method, path)

    async def endpoint(http: HttpRequest) -> Response:
        body = await _read(http)
        started = time.perf_counter()
        response = _answer(method, path, call, storage, http, body)
        seconds.observe(time.perf_counter() - started)
        metrics.responses.labels(method, path, str(response.status_code)).inc()
        return response

    return endpoint


def _answer(
    method: str, path: str, call: calls.Call, storage: Storage, http: HttpRequest, body: bytes | None
) -> Response:
    started = time.perf_counter()
    try:
        if body is None:
            raise ApiError(400, f"Payload error: JSON payload is larger than allowed (limit: {MAX_BODY_BYTES} bytes).")
        request = calls.Request(
            {name: unquote(value) for name, value in http.path_params.items()}, http.query_params, body
        )
        request.check_parameters()
        result = call(storage, request)
        return _json(200, calls.encode(result, time.perf_counter() - started))
    except ApiError as error:
        refusal = error
    except (ValueError, OverflowError) as error:  # the engine's types say so of keys, times and formulas
        refusal = format_error(str(error))
    except Exception as error:
        refusal = from_engine(error)
        if refusal.status >= 500:
            log.exception("a call failed", method=method, path=path)
    except BaseException as error:
        if not is_panic(error):
            raise
        log.exception("the engine panicked", method=method, path=path)
        refusal = ApiError(500, f"Service internal error: the engine panicked: {error}")
    document = {"status": {"error": refusal.message}, "time": time.perf_counter() - started}
    return _json(refusal.status, msgspec.json.encode(document))


async def _read(http: HttpRequest) -> bytes | None:
    """The whole body, or None if it is too large; it is read to its end even then, so that the client hears why."""
    chunks, size = [], 0
    async for chunk in http.stream():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
    return b"".join(chunks) if size <= MAX_BODY_BYTES else None


def _json(status: int, body: bytes) -> Response:
    return Response(body, status, media_type="application/json")


async def _flush_at_intervals(storage: Storage) -> None:
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        try:
            storage.flush()
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            # The engine's write-ahead log still has everything, and the next try may do it.
            log.exception("flush failed")
