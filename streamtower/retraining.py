"""`streamtower replay`: a new model from past clicks, by the trainer's own code, that takes over from the live one.

Station: before a trainer. It finds the offsets of `clicks` to begin with, makes sure that the directory of checkpoints
is another one than that of the trainer so far and that this one has ended here, and becomes the new trainer. It learns
nothing itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from confluent_kafka import Consumer, KafkaException, TopicPartition

from streams.contract import Topics
from streams.service import EXIT_CONFIGURATION, ConfigurationError, load_settings
from streamtower.connection import EXIT_FAILURE, exit_codes
from streamtower.options import fail
from streamtower.topics import BrokerAwayError, TopicsError
from trainer.settings import TrainerSettings

Offsets = dict[int, int]
"""Partition of `clicks` → offset."""


def replay(
    begin: Annotated[
        str,
        typer.Option(
            "--from",
            help="beginning; OFFSETS of clicks as PARTITION:OFFSET,…; a TIME such as 2026-11-01T06:00+00:00, at which "
            "clicks came into Kafka; or a FILE of offsets: a JSON object, or the manifest.json of a published version.",
            metavar="OFFSETS|TIME|FILE",
        ),
    ],
    checkpoint_dir: Annotated[
        Path, typer.Option(help="Of the new trainer, another one than that of the trainer so far.", file_okay=False)
    ],
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the broker.")] = 30.0,
) -> None:
    """Train a new model from past clicks, and take over from the trainer so far, which must have been stopped.

    All settings are the trainer's own, STREAMTOWER_TRAINER_…. What is served stays until the new model has caught up.
    Give the same command again to go on with one that was interrupted.
    """
    with exit_codes():
        try:
            settings = load_settings(TrainerSettings)
            problem = problem_of_directories(settings.checkpoint_dir, checkpoint_dir)
            if problem:
                fail(problem, EXIT_FAILURE)
            offsets = find_offsets(begin, settings.confluent_config(), Topics(settings.topic_prefix), timeout)
        except ConfigurationError as error:
            fail(str(error), EXIT_CONFIGURATION)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--from") from None
    print(f"streamtower: learning from {json.dumps(offsets) if offsets else 'the beginning'}", file=sys.stderr)
    sys.stderr.flush()
    own = {"CHECKPOINT_DIR": str(checkpoint_dir), "LEARN_FROM": json.dumps(offsets)}
    environment = os.environ | {f"STREAMTOWER_TRAINER_{name}": value for name, value in own.items()}
    os.execve(sys.executable, [sys.executable, "-m", "trainer"], environment)  # noqa: S606 — a list of our own


def problem_of_directories(old: Path, new: Path) -> str | None:
    """Why a new trainer cannot take over from one whose checkpoints are in `old`; None: it can, as far as is known."""
    if old.resolve() == new.resolve():
        return f"{new} holds the checkpoints of the trainer so far: give another --checkpoint-dir"
    lock = old / "lock"
    if lock.exists():
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return f"the trainer with the checkpoints in {old} still runs: stop it first, or both would publish"
    return None


def find_offsets(begin: str, config: Mapping[str, Any], topics: Topics, timeout_seconds: float = 30.0) -> Offsets:
    """The offsets of `clicks` that `--from` means; partitions that are not in the result begin with their oldest click.

    Raises:
        ValueError: it means nothing.
        BrokerAwayError: a time was given, and nobody answers.
        TopicsError: a time was given, and there is no topic of clicks.
    """
    if begin == "beginning":
        return {}
    if Path(begin).is_file():
        return _of_file(Path(begin))
    if all(":" in pair and pair.replace(":", "", 1).isdecimal() for pair in begin.split(",")):
        pairs = [pair.split(":") for pair in begin.split(",")]
        return {int(partition): int(offset) for partition, offset in pairs}
    try:
        time = datetime.fromisoformat(begin)
    except ValueError:
        raise ValueError(f"{begin!r} is no time, no list of PARTITION:OFFSET and no file") from None
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return _at_time(time.timestamp(), config, topics.clicks, timeout_seconds)


def _of_file(path: Path) -> Offsets:
    try:
        plain = msgspec.json.decode(path.read_bytes())
        if isinstance(plain, dict) and "source_offsets" in plain:
            plain = plain["source_offsets"]
        offsets = msgspec.convert(plain, Offsets, strict=False)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} is no JSON object of partition → offset, and no manifest: {error}") from error
    if any(number < 0 for pair in offsets.items() for number in pair):
        raise ValueError(f"{path} has negative numbers")
    return offsets


def _at_time(seconds: float, config: Mapping[str, Any], topic: str, timeout_seconds: float) -> Offsets:
    """First offset of each partition whose record came in at or after a moment; else the partition's end."""
    consumer = Consumer({**config, "group.id": f"{topic}-replay", "enable.auto.commit": False, "log_level": 2})
    try:
        found = consumer.list_topics(topic, timeout=timeout_seconds).topics[topic]
        if found.error is not None or not found.partitions:
            raise TopicsError(f"there is no topic {topic}; `streamtower topics` makes it")
        asked = [TopicPartition(topic, partition, int(seconds * 1000)) for partition in found.partitions]
        offsets = {}
        for place in consumer.offsets_for_times(asked, timeout=timeout_seconds):
            end = consumer.get_watermark_offsets(place, timeout=timeout_seconds)[1]
            offsets[place.partition] = place.offset if place.offset >= 0 else end
        return offsets
    except KafkaException as error:
        where = config.get("bootstrap.servers")
        raise BrokerAwayError(f"no Kafka broker answers at {where}: {error.args[0].str()}") from error
    finally:
        consumer.close()
