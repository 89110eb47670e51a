"""Sends a data set into Kafka, with a progress bar.

Station: between a data set and the producer, for `streamtower produce`; the demo's own pace is in `replay`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from streams.contract import Topics
from streamtower.datasets.clicks import Dataset
from streamtower.producer import ClickProducer
from streamtower.replay import TICK_SECONDS, Pace
from streamtower.topics import require_broker


def produce_dataset(
    dataset: Dataset,
    config: Mapping[str, Any],
    topics: Topics,
    *,
    rate: float | None,
    now: bool,
    limit: int | None,
    console: Console,
) -> dict[str, Any]:
    """Sends items, then clicks in time order, and waits until Kafka has acknowledged all of them.

    Args:
        rate: clicks a second; None: as fast as Kafka takes them.
        now: whether a click's event time is the moment at which it is sent.
        limit: most clicks; None: all.

    Returns:
        items, clicks, skipped (rows of the source without user, item or time) and seconds.

    Raises:
        BrokerAwayError: nobody answers.
        DeliveryError: some record was not acknowledged.
    """
    require_broker(config)
    started = time.monotonic()
    num_clicks = dataset.num_clicks if limit is None else min(limit, dataset.num_clicks)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    with bar, ClickProducer(config, topics) as producer:
        if dataset.num_items:
            for item in bar.track(dataset.items(), total=dataset.num_items, description="items"):
                producer.produce_item(item)
            producer.flush()
        task = bar.add_task("clicks", total=num_clicks)
        pace = None if rate is None else Pace(rate)
        due = sent = 0
        for piece in dataset.clicks():
            for event in piece.events():
                while pace is not None and not due:
                    due = pace.due()
                    if not due:
                        time.sleep(TICK_SECONDS)
                due -= 1
                producer.produce(msgspec.structs.replace(event, event_time=time.time()) if now else event)
                sent += 1
                if sent % 256 == 0 or sent == num_clicks:
                    bar.update(task, completed=sent)
                if sent == num_clicks:
                    break
            if sent == num_clicks:
                break
    return {
        "items": dataset.num_items,
        "clicks": sent,
        "skipped": dataset.num_skipped,
        "seconds": round(time.monotonic() - started, 3),
    }
