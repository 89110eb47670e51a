"""`python -m retriever`: settings → Qdrant client, version follower, history follower, HTTP server; until a signal.

Station: wiring alone. It listens before a version exists (log line `listening`), and says `ready` once candidates can
be had.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence

import structlog
import torch
import uvloop
from pydantic import SecretStr

from retriever.assembly import assemble
from retriever.histories import HistoryFollower
from retriever.metrics import Metrics
from retriever.settings import RetrieverSettings
from streams.contract import Topics
from streams.service import EXIT_BUG, ConfigurationError, load_settings, refuse_to_start, set_up_logs

log = structlog.get_logger("retriever")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the service; returns its exit code."""
    argparse.ArgumentParser(
        prog="python -m retriever",
        description="Answers candidates over HTTP from the live version of a Streamtower.",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn takes both over while it serves, ends in good order, then raises the signal again for this handler.
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        settings = load_settings(RetrieverSettings)
        listener = _listen(settings.host, settings.port)
    except ConfigurationError as error:
        refuse_to_start("retriever", error)
    set_up_logs("retriever")
    logging.captureWarnings(True)
    torch.set_num_threads(1)  # a query is too small to share
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, listener))


async def _serve(settings: RetrieverSettings, listener: socket.socket) -> int:
    started = time.monotonic()
    exit_code = 0
    metrics = Metrics()
    loop = asyncio.get_running_loop()

    def waits_for() -> str | None:
        waited = time.monotonic() - started > settings.history_wait_seconds
        if follower.caught_up.is_set() or waited:
            return None
        return "the users' histories are still being read from Kafka"

    def crash(error: BaseException) -> None:
        nonlocal exit_code
        exit_code = EXIT_BUG
        log.critical("bug", exc_info=error)
        server.should_exit = True

    def on_done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            crash(error)

    service = assemble(settings, metrics, waits_for)
    versions, server = service.versions, service.server()
    follower = HistoryFollower(
        service.histories,
        metrics,
        kafka_config=settings.confluent_config(),
        topic=Topics(settings.topic_prefix).micro_batches,
        lookback_seconds=settings.history_lookback_seconds,
        max_micro_batches=settings.history_max_micro_batches,
        partition_refresh_seconds=settings.partition_refresh_seconds,
        on_crash=lambda error: loop.call_soon_threadsafe(crash, error),
    )

    said = False

    def say_ready() -> None:
        nonlocal said
        if not said and versions.served is not None and service.not_ready() is None:
            said = True
            log.info("ready", model_version=versions.served.manifest.model_version)

    versions_task = asyncio.create_task(service.watch.run(settings.version_poll_seconds, say_ready))
    versions_task.add_done_callback(on_done)
    follower.start()
    host, port = listener.getsockname()[:2]
    log.info("listening", host=host, port=port)
    # What was loaded so far stays for good: a collection that walks all of torch stops every request for .1 s.
    gc.collect()
    gc.freeze()
    try:
        await server.serve(sockets=[listener])
    finally:
        versions_task.cancel()
        follower.stop()
        await service.index.close()
        log.info("stopped")
    return exit_code


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        problem = f"STREAMTOWER_RETRIEVER_HOST, _PORT: cannot listen on {host}:{port} ({error}); choose others"
        raise ConfigurationError([problem]) from None


def _settings_help() -> str:
    prefix = str(RetrieverSettings.model_config["env_prefix"])
    lines = ["Settings, all from environment variables:", ""]
    for name, field in RetrieverSettings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "" if default is None or default == () or isinstance(default, SecretStr) else f" [{default}]"
        lines += [f"  {prefix}{name.upper()}{shown}", f"      {' '.join((field.description or '').split())}"]
    return os.linesep.join(lines)


if __name__ == "__main__":
    sys.exit(main())
