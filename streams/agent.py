"""The Faust app: an agent on the clicks topic, its partitions' workers, and what watches over both. Wiring only.

Station: takes chunks from Faust and hands each to its partition's worker. It decides nothing about clicks.

No exception leaves the agent or a worker: an error that is not the data's ends the process, without acknowledging what
was under way, so that Kafka delivers it again.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import faust
import numpy as np
import structlog
from faust.types import TP

from streams.batcher import CloseReason, Cut, micro_batch
from streams.broker import ClicksOnBroker, DependencyError
from streams.chunks import ChunkApp
from streams.contract import Topics
from streams.dead_letter import EXIT_BAD_INPUT, RejectedShare
from streams.metrics import Metrics
from streams.movers import MoversReport, top_movers
from streams.partition import Partitions, PartitionWorker, RetentionExpiredError, TooManyRejectedError
from streams.send import Sender, TooLargeError
from streams.service import EXIT_BUG, EXIT_CONFIGURATION, EXIT_DEPENDENCY
from streams.settings import StreamsSettings
from streams.snapshot import SnapshotKeeper, Snapshots
from streams.state import PartitionState, StateConfig
from streams.validate import validate
from streams.watch import Watcher

_MAX_REQUEST_BYTES = 16 << 20
"""Largest record that the producer takes; the topics' own limits are lower."""

_STOP_SECONDS = 7.0

log = structlog.get_logger("streams")


class StreamsApp(ChunkApp):
    """A ChunkApp that ends in time: Faust waits for Kafka at the end, and without end if Kafka is gone."""

    watcher: Watcher | None = None
    """From the start of the worker on."""

    def latest_movers(self) -> MoversReport:
        """What the watcher found last; from any thread."""
        return self.watcher.movers if self.watcher else MoversReport()

    async def on_stop(self) -> None:
        def leave() -> None:
            failed = self.crash_reason is not None
            end_process(EXIT_BUG if failed else 0, "ended without Kafka's goodbye", after_seconds=_STOP_SECONDS)

        # What is not committed comes again, so that nothing is lost by leaving.
        timer = threading.Timer(_STOP_SECONDS, leave)
        timer.daemon = True
        timer.start()
        await super().on_stop()


