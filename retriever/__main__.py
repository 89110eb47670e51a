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
import uvicorn
import uvloop
from pydantic import SecretStr

from retriever.arms import Arms
from retriever.histories import HistoryFollower, HistoryTable
from retriever.metrics import Metrics
from retriever.popular import Popular
from retriever.retrieve import Retriever
from retriever.search import Index, make_client
from retriever.service import create_app
from retriever.settings import RetrieverSettings
from retriever.versions import Versions
from retriever.watch import Watch
from streams.contract import Topics
from streams.service import EXIT_BUG, ConfigurationError, load_settings, refuse_to_start, set_up_logs

_GRACE_SECONDS = 4
"""How long requests under way may go on after a signal."""

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
    key = settings.qdrant_api_key
    client = make_client(settings.qdrant, key.get_secret_value() if key else None, settings.search_timeout_seconds)
    index = Index(client, metrics, hnsw_ef=settings.hnsw_ef, timeout_seconds=settings.search_timeout_seconds)
    versions = Versions(
        index,
        settings.alias,
        settings.model_dir,
        metrics,
        max_age_seconds=settings.version_max_age_seconds,
        second=settings.second_version,
    )
    arms = Arms(settings.second_share_ratio, settings.shadow_ratio)
    popular = Popular(index, settings.fallback_items) if settings.fallback_items else None
    watch = Watch(versions, index, metrics, popular)
    histories = HistoryTable(settings.max_users, settings.history_length)
    loop = asyncio.get_running_loop()

    def crash(error: BaseException) -> None:
        nonlocal exit_code
        exit_code = EXIT_BUG
        log.critical("bug", exc_info=error)
        server.should_exit = True

    def on_done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            crash(error)

    follower = HistoryFollower(
        histories,
        metrics,
        kafka_config=settings.confluent_config(),
        topic=Topics(settings.topic_prefix).micro_batches,
        lookback_seconds=settings.history_lookback_seconds,
        max_micro_batches=settings.history_max_micro_batches,
        partition_refresh_seconds=settings.partition_refresh_seconds,
        on_crash=lambda error: loop.call_soon_threadsafe(crash, error),
    )

    def not_ready() -> str | None:
        waited = time.monotonic() - started > settings.history_wait_seconds
        if versions.problem is None and not (follower.caught_up.is_set() or waited):
            return "the users' histories are still being read from Kafka"
        return versions.problem

    app = create_app(settings, Retriever(versions, index, histories, metrics, popular, arms), metrics, not_ready)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )

    said = False

    def say_ready() -> None:
        nonlocal said
        if not said and versions.served is not None and not_ready() is None:
            said = True
            log.info("ready", model_version=versions.served.manifest.model_version)

    versions_task = asyncio.create_task(watch.run(settings.version_poll_seconds, say_ready))
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
        await client.close()
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
