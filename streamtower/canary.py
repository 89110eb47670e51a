"""Measures from outside how long a click takes until the index shows its effect.

Station: both ends of the data's way. It sends clicks of a user and on an item that nobody is, which go through Kafka,
streams and trainer like all others and are learnt nowhere, and looks in Qdrant for the point that tells of them. That
point has no vectors, so that no search finds it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from streams.contract import CANARY_HASH, CANARY_ID, ClickEvent, Topics, encode_event
from streamtower.producer import ClickProducer
from streamtower.topics import num_partitions
from trainer.contract import EVENT_TIME

LOOK_SECONDS = 0.05
INEXACT_SECONDS = 0.001
"""Qdrant's JSON gives back one number in eight with another last digit."""


@dataclass(frozen=True)
class Probe:
    """One click's way."""

    partition: int
    """Of the topic of clicks."""
    seconds: float | None
    """From before it was sent until the index showed it; None: it did not in time."""


def probes(
    config: Mapping[str, Any], topics: Topics, client: QdrantClient, alias: str, *, every: float, timeout: float
) -> Iterator[Probe]:
    """Sends a click every so often, to one partition after the other, and waits for each.

    Args:
        config: how to connect to Kafka, for confluent-kafka.
        topics: names.
        client: of Qdrant.
        alias: names the live collection.
        every: seconds between the beginnings of two probes, if the first has ended by then.
        timeout: seconds after which one is given up.

    Raises:
        BrokerAwayError: nobody answers at the beginning.
        TopicsError: there is no topic of clicks.
        DeliveryError: Kafka did not acknowledge a click.
    """
    count = num_partitions(config, topics.clicks)
    number = 0
    with ClickProducer(config, topics) as producer:
        while True:
            started, sent_at, partition = time.monotonic(), time.time(), number % count
            click = ClickEvent(user_id=CANARY_ID, item_id=CANARY_ID, event_time=sent_at)
            producer.produce_record(CANARY_ID.encode(), encode_event(click), partition)
            producer.flush()
            while not (is_visible := _shows(client, alias, sent_at)) and time.monotonic() - started < timeout:
                time.sleep(LOOK_SECONDS)
            yield Probe(partition, time.monotonic() - started if is_visible else None)
            number += 1
            time.sleep(max(0.0, started + every - time.monotonic()))


def _shows(client: QdrantClient, alias: str, sent_at: float) -> bool:
    try:
        found = client.retrieve(alias, [CANARY_HASH], with_payload=[EVENT_TIME])
    except (ResponseHandlingException, UnexpectedResponse, ResourceExhaustedResponse):
        return False  # not there yet, or away: that is what is measured
    # Another prober's newer click tells the same; one from the future tells nothing.
    earliest, latest = sent_at - INEXACT_SECONDS, time.time() + INEXACT_SECONDS
    return any(earliest < (point.payload or {}).get(EVENT_TIME, 0.0) < latest for point in found)
