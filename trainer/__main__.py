"""`python -m trainer`: reads the settings, puts the parts together, runs the loop, ends with a meaningful exit code.

Station: the trainer's doorstep. torch is loaded only after the settings are good.

Speed, beyond settings: torch's OpenMP threads are told not to spin (`OMP_WAIT_POLICY=passive`), and glibc's malloc to
keep what it has freed, before torch is loaded; variables that are set already win.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

import structlog

from streams.contract import Topics
from streams.service import (
    EXIT_BUG,
    EXIT_DEPENDENCY,
    ConfigurationError,
    load_settings,
    refuse_to_start,
    set_up_logs,
)
from trainer.settings import TrainerSettings, settings_hash

if TYPE_CHECKING:
    from trainer.loop import Loop
    from trainer.metrics import Metrics

MALLOC_BYTES = 32 << 20
"""Blocks up to this size come from the heap, and so much of it stays when freed."""

log = structlog.get_logger()


def main() -> None:
    """Runs the trainer until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description=(TrainerSettings.__doc__ or "") + " All settings are environment variables.",
        epilog=_list_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    stop = threading.Event()

    def leave(signum: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    try:
        settings = load_settings(TrainerSettings)
        set_up_logs("trainer")
        logging.captureWarnings(True)
        _tune(settings.num_threads)
        code = _run(settings, stop)
    except ConfigurationError as error:
        refuse_to_start("trainer", error)
    # Not through the interpreter's end: a thread that still waits for a server must not hold the process up.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(settings: TrainerSettings, stop: threading.Event) -> int:
    from prometheus_client import start_http_server

    from trainer.checkpoint import CheckpointError
    from trainer.guard import pass_over
    from trainer.metrics import Metrics
    from trainer.source import ForeignTopicError, RetentionExpiredError, SourceAwayError, SourceStoppedError

    metrics = Metrics()
    try:
        server, _ = start_http_server(settings.metrics_port, settings.metrics_host, registry=metrics.registry)
    except OSError as error:
        raise ConfigurationError(
            [f"STREAMTOWER_TRAINER_METRICS_PORT: {settings.metrics_host}:{settings.metrics_port}: {error}"]
        ) from error
    log.info("listening", metrics=f"http://{settings.metrics_host}:{server.server_port}/metrics")
    loop = None
    try:
        loop = build(settings, metrics, stop)
        while not _run_to_the_end(loop, stop):
            left = loop.progress
            loop.publisher.close()
            loop.source.close()
            loop.checkpoints.close()
            loop = build(settings, metrics, stop)
            pass_over(loop.progress, left, metrics)
    except (CheckpointError, ForeignTopicError) as error:
        raise ConfigurationError([f"STREAMTOWER_TRAINER_CHECKPOINT_DIR: {error}"]) from error
    except RetentionExpiredError as error:
        raise ConfigurationError([f"STREAMTOWER_TRAINER_RETENTION_EXPIRED: {error}"]) from error
    except SourceAwayError as error:
        log.error("kafka is away", error=str(error))
        return EXIT_DEPENDENCY
    except SourceStoppedError:
        log.info("ended while waiting for kafka")
        return 0
    except ConfigurationError:
        raise
    except Exception:
        log.exception("a bug or a broken invariant: nothing of it was saved, a restart takes the work up again")
        return EXIT_BUG
    finally:
        if loop is not None:
            loop.source.close()
    log.info("ended", clicks_learnt=loop.progress.clicks_learnt)
    return 0


def _run_to_the_end(loop: Loop, stop: threading.Event) -> bool:
    """Runs the loop; False if it is to be begun again with the newest checkpoint."""
    from trainer.guard import RollBackError

    try:
        loop.run(stop)
    except RollBackError:
        return False
    return True


def build(settings: TrainerSettings, metrics: Metrics, stop: threading.Event) -> Loop:
    """The loop with all its parts, as the newest checkpoint had them, or new; `stop` ends waiting for Kafka.

    Raises:
        ConfigurationError: lists what the towers or the directories refuse.
        CheckpointError: the checkpoint directory cannot be used.
    """
    import torch

    from trainer.checkpoint import Checkpoints
    from trainer.guard import Guard
    from trainer.index import Index, new_client
    from trainer.loop import Loop
    from trainer.model import new_model
    from trainer.progress import Progress
    from trainer.publish import Publisher
    from trainer.rollout import PublishSettings, Rollout
    from trainer.source import KafkaSource
    from trainer.versions import Versions

    torch.set_num_threads(settings.num_threads)
    try:
        model = new_model(settings)
        versions = Versions(settings.model_dir)
    except ValueError as error:
        raise ConfigurationError([f"the towers: {line}" for line in str(error).splitlines()]) from error
    except OSError as error:
        raise ConfigurationError([f"STREAMTOWER_TRAINER_MODEL_DIR: cannot be written to: {error}"]) from error
    identity = settings.identity()
    checkpoints = Checkpoints(
        settings.checkpoint_dir,
        identity,
        metrics,
        keep=settings.keep_checkpoints,
        interval_seconds=settings.checkpoint_interval_seconds,
    )
    progress = checkpoints.restore(model) or Progress(learnt=dict(settings.learn_from or {}))
    stopping = threading.Event()
    api_key = settings.qdrant_api_key.get_secret_value() if settings.qdrant_api_key else None
    index = Index(
        new_client(settings.qdrant, api_key, settings.qdrant_timeout_seconds),
        settings.alias,
        attempts=settings.qdrant_attempts,
        payload_indexes=settings.payload_indexes,
        on_retry=metrics.qdrant_retries.inc,
        stopping=stopping,
    )
    names = PublishSettings.__dataclass_fields__.keys() & TrainerSettings.model_fields.keys()
    publish = PublishSettings(
        **{name: getattr(settings, name) for name in names}, settings_hash=settings_hash(identity)
    )
    rollout = Rollout(index, versions, publish)
    topics = Topics(settings.topic_prefix)
    return Loop(
        source=KafkaSource(
            settings.confluent_config(),
            topics,
            metrics,
            deadline_seconds=settings.kafka_deadline_seconds,
            retention_expired=settings.retention_expired,
            learn_from=settings.learn_from,
            stopping=stop,
        ),
        model=model,
        checkpoints=checkpoints,
        publisher=Publisher(rollout, model, progress, metrics, stopping=stopping),
        progress=progress,
        metrics=metrics,
        guard=Guard(
            metrics,
            window_clicks=settings.evaluation_window_clicks,
            norm_factor=settings.guard_norm_factor,
            recall_ratio=settings.guard_recall_ratio,
            rolls_back=settings.guard == "rollback",
        ),
    )


def _tune(num_threads: int) -> None:
    for name, value in (
        ("OMP_NUM_THREADS", str(num_threads)), ("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0"),
    ):  # fmt: skip
        os.environ.setdefault(name, value)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    for option in (m_mmap_threshold, m_trim_threshold, m_top_pad):
        mallopt(option, MALLOC_BYTES)


def _list_settings() -> str:
    prefix = str(TrainerSettings.model_config["env_prefix"])
    lines = []
    for name, field in TrainerSettings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        lines += [f"{prefix}{name.upper()}  (default {default!r})", f"    {field.description or ''}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