def create_app(settings: StreamsSettings, metrics: Metrics | None = None) -> StreamsApp:
    """The app, ready for `faust worker` or a Worker of one's own. Asks nothing of Kafka before it is started.

    Raises:
        ConfigurationError: settings that cannot work together, or a directory that cannot be written to.
        DependencyError: the place of the snapshots, elsewhere, cannot be reached.
    """
    metrics = metrics or Metrics()
    topics = Topics(settings.topic_prefix)
    group = settings.topic_prefix + settings.consumer_group
    deadline = settings.dependency_deadline_seconds
    app = StreamsApp(
        group,
        broker=[f"kafka://{server.strip()}" for server in settings.kafka.split(",")],
        broker_client_id="streamtower-streams",
        broker_commit_interval=settings.commit_interval_seconds,
        broker_credentials=_credentials(settings),
        broker_heartbeat_interval=settings.session_timeout_seconds / 3,
        broker_max_poll_interval=86_400.0,  # a replay may hold chunks back for long; the broker is watched by ourselves
        broker_session_timeout=settings.session_timeout_seconds,
        chunk_max_inflight=settings.max_clicks_in_flight,
        chunk_start_deadline=deadline,
        datadir=Path(tempfile.gettempdir()) / "streamtower-streams",  # Faust wants one; nothing is kept there
        producer_acks=-1,
        producer_max_request_size=_MAX_REQUEST_BYTES,
        producer_request_timeout=deadline,
        # Workers finish or drop by themselves what they hold; Faust would wait for a replay, and without end for Kafka.
        stream_wait_empty=False,
        consumer_group_instance_id=settings.group_instance_id or None,
        monitor=(monitor := _CommitMonitor(metrics, topics.clicks)),
    )
    sender = Sender(lambda *record: app.producer.send(*record), deadline)
    clicks_on_broker = ClicksOnBroker(settings.confluent_config(), topics, group, deadline)
    snapshots = None
    if settings.snapshots:
        snapshots = Snapshots(
            settings.snapshots,
            topics.clicks,
            clicks_on_broker.topic_id,
            settings.state_config(),
            metrics,
            keep=settings.keep_snapshots,
        )
    rejected_share = RejectedShare(settings.max_rejected_ratio, settings.rejected_window_clicks)

    def end(error: BaseException) -> None:
        if isinstance(error, DependencyError):
            end_process(EXIT_DEPENDENCY, "dependency away", reason=str(error))
        if isinstance(error, TooLargeError):
            end_process(EXIT_CONFIGURATION, "topic too narrow", reason=str(error))
        if isinstance(error, RetentionExpiredError):
            end_process(EXIT_CONFIGURATION, "retention expired", reason=str(error))
        if isinstance(error, TooManyRejectedError):
            asyncio.create_task(end_after_commit(error))  # noqa: RUF006 - it ends the process
            return
        end_process(EXIT_BUG, "bug", exc_info=error)

    async def end_after_commit(error: TooManyRejectedError) -> None:
        """So that a restart begins behind what was rejected, and does not write the same dead letters again."""
        await commit()
        end_process(EXIT_BAD_INPUT, "too many rejected", reason=str(error))

    async def commit() -> None:
        try:
            await app.consumer.commit()
        except Exception as error:  # what is not committed comes again
            log.warning("not committed", reason=repr(error))

    partitions = Partitions(
        lambda partition: PartitionWorker(
            partition, settings, topics, sender, clicks_on_broker, metrics, rejected_share, snapshots
        ),
        end,
    )
    monitor.on_commit = partitions.note_committed

    async def take_chunks(stream: Any) -> None:
        async for event in stream.noack().events():
            try:
                partitions.worker(event.value.partition).put(event)
            except Exception as error:
                end(error)

    async def on_partitions_revoked(app: ChunkApp, revoked: set[TP], **_: object) -> None:
        metrics.ready.set(0)
        partitions.is_assigned = False
        await commit()

    async def on_partitions_assigned(app: ChunkApp, assigned: set[TP], **_: object) -> None:
        owned = {tp.partition for tp in assigned if tp.topic == topics.clicks}
        partitions.keep_only(owned)
        partitions.is_assigned = True
        metrics.partitions.set(len(owned))
        metrics.ready.set(1)
        log.info("ready", partitions=sorted(owned))

    async def on_before_shutdown(app: ChunkApp, **_: object) -> None:
        metrics.ready.set(0)
        partitions.keep_only(set())

    async def watch() -> None:
        app.watcher = Watcher(partitions, clicks_on_broker, metrics, deadline)
        try:
            await app.watcher.run()
        except Exception as error:
            end(error)

    async def keep_snapshots() -> None:
        if snapshots:
            try:
                await SnapshotKeeper(partitions, snapshots, metrics, settings.snapshot_interval_seconds).run()
            except Exception as error:
                end(error)

    app.agent(app.chunk_topic(topics.clicks), name="clicks")(take_chunks)
    app.on_partitions_revoked.connect(on_partitions_revoked)
    app.on_partitions_assigned.connect(on_partitions_assigned)
    app.on_before_shutdown.connect(on_before_shutdown)
    app.task()(watch)
    app.task()(keep_snapshots)
    return app


class _CommitMonitor(faust.Monitor):  # type: ignore[misc]
    """Faust's monitor, which hears of each commit; the others of its numbers are not used."""

    on_commit: Callable[[Mapping[int, int]], None]
    """Called with the offsets of the clicks topic, by partition."""

    def __init__(self, metrics: Metrics, topic: str) -> None:
        super().__init__()
        self._commits, self._topic = metrics.commits, topic

    def on_tp_commit(self, tp_offsets: dict[TP, int]) -> None:
        self._commits.inc()
        self.on_commit({tp.partition: offset for tp, offset in tp_offsets.items() if tp.topic == self._topic})


def _credentials(settings: StreamsSettings) -> faust.types.CredentialsT | None:
    protocol = settings.kafka_security_protocol
    context = ssl.create_default_context(cafile=settings.kafka_ca_file) if protocol.endswith("SSL") else None
    if protocol.startswith("SASL"):
        password = settings.kafka_password
        assert password is not None  # else the settings would have been refused
        return faust.SASLCredentials(
            username=settings.kafka_username,
            password=password.get_secret_value(),
            mechanism=settings.kafka_sasl_mechanism,
            ssl_context=context,
        )
    return faust.SSLCredentials(context) if context else None


def warm_up() -> None:
    """Sends one click through the core, so that what is compiled or imported late is so before clicks wait for it."""
    values: list[bytes | None] = [b'{"user_id":"u","item_id":"i","event_time":1}']
    offsets = np.zeros(1, np.int64)
    clicks, _ = validate(values, offsets, offsets.astype(np.float64))
    state = PartitionState(StateConfig(num_buckets=2, max_users=1))
    learnt = state.learn(clicks, 1)
    top_movers([state.movers])
    micro_batch(0, Cut(0, 1, clicks, CloseReason.SIZE), learnt).encode()


def end_process(exit_code: int, event: str, **details: object) -> NoReturn:
    """Ends the process at once. Nothing is acknowledged and no handler of Faust's gets to acknowledge anything."""
    log.critical(event, exit_code=exit_code, **details)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
