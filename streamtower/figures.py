"""The figures that a running Streamtower is judged by, from one reading of its metrics.

Station: between `watch` and what is shown or written. Every figure is one the services publish; docs/metrics.md has
their formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamtower.watch import Reading

SERVABLE = "streamtower_trainer_click_to_servable_seconds"


@dataclass(frozen=True)
class Figures:
    """NaN stands for what no service has said yet."""

    clicks_received: float
    clicks_learnt: float
    clicks_dead_lettered: float
    micro_batches: float
    steps: float
    lag_clicks: float
    """Clicks in no micro-batch yet."""
    lag_micro_batches: float
    """Micro-batches not learnt yet."""
    loss_first: float
    loss: float
    frequency_drift: float
    recall_at_10: float
    recall_at_100: float
    popularity_recall_at_10: float
    popularity_recall_at_100: float
    items_known: float
    items_published: float
    index_version: float
    click_to_servable_p50_seconds: float
    click_to_servable_p95_seconds: float


def figures(reading: Reading) -> Figures:
    """The figures of one reading."""
    value = reading.value

    def once(counter: str, name: str, **labels: str) -> float:
        """A gauge that means something only once a counter has counted."""
        return value(name, **labels) if value(counter) > 0 else math.nan

    def recall(what: str, k: int) -> float:
        name = f"streamtower_trainer_{what}_recall_at_k"
        return once("streamtower_trainer_clicks_evaluated_total", name, k=str(k))

    learnt = "streamtower_trainer_clicks_learnt_total"
    return Figures(
        clicks_received=value("streamtower_streams_clicks_total"),
        clicks_learnt=value(learnt),
        clicks_dead_lettered=value("streamtower_streams_dead_letters_total"),
        micro_batches=value("streamtower_trainer_micro_batches_total"),
        steps=value("streamtower_trainer_steps_total"),
        lag_clicks=value("streamtower_streams_consumer_lag_messages"),
        lag_micro_batches=value("streamtower_trainer_consumer_lag_messages"),
        loss_first=once(learnt, "streamtower_trainer_loss_first"),
        loss=once(learnt, "streamtower_trainer_loss"),
        frequency_drift=value("streamtower_streams_frequency_drift_ratio"),
        recall_at_10=recall("prequential", 10),
        recall_at_100=recall("prequential", 100),
        popularity_recall_at_10=recall("popularity", 10),
        popularity_recall_at_100=recall("popularity", 100),
        items_known=value("streamtower_trainer_items_known"),
        items_published=value("streamtower_trainer_items_published_total"),
        index_version=value("streamtower_trainer_index_version"),
        click_to_servable_p50_seconds=reading.quantile(SERVABLE, 0.5),
        click_to_servable_p95_seconds=reading.quantile(SERVABLE, 0.95),
    )
