"""The service put together: from settings to all that answers, but for the stream of clicks, sockets and signals.

Station: wiring alone; `__main__` runs it, and so do the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from retriever.arms import Arms
from retriever.histories import HistoryTable
from retriever.metrics import Metrics
from retriever.popular import Popular
from retriever.retrieve import Retriever
from retriever.search import Index
from retriever.service import create_app
from retriever.settings import RetrieverSettings
from retriever.versions import Versions
from retriever.watch import Watch

_GRACE_SECONDS = 4
"""How long requests under way may go on after a signal."""


@dataclass(frozen=True)
class Assembly:
    """The parts, each with what it needs. `index` is to be closed at the end."""

    metrics: Metrics
    index: Index
    versions: Versions
    popular: Popular | None
    watch: Watch
    histories: HistoryTable
    not_ready: Callable[[], str | None]
    """Why the service is not ready; None where it is."""
    app: FastAPI

    def server(self) -> uvicorn.Server:
        """What serves `app`; it ends at SIGTERM, or when `should_exit` is set."""
        return uvicorn.Server(
            uvicorn.Config(
                self.app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )


def assemble(
    settings: RetrieverSettings, metrics: Metrics, waits_for: Callable[[], str | None] = lambda: None
) -> Assembly:
    """Puts the service together; nothing runs yet.

    Args:
        settings: all of it.
        metrics: of this service alone.
        waits_for: what the service still waits for, beside a version; None: nothing.

    Raises:
        KeyFileError: the file of keys cannot be used.
    """
    key = settings.qdrant_api_key
    index = Index(
        settings.qdrant,
        key.get_secret_value() if key else None,
        metrics,
        hnsw_ef=settings.hnsw_ef,
        timeout_seconds=settings.search_timeout_seconds,
    )
    versions = Versions(
        index,
        settings.alias,
        settings.model_dir,
        metrics,
        max_age_seconds=settings.version_max_age_seconds,
        second=settings.second_version,
    )
    popular = Popular(index, settings.fallback_items) if settings.fallback_items else None
    histories = HistoryTable(settings.max_users, settings.history_length)
    arms = Arms(settings.second_share_ratio, settings.shadow_ratio)
    retriever = Retriever(versions, index, histories, metrics, popular, arms)

    def not_ready() -> str | None:
        return versions.problem or waits_for()

    return Assembly(
        metrics=metrics,
        index=index,
        versions=versions,
        popular=popular,
        watch=Watch(versions, index, metrics, popular),
        histories=histories,
        not_ready=not_ready,
        app=create_app(settings, retriever, metrics, not_ready),
    )
