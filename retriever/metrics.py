"""What the retriever measures; served at /metrics of its HTTP port.

Station: beside the data's way. Help texts are the formulas; docs/metrics.md is held against them. No label ever holds
an id or a version.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

ROUTES = (
    "candidates",
    "batch",
    "query",
    "similar",
    "version",
    "history",
    "alive",
    "ready",
    "metrics",
    "openapi",
    "other",
)
CODES = ("2xx", "4xx", "5xx")
STAGES = ("encode", "search", "whole")
HISTORY_SOURCES = ("request", "followed", "none")
STALE = ("version", "items")
ARMS = ("live", "second")
REFUSALS = ("key", "rate", "overload")
SHADOWS = ("compared", "failed", "skipped")
OUTCOMES = ("applied", "old", "rejected")
REQUEST_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Edges of the request histogram; the objective stands at .025."""


class Metrics:
    """All metrics of one retriever, on a registry of its own; every child exists from the start."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry() if registry is None else registry
        stem = "streamtower_retriever_"

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(stem + name, text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(stem + name, text, registry=registry)

        def gauge_of(name: str, text: str, label: str) -> Gauge:
            return Gauge(stem + name, text, (label,), registry=registry)

        self.requests = counter(
            "requests_total", "HTTP requests answered, by route and class of status code.", "route", "code"
        )
        self.request_seconds = Histogram(
            stem + "request_seconds",
            "Seconds of a /v1/candidates request that was answered with candidates: encode = query tower; "
            "search = Qdrant, retries included; whole = from the request's head to the answer's last byte.",
            ("stage",),
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.in_flight = gauge("requests_in_flight", "Requests to /v1/* that are being answered now.")
        self.refused = counter(
            "requests_refused_total",
            "Requests to /v1/* turned away before they were read: key = no valid API key; rate = the caller's rate "
            "limit; overload = max_in_flight requests were under way.",
            "reason",
        )
        self.key_file_failures = counter(
            "key_file_failures_total", "Times that api_keys_file had changed and could not be read again."
        )
        self.queries = counter(
            "queries_total",
            "Queries answered with candidates, by where their history came from: the request, the followed stream, "
            "none (a cold user).",
            "history",
        )
        self.candidates = counter("candidates_total", "Candidates given in answers.")
        self.short_answers = counter("short_answers_total", "Answers with fewer candidates than the k asked for.")
        self.fallbacks = counter(
            "fallbacks_total", "Queries answered with popular items kept in memory, because Qdrant did not answer."
        )
        self.foreign_points = counter(
            "foreign_points_total", "Points left out of an answer because their payload has no item_id."
        )
        self.qdrant_retries = counter("qdrant_retries_total", "Calls to Qdrant repeated after an error that may pass.")

        self.qdrant_up = gauge("qdrant_up", "1 if the last look-up of the alias was answered by Qdrant, else 0.")
        self.model_version = gauge("model_version", "Number of the version that is served; 0 before the first.")
        self.version_created = gauge(
            "version_created_timestamp_seconds",
            "When the trainer made the version that is served, in seconds since the epoch; 0 before the first.",
        )
        self.staleness = gauge_of(
            "staleness_seconds",
            "Age of what is served, now: version = since the trainer made the version; items = since an item of the "
            "live collection was last seen to have changed. Grows while the trainer is away; 0 before the first "
            "version.",
            "of",
        )
        self.arm_version = gauge_of(
            "arm_version", "Number of the version of each arm: the live one, and second_version; 0: not there.", "arm"
        )
        self.arm_queries = counter(
            "arm_queries_total", "Queries answered by each arm; with second_share_ratio an A/B test.", "arm"
        )
        self.arm_seconds = Histogram(
            stem + "arm_seconds",
            "Seconds of encoding and searching, shadow queries included, by arm; of a batch once.",
            ("arm",),
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.shadow_candidates = counter(
            "shadow_candidates_total", "Candidates in the live version's answers to the shadow queries compared."
        )
        self.shadow_shared = counter(
            "shadow_shared_candidates_total",
            "Those of shadow_candidates_total that second_version gives too; their ratio is the overlap.",
        )
        self.shadows = counter(
            "shadow_queries_total",
            "Queries given to second_version in the shadow: compared; failed; skipped = too many were under way.",
            "outcome",
        )
        self.version_switches = counter("version_switches_total", "Times that another version began to be served.")
        self.version_load_failures = counter(
            "version_load_failures_total",
            "Times that the version named by the alias could not be loaded; the one before stays served.",
        )

        self.kafka_up = gauge("kafka_up", "1 if Kafka answered the last request for the topic's partitions, else 0.")
        self.kafka_errors = counter("kafka_errors_total", "Errors that the Kafka client has reported.")
        self.micro_batches = counter(
            "micro_batches_total",
            "Micro-batches read for histories: applied = at least one row was new; old = every row had been seen; "
            "rejected = broke the contract and was passed over.",
            "outcome",
        )
        self.clicks = counter("clicks_total", "Clicks (rows of micro-batches) that were new to the histories.")
        self.users = gauge("users", "Users whose history is held.")
        self.users_evicted = counter(
            "users_evicted_total", "Users dropped because max_users others have clicked since."
        )
        self.consumer_lag = gauge(
            "consumer_lag_messages",
            "Micro-batches in Kafka that are not read yet, over all partitions, as of Kafka's last answer.",
        )
        self.followed = gauge(
            "followed_click_timestamp_seconds",
            "Largest ingest time among the clicks in the histories, in seconds since the epoch; 0 before the first.",
        )
        for route in ROUTES:
            for code in CODES:
                self.requests.labels(route, code)
        for stage in STAGES:
            self.request_seconds.labels(stage)
        for source in HISTORY_SOURCES:
            self.queries.labels(source)
        for arm in ARMS:
            for metric in (self.arm_version, self.arm_queries, self.arm_seconds):
                metric.labels(arm)
        for shadow in SHADOWS:
            self.shadows.labels(shadow)
        for of in STALE:
            self.staleness.labels(of)
        for reason in REFUSALS:
            self.refused.labels(reason)
        for outcome in OUTCOMES:
            self.micro_batches.labels(outcome)
