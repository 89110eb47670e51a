"""HTTP of the service: /metrics for Prometheus, and /movers, the items whose shares of clicks have changed most.

Station: beside the data's way, on threads of its own. It tells what others have found, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import msgspec
import structlog
from prometheus_client import start_http_server

from streams.metrics import Metrics
from streams.movers import MAX_MOVERS, MoversReport
from streams.service import ConfigurationError
from streams.settings import StreamsSettings

MOVERS_PATH = "/movers"
DEFAULT_MOVERS = 10

log = structlog.get_logger("streams")


def serve(settings: StreamsSettings, metrics: Metrics, latest_movers: Callable[[], MoversReport]) -> WSGIServer:
    """Answers from threads until the process ends, or the server that is given back is shut down.

    Args:
        settings: say where to listen.
        metrics: for every path but one.
        latest_movers: called by each request for that one, on its thread.

    Raises:
        ConfigurationError: it cannot listen there.
    """
    try:
        server, _ = start_http_server(settings.metrics_port, settings.metrics_host, metrics.registry)
    except OSError as error:
        where = f"{settings.metrics_host}:{settings.metrics_port}"
        raise ConfigurationError(
            [f"cannot serve metrics on {where}: {error}; set metrics_host and metrics_port"]
        ) from error
    metrics_app = server.get_app()
    assert metrics_app is not None
    server.set_app(_with_movers(metrics_app, latest_movers))
    log.info("listening", host=settings.metrics_host, port=server.server_port)
    return server


def _with_movers(metrics_app: WSGIApplication, latest_movers: Callable[[], MoversReport]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != MOVERS_PATH or environ["REQUEST_METHOD"] != "GET":
            return metrics_app(environ, start_response)
        count = _count(environ.get("QUERY_STRING", ""))
        if count is None:
            status, kind, answer = "400 Bad Request", "application/problem+json", _PROBLEM
        else:
            report = latest_movers()
            status, kind = "200 OK", "application/json"
            answer = msgspec.json.encode(msgspec.structs.replace(report, movers=report.movers[:count]))
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(answer)))])
        return [answer]

    return app


def _count(query: str) -> int | None:
    """How many movers the query asks for; None: it asks for something else."""
    given = parse_qs(query, keep_blank_values=True)
    match given.pop("count", [str(DEFAULT_MOVERS)]):
        case [text] if not given and text.isascii() and text.isdecimal() and len(text) <= 3:
            return int(text) if 1 <= int(text) <= MAX_MOVERS else None
    return None


_PROBLEM = msgspec.json.encode(
    {
        "type": "urn:streamtower:problem:invalid-request",
        "title": "The query is not understood",
        "status": 400,
        "detail": f"{MOVERS_PATH} takes ?count=, 1 to {MAX_MOVERS}, and nothing else",
    }
)
