"""Fixtures of the retriever's tests: a publisher on a real endpoint, and a retriever that serves what it publishes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from retriever.settings import RetrieverSettings
from tests.retriever.published import Published, Publisher
from tests.retriever.running import Running, Wire, running


@pytest.fixture
def publisher(qdrant_url: str, alias: str, tmp_path: Path) -> Iterator[Publisher]:
    client = QdrantClient(url=qdrant_url, headers={"accept-encoding": "identity"})
    yield Publisher(client, alias, tmp_path / "models")
    client.close()


@pytest.fixture
def wire(qdrant_url: str) -> Iterator[Wire]:
    """The way from the retriever to Qdrant."""
    made = Wire(qdrant_url)
    yield made
    made.close()


@pytest.fixture
def settings(wire: Wire, publisher: Publisher) -> RetrieverSettings:
    return RetrieverSettings(
        qdrant=wire.url,
        alias=publisher.alias,
        model_dir=publisher.model_dir,
        version_poll_seconds=0.05,
        version_max_age_seconds=0.3,
        search_timeout_seconds=1.0,
    )


@pytest.fixture
def retriever(settings: RetrieverSettings) -> Iterator[Running]:
    """A retriever; it may have no version yet."""
    with running(settings) as made:
        yield made


@pytest.fixture
def published(publisher: Publisher, retriever: Running) -> Published:
    """Version 1, served."""
    version = publisher.publish(1)
    retriever.wait_for_version(1)
    return version
