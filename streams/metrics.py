"""What streams measures; served at /metrics on a port of its own.

Station: beside the data's way. Help texts are the formulas; docs/metrics.md is held against them. No label ever holds
an id or a partition.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from streams.batcher import CloseReason
from streams.validate import Reason

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """All metrics of one process, on a registry of its own; every child exists from the start."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry() if registry is None else registry
        stem = "streamtower_streams_"

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(stem + name, text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(stem + name, text, registry=registry)

        self.frequency_drift = gauge(
            "frequency_drift_ratio",
            "How far the item distribution has moved, 0 to 1: sqrt(distance^2 - noise^2), at least 0, where distance = "
            "1/2 * sum over 4096 hashed buckets of |share of recent clicks - share of older clicks| (total variation), "
            "both shares decayed exponentially and averaged over this process's partitions.",
        )
        self.frequency_drift_noise = gauge(
            "frequency_drift_noise_ratio",
            "The total variation distance that sampling alone would give if the item distribution had not moved.",
        )
        self.js_drift = gauge(
            "js_drift_ratio",
            "Jensen-Shannon distance of the same shares, 0 to 1, noise taken off likewise: distance^2 = 1/2 * sum "
            "of f*log2(f/m) + 1/2 * sum of s*log2(s/m), with f recent, s older and m = (f + s) / 2.",
        )
        self.js_drift_noise = gauge(
            "js_drift_noise_ratio",
            "The Jensen-Shannon distance that sampling alone would give if the item distribution had not moved.",
        )
        self.stability_index = gauge(
            "popularity_stability_index",
            "PSI: sum over the deciles of popularity of (f - s) * ln(f / s), f and s being its shares of recent and of "
            "older clicks, minus what sampling alone would give, at least 0; 0.1 is moderate, 0.25 significant.",
        )
        self.stability_noise = gauge(
            "popularity_stability_noise_index",
            "The PSI that sampling alone would give if the item distribution had not moved.",
        )
        self.young_clicks = gauge(
            "young_clicks_ratio",
            "Share of recent clicks whose item had its first click less than young_minutes before, by event time.",
        )
        self.young_clicks_usual = gauge("young_clicks_usual_ratio", "The same share of older clicks.")
        self.young_clicks_noise = gauge(
            "young_clicks_noise_ratio",
            "Standard deviation of young_clicks_ratio - young_clicks_usual_ratio while nothing moves.",
        )
        self.clicks = counter(
            "clicks_total", "Records taken from the clicks topic, accepted or not; delivered again: counted again."
        )
        self.dead_letters = counter(
            "dead_letters_total", "Records rejected and written to the dead-letter topic, by reason.", "reason"
        )
        self.duplicates = counter(
            "duplicates_total",
            "Accepted clicks left out because their event_id was among the last event_id_window ones of the partition.",
        )
        self.micro_batches = counter(
            "micro_batches_total",
            "Micro-batches acknowledged by the broker, by what closed them: size = an offset that is a multiple of the "
            "batch size; age = the wait of the oldest click.",
            "closed_by",
        )
        self.rows = counter("micro_batch_rows_total", "Accepted clicks in acknowledged micro-batches.")
        self.bytes = counter("micro_batch_bytes_total", "Bytes of acknowledged micro-batches, before compression.")
        self.processing_seconds = Histogram(
            stem + "processing_seconds",
            "Seconds from taking up a chunk of clicks to the acknowledgement of the last micro-batch and dead letter "
            "that it completed.",
            buckets=SECONDS,
            registry=registry,
        )
        self.send_seconds = Histogram(
            stem + "send_seconds",
            "Seconds from handing a micro-batch to the producer to the broker's acknowledgement.",
            buckets=SECONDS,
            registry=registry,
        )
        self.consumer_lag = gauge(
            "consumer_lag_messages",
            "Clicks in Kafka that are in no acknowledged micro-batch: end offset - next offset to pass on, summed over "
            "this process's partitions, as of the broker's last answer.",
        )
        self.kafka_up = gauge("kafka_up", "1 if Kafka answered the last request for the end offsets, else 0.")
        self.partitions = gauge("partitions", "Partitions of the clicks topic that this process owns.")
        self.commits = counter("commits_total", "Commits of clicks' offsets that the broker took.")
        self.replays = counter(
            "replays_total",
            "Times that a partition's state was brought up to its first click by replaying earlier ones.",
        )
        self.replayed_clicks = counter("replayed_clicks_total", "Records read for replays.")
        self.gap = counter(
            "gap_offsets_total",
            "Offsets passed over because retention had deleted clicks before this process read them: of = "
            "micro_batches: in no micro-batch; state: passed on before, but missing from histories and frequencies.",
            "of",
        )
        self.snapshots = counter("snapshots_total", "Snapshots of partitions' states written.")
        self.snapshot_failures = counter("snapshot_failures_total", "Snapshots that could not be written.")
        self.snapshots_skipped = counter(
            "snapshots_skipped_total",
            "Snapshots passed over when a partition's state was restored: torn = its checksum does not fit; foreign = "
            "files of other settings or another topic; unreadable = the file system gave an error.",
            "reason",
        )
        self.snapshot_seconds = Histogram(
            stem + "snapshot_seconds",
            "Seconds from a copied state to its snapshot written and older ones removed.",
            buckets=(*SECONDS[3:], 30.0, 60.0),
            registry=registry,
        )
        self.snapshot_timestamp = gauge("snapshot_timestamp_seconds", "Unix time of the newest snapshot written.")
        self.replaying = gauge("replaying_partitions", "Partitions whose state is being replayed now.")
        self.estimator_occupied = gauge(
            "estimator_occupied_ratio",
            "Buckets of the frequency estimator that were ever hit / all buckets, the fullest partition's; far above "
            "one half, items collide often.",
        )
        self.estimator_collisions = gauge(
            "estimator_collision_ratio",
            "Estimated share of items that share every bucket of theirs with another item, so that their frequency is "
            "overrated, the fullest partition's: (1 - (1 - 1/H)^(n - 1))^m, n by linear counting of the buckets hit.",
        )
        self.history_users = gauge("history_users", "Users whose history is held, summed over partitions.")
        self.ready = gauge("ready", "1 while this process has its partitions assigned, else 0.")
        for reason in Reason:
            self.dead_letters.labels(reason.value)
        for of in ("micro_batches", "state"):
            self.gap.labels(of)
        for skipped in ("torn", "foreign", "unreadable"):
            self.snapshots_skipped.labels(skipped)
        for close_reason in CloseReason:
            self.micro_batches.labels(close_reason.value)
