"""What goes on when others are away: popular items while Qdrant is, and staleness that grows while the trainer is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retriever.metrics import Metrics
from retriever.search import IndexUnavailable
from retriever.settings import RetrieverSettings
from retriever.watch import LOOK_SECONDS, Watch
from tests.retriever.published import POPULARITY_SCALE, WEIGHTS, Published
from tests.retriever.running import Running, Wire, running, wait_until
from tests.retriever.test_candidates import answered, click


@pytest.fixture
def with_fallback(settings: RetrieverSettings) -> Iterator[Running]:
    with running(settings.model_copy(update={"fallback_items": 30, "search_timeout_seconds": 0.3})) as made:
        yield made


def most_popular(published: Published) -> list[tuple[str, float]]:
    """Items by the popularity part of the score, for nobody in particular."""
    weight = WEIGHTS["popularity_weights"][0]
    scores = weight * published.vectors[:, -1].astype(np.float64) * POPULARITY_SCALE
    return sorted(zip(published.item_ids, scores.tolist(), strict=True), key=lambda pair: -pair[1])


@pytest.mark.index
def test_while_qdrant_is_away_popular_items_are_the_marked_answer(
    publisher: Any, with_fallback: Running, wire: Wire
) -> None:
    published = publisher.publish(1)
    with_fallback.wait_for_version(1)
    with_fallback.table.apply(click("u", "item-5", ["item-3"], offset=0))
    popular = most_popular(published)
    seen = [item for item, _ in popular[:2]]
    assert with_fallback.ask(user_id="u")["fallback"] is None
    assert with_fallback.service.popular is not None
    wait_until(lambda: with_fallback.service.popular.kept, "popular items are kept")  # type: ignore[union-attr]
    wire.cut()
    answer = with_fallback.ask(history=seen, k=5, with_payload=True, explain=True, diversity=0.5)
    assert answer["fallback"] == "popularity"
    assert [item for item, _ in answered(answer)] == [item for item, _ in popular[2:7]]
    np.testing.assert_allclose([s for _, s in answered(answer)], [s for _, s in popular[2:7]], rtol=1e-5)
    for candidate in answer["candidates"]:
        assert candidate["payload"].keys() == {"parity", "n"}
        assert candidate["explanation"] == pytest.approx(
            {"affinity": 0, "popularity": candidate["score"], "covisitation": 0}
        )
    assert len(with_fallback.ask(history=[], k=100)["candidates"]) == 30
    known = with_fallback.ask(user_id="u")
    assert (known["user_known"], known["history_source"], known["fallback"]) == (True, "followed", "popularity")
    batch = with_fallback.http.post("/v1/candidates:batch", json={"requests": [{"history": []}, {"history": seen}]})
    assert [one["fallback"] for one in batch.json()["answers"]] == ["popularity"] * 2
    filtered = with_fallback.http.post("/v1/candidates", json={"history": [], "filter": {"must": []}})
    assert (filtered.status_code, filtered.headers["retry-after"]) == (503, "1")
    wait_until(lambda: with_fallback.http.get("/readyz").status_code == 503, "not ready all the same")
    assert with_fallback.value("fallbacks_total") == 5
    wire.join()
    wait_until(lambda: with_fallback.ask(history=[])["fallback"] is None, "Qdrant answers again")


@pytest.mark.index
def test_without_the_setting_nothing_is_kept_and_a_dead_qdrant_is_a_503(
    retriever: Running, published: Published, wire: Wire
) -> None:
    wire.cut()
    answer = retriever.http.post("/v1/candidates", json={"history": []})
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:streamtower:problem:index-unavailable")
    assert retriever.value("fallbacks_total") == 0


class Times:
    """A clock, an index and versions that do what they are told."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.step: int | None = 5
        self.is_away = False
        self.served: Any = None

    async def refresh(self) -> None:
        pass

    async def newest_step(self, collection: str) -> int | None:
        if self.is_away:
            raise IndexUnavailable("away")
        return self.step

    def serve(self, number: int, created_at: float) -> None:
        manifest = SimpleNamespace(created_at=created_at)
        self.served = SimpleNamespace(manifest=manifest, collection=f"items__v{number}")


def test_staleness_grows_until_the_version_or_an_item_changes() -> None:
    times, metrics = Times(), Metrics()
    watch = Watch(times, times, metrics, clock=lambda: times.now, rising=lambda: times.now)  # type: ignore[arg-type]

    def look(after: float) -> tuple[float, float]:
        times.now += after
        asyncio.run(watch.look())
        stem = "streamtower_retriever_staleness_seconds"
        found = [metrics.registry.get_sample_value(stem, {"of": of}) for of in ("version", "items")]
        return found[0] or 0.0, found[1] or 0.0

    assert look(0) == (0, 0)
    times.serve(1, created_at=990.0)
    assert look(LOOK_SECONDS) == (12, 12)  # when its items changed was not seen: they are as old as the version
    assert look(100) == (112, 112)
    times.step = 6
    assert look(10) == (122, 0)
    assert look(1) == (123, 1)  # too early to look again
    assert look(50) == (173, 51)
    times.is_away, times.step = True, 7
    assert look(50) == (223, 101)
    times.is_away = False
    assert look(50) == (273, 0)
    times.serve(2, created_at=times.now)
    assert look(5) == (5, 5)
    times.step = None
    assert look(5) == (10, 10)
