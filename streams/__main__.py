"""`python -m streams`: settings → topics checked → metrics served → the Faust app in a worker, until a signal.

Station: wiring alone. It says `ready` once partitions are assigned.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

import structlog
import uvloop
from aiokafka.errors import KafkaError
from pydantic import SecretStr

from streams.agent import create_app, warm_up
from streams.broker import ClicksOnBroker, DependencyError
from streams.contract import Topics
from streams.metrics import Metrics
from streams.serve import serve
from streams.service import (
    EXIT_BUG,
    EXIT_DEPENDENCY,
    ConfigurationError,
    load_settings,
    refuse_to_start,
    set_up_logs,
)
from streams.settings import StreamsSettings

log = structlog.get_logger("streams")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the service; returns its exit code."""
    argparse.ArgumentParser(
        prog="python -m streams",
        description="Turns clicks from Kafka into micro-batches with histories and sampling probabilities.",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    try:
        settings = load_settings(StreamsSettings)
        set_up_logs("streams")
        for handler in logging.getLogger().handlers:
            handler.addFilter(_Rarely())
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # Faust makes loops of its own, in threads
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        metrics = Metrics()
        app = create_app(settings, metrics)
        serve(settings, metrics, app.latest_movers)
        topics = Topics(settings.topic_prefix)
        ClicksOnBroker(
            settings.confluent_config(), topics, settings.consumer_group, settings.dependency_deadline_seconds
        ).check_topics()
    except ConfigurationError as error:
        refuse_to_start("streams", error)
    except DependencyError as error:
        log.critical("dependency away", exit_code=EXIT_DEPENDENCY, reason=str(error))
        return EXIT_DEPENDENCY
    warm_up()
    worker = app.Worker(loop=loop, quiet=True, override_logging=False, redirect_stdouts=False)
    worker.spinner = None
    try:
        worker.execute_from_commandline()  # ends with SystemExit, 0 after a signal
    except SystemExit as ended:
        if ended.code in (0, None):
            return 0
        if isinstance(ended.__context__, KafkaError):  # before the first fetch: Kafka went away since it was asked
            log.critical("dependency away", exit_code=EXIT_DEPENDENCY, reason=repr(ended.__context__))
            return EXIT_DEPENDENCY
    except KafkaError as error:
        log.critical("dependency away", exit_code=EXIT_DEPENDENCY, reason=repr(error))
        return EXIT_DEPENDENCY
    return EXIT_DEPENDENCY if isinstance(worker.crash_reason, KafkaError) else EXIT_BUG


class _Rarely(logging.Filter):
    """One line of each kind in ten seconds is enough from libraries: without Kafka, aiokafka writes 100 a second."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.name, str(record.msg)[:80]
        if record.created < self._next.get(kind, 0.0):
            return False
        if len(self._next) > 1_000:
            self._next.clear()
        self._next[kind] = record.created + 10.0
        return True


def _settings_help() -> str:
    lines = ["All settings are environment variables:", ""]
    for name, field in StreamsSettings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "a secret, unset" if isinstance(default, SecretStr) else repr(default)
        lines += [f"  STREAMTOWER_STREAMS_{name.upper()} (default: {shown})", f"      {field.description}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
