"""Settings of streams, all from environment variables STREAMTOWER_STREAMS_*.

Station: read once at start, through `streams.service.load_settings`; nothing else here reads the environment.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from streams.service import KafkaSettings
from streams.state import StateConfig

Preset = Literal["default", "paper"]
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"estimator_mode": "batch", "estimator_initial_gap": 100.0, "num_hashes": 1},
}
"""Values that a preset gives to the settings that are not set themselves."""


class StreamsSettings(KafkaSettings):
    """How clicks are validated, counted and cut into micro-batches, and how the service behaves on Kafka."""

    model_config = SettingsConfigDict(env_prefix="STREAMTOWER_STREAMS_", frozen=True, use_attribute_docstrings=True)

    preset: Preset = "default"
    """Defaults of the frequency estimator. default: those listed here; paper: as in the paper (Algorithm 2: one hash, a
    step a micro-batch, once for each distinct item, A = 0 and B = 100 at first, rate alpha, always 1 / B).
    A setting that is set itself wins over the preset. The trainer's settings have a preset of their own."""
    consumer_group: str = Field("streamtower-streams", pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """Consumer group, put behind the topic prefix; workers of one group share the partitions."""

    batch_size: int = Field(256, ge=1, le=65_536)
    """A micro-batch closes at source offsets that are multiples of this."""
    batch_age_seconds: float = Field(0.25, ge=0.001, le=60)
    """A micro-batch also closes when its oldest click has waited so long, in seconds."""
    max_micro_batch_bytes: int = Field(3_670_016, ge=131_072, le=104_857_600)
    """A longer micro-batch is sent in halves, in bytes; must stay below max.message.bytes of the topic."""

    max_click_bytes: int = Field(65_536, ge=256, le=131_072)
    """Longer clicks become dead letters, in bytes."""
    max_rejected_ratio: float = Field(0.5, gt=0, le=1)
    """If more than this share of the last `rejected_window_clicks` became dead letters, the service stops; 1: never."""
    rejected_window_clicks: int = Field(10_000, ge=100, le=100_000_000)
    """Clicks over which the share of dead letters is taken; before so many came, nothing is judged."""

    estimator_mode: Literal["click", "batch"] = "click"
    """click: counts gaps in clicks, which gives shares of clicks. batch: the paper's, counts gaps in micro-batches."""
    estimator_initial_gap: float = Field(0.0, ge=0, le=1e9)
    """The gap that the frequency estimator begins with everywhere, at least 1, in clicks or micro-batches, as the mode
    says: then it counts as the paper prints it. 0: no such gap; it warms up, and an item gone quiet is told by the time
    since (docs/deviations.md)."""
    num_buckets: int = Field(2**18, ge=2, le=2**30)
    """Buckets of the frequency estimator for each hash, 16 bytes each; several times the number of live items."""
    num_hashes: int = Field(4, ge=1, le=16)
    """Hashes of the frequency estimator."""
    alpha: float = Field(0.01, gt=0, le=1)
    """Rate of the frequency estimator: it remembers about an item's last 1 / alpha gaps."""
    history_length: int = Field(20, ge=1, le=255)
    """Items in a user's history."""
    history_users: int = Field(2**18, ge=1, le=2**26)
    """Users of one partition whose history is kept, those who clicked last; 8 · history_length + 28 bytes each."""
    event_id_window: int = Field(0, ge=0, le=2**26)
    """Distinct event_ids of a partition that are remembered: a click that brings one of them again is left out. 16 to
    24 bytes each; 0: clicks are never compared."""
    drift_fast_clicks: float = Field(5_000, ge=1, le=1e9)
    """Window of the newer of the two item distributions that the drift compares, in clicks of a partition."""
    drift_slow_clicks: float = Field(50_000, ge=1, le=1e9)
    """Window of the older one; longer."""
    young_minutes: float = Field(60.0, gt=0, le=5_256_000)
    """An item is young for so many minutes after its first click; how many clicks go to young items is a metric."""

    snapshots: str = "snapshots"
    """Where partitions' states are kept, so that a start replays little: a directory, or any fsspec URL such as
    s3://bucket/path (with its package installed). Workers that share it take over from each other's. Empty: nowhere;
    then each start replays all clicks that Kafka still has."""
    snapshot_interval_seconds: float = Field(30.0, ge=0.1, le=86_400)
    """Time between snapshots of a partition, in seconds; a start replays about as much."""
    keep_snapshots: int = Field(3, ge=1, le=100)
    """Newest snapshots of each partition that are kept."""
    retention_expired: Literal["fail", "earliest", "latest"] = "fail"
    """If Kafka has deleted clicks that are needed still: fail: end with an explanation; earliest: go on with the oldest
    that are left; latest: with those that are yet to come. What is passed over is counted."""
    group_instance_id: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,200}$")
    """Name of this worker that it keeps through restarts (static membership), another for each: then a restart within
    the session timeout moves no partition. Empty: none."""

    dependency_deadline_seconds: float = Field(60.0, ge=1, le=3_600)
    """The service ends if Kafka has not answered, or no click could be passed on, for so long, in seconds; at start it
    waits for Kafka and its topics for so long."""
    session_timeout_seconds: float = Field(6.0, ge=1, le=300)
    """A worker unheard of for so long loses its partitions, in seconds; the broker may set bounds."""
    commit_interval_seconds: float = Field(1.0, ge=0.05, le=60)
    """How often offsets are committed, in seconds; at most so much is delivered again after a crash."""
    max_clicks_in_flight: int = Field(100_000, ge=1_000, le=10_000_000)
    """Nothing more is fetched while so many clicks are on their way through the service."""

    metrics_host: str = Field("127.0.0.1", min_length=1)
    """Address that /metrics and /movers listen on; 0.0.0.0 for every interface."""
    metrics_port: int = Field(9101, ge=0, le=65_535)
    """Port of /metrics and /movers; 0: any free one, which the log line `listening` names."""

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        return PRESETS.get(str(values.get("preset")), {}) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _fits_together(self) -> StreamsSettings:
        if 0 < self.estimator_initial_gap < 1:
            raise ValueError("estimator_initial_gap must be 0 or at least 1")
        if self.drift_fast_clicks >= self.drift_slow_clicks:
            raise ValueError("drift_fast_clicks must be less than drift_slow_clicks")
        return self

    def with_preset(self, preset: Preset) -> StreamsSettings:
        """These settings, where those that are not set themselves are the preset's."""
        return type(self)(**(self.model_dump(exclude_unset=True) | {"preset": preset}))

    def state_config(self) -> StateConfig:
        """The part that a partition's state is made from."""
        return StateConfig(
            num_buckets=self.num_buckets,
            num_hashes=self.num_hashes,
            alpha=self.alpha,
            mode=self.estimator_mode,
            initial_gap=self.estimator_initial_gap or None,
            max_users=self.history_users,
            history_length=self.history_length,
            drift_fast_clicks=self.drift_fast_clicks,
            drift_slow_clicks=self.drift_slow_clicks,
            young_minutes=self.young_minutes,
            event_id_window=self.event_id_window,
        )
