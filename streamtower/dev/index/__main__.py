"""`python -m streamtower.dev.index`: the local Qdrant endpoint as a process.

Station: the command line of the endpoint. It listens on the loopback interface only, and refuses any other.
"""

from __future__ import annotations

import argparse
import gc
import ipaddress
import signal
import socket
from pathlib import Path
from types import FrameType

import prometheus_client
import structlog
import uvicorn

from streams.service import ConfigurationError, refuse_to_start, set_up_logs
from streamtower.dev.index.app import TITLE, create_app
from streamtower.dev.index.errors import StorageError
from streamtower.dev.index.storage import Storage

DEFAULT_PORT = 6333
KEEP_ALIVE_SECONDS = 75
STOP_SECONDS = 3
COLLECT_EVERY = 50_000
"""Objects made between two looks for garbage in cycles: a batch of points makes thousands, and none of them is any."""


class _Server(uvicorn.Server):
    """Says "ready" when it really listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            structlog.get_logger().info("ready", what=TITLE, url=f"http://{host}:{port}")


def main() -> None:
    """Serves collections of a directory until SIGTERM or SIGINT."""
    arguments = _arguments()
    set_up_logs("index")
    # uvicorn takes both over, ends in order, and then raises the signal again for these.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        listener = socket.socket(fileno=arguments.fd) if arguments.fd is not None else _listen(arguments)
        storage = Storage(arguments.dir)
    except ConfigurationError as error:
        refuse_to_start("the local index", error)
    except StorageError as error:
        refuse_to_start("the local index", ConfigurationError([str(error)]))
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY)
    config = uvicorn.Config(
        create_app(storage, arguments.api_key),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    try:
        _Server(config).run([listener])
    finally:
        structlog.get_logger().info("stopped")


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m streamtower.dev.index", description=f"{TITLE}.")
    parser.add_argument("--dir", type=Path, required=True, help="where collections are kept; made if missing")
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"0: any free one (default {DEFAULT_PORT})")
    parser.add_argument("--api-key", help="clients must send it; without: open to every user of this machine")
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)  # a socket that listens already, from process.py
    return parser.parse_args()


def _listen(arguments: argparse.Namespace) -> socket.socket:
    try:
        loopback = arguments.host == "localhost" or ipaddress.ip_address(arguments.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigurationError(
            [f"--host {arguments.host}: the local index listens on loopback only; use a Qdrant server for a network"]
        )
    try:
        return socket.create_server(
            (arguments.host, arguments.port), family=socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise ConfigurationError([f"--port {arguments.port}: {error}; choose another port, 0 for any"]) from None


if __name__ == "__main__":
    main()
