"""Settings of the retriever, all from environment variables STREAMTOWER_RETRIEVER_*.

Station: read once at start, through `streams.service.load_settings`; nothing else here reads the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from retriever.keys import read_keys
from streams.service import KafkaSettings
from trainer.contract import HNSW_EF


class RetrieverSettings(KafkaSettings):
    """How the retriever listens, and where Qdrant, the published versions and Kafka are."""

    model_config = SettingsConfigDict(
        env_prefix="STREAMTOWER_RETRIEVER_", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    host: str = Field("127.0.0.1", min_length=1)
    """Address that the HTTP service listens on; 0.0.0.0 for every interface."""
    port: int = Field(8080, ge=0, le=65535)
    """Port of the HTTP service, metrics included; 0: any free one, which the log line `listening` names."""
    api_keys: tuple[Annotated[SecretStr, Field(min_length=16)], ...] = ()
    """JSON list of keys of at least 16 characters; with one or more, /v1/* wants `Authorization: Bearer KEY`."""
    api_keys_file: Path | None = None
    """File of further keys, one a line, # before comments. It is read again within a second when it changes, so that
    keys can be exchanged without a restart; an empty file lets nobody in."""
    rate_limit_per_second: float = Field(0.0, ge=0, le=1_000_000)
    """Requests to /v1/* that each key, or each address where no key is wanted, may make a second in the long run; one
    more is answered with 429. A batch is as many requests as it holds. Wrong keys count for their address. 0: no
    limit."""
    rate_limit_burst: int = Field(100, ge=1, le=1_000_000)
    """Requests that a caller who was quiet may make at once, with rate_limit_per_second."""

    qdrant: str = Field("http://127.0.0.1:6333", pattern=r"^https?://[^/\s]+")
    """URL of Qdrant's REST interface."""
    qdrant_api_key: SecretStr | None = None
    """Key that Qdrant asks for; a read-only one is enough."""
    alias: str = Field("items", pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """Alias in Qdrant that names the collection of the live version."""
    model_dir: Path = Path("models")
    """Directory of the published versions, shared with the trainer."""
    version_poll_seconds: float = Field(0.5, ge=0.05, le=60)
    """How often the alias is looked up, in seconds."""
    version_max_age_seconds: float = Field(2.0, ge=0.05, le=3_600)
    """Longest time since the alias was last looked up at which a request is answered, in seconds; one that comes later
    looks it up itself. So no answer is of a version that the alias left longer ago; only one that cannot be loaded
    leaves the one before it served."""
    second_version: str = Field("", pattern=r"^(|previous|[1-9][0-9]{0,8})$")
    """A version that is served beside the live one, for comparison: its number, or `previous` for the newest one before
    the live one; the trainer's keep_versions must keep it. Empty: none. While it is not there, the live one serves."""
    second_share_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the users, chosen by a stable hash of their ids, who are answered by second_version (A/B). Requests
    without a user are answered by the live one."""
    shadow_ratio: float = Field(0.0, ge=0, le=1)
    """Share of the other users whose requests are also given to second_version, which nobody waits for: its time and
    how much of the answer it shares are measured."""
    hnsw_ef: int = Field(HNSW_EF, ge=1, le=65536)
    """Candidates that an HNSW search looks at; more is slower and closer to exact. Without HNSW it is exact."""
    search_timeout_seconds: float = Field(2.0, gt=0, le=60)
    """Longest time that one request spends on Qdrant, retries included, in seconds."""

    fallback_items: int = Field(0, ge=0, le=10_000)
    """Most popular items that are kept, to answer with while Qdrant is away; such answers say so. 0: requests are
    refused with 503 then. A request with a filter is refused in any case."""

    max_body_bytes: int = Field(65_536, ge=1_024, le=16_777_216)
    """Largest request body, in bytes."""
    body_timeout_seconds: float = Field(5.0, gt=0, le=60)
    """Longest time that a request body may take to come in, in seconds."""
    max_in_flight: int = Field(256, ge=1, le=10_000)
    """Requests to /v1/* that may be under way at once; one more is answered with 503 at once."""

    history_length: int = Field(50, ge=1, le=1_000)
    """Newest items kept for each user."""
    max_users: int = Field(1_000_000, ge=1, le=100_000_000)
    """Users whose history is kept, those who clicked last; about 400 bytes each."""
    history_lookback_seconds: float = Field(604_800, ge=0)
    """How far back micro-batches are read at start, in seconds; who has not clicked since begins without history."""
    history_max_micro_batches: int = Field(5_000, ge=1, le=100_000_000)
    """Newest micro-batches of each partition read at start at most, whatever the lookback: it bounds how long a restart
    takes. Each row has its user's whole history; who clicked in none of them begins without."""
    history_wait_seconds: float = Field(30.0, ge=0, le=3_600)
    """Longest time at start that /readyz waits for the histories to be caught up, in seconds."""
    partition_refresh_seconds: float = Field(5.0, ge=0.1, le=3_600)
    """How often Kafka is asked for new partitions, and whether it answers at all, in seconds."""

    @field_validator("api_keys_file")
    @classmethod
    def _holds_keys(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_keys(value)
        return value
