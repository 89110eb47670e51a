"""Following the alias: switches under load, torn versions, a collection that goes away in mid-request."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import numpy as np
import pytest
from qdrant_client import models

from retriever.encode import Asked, ServedVersion, VersionError, load_version
from retriever.metrics import Metrics
from retriever.search import IndexUnavailable
from retriever.settings import RetrieverSettings
from retriever.versions import Versions
from streams.contract import hash_id, hash_ids
from streamtower.qdrant import Qdrant
from streamtower.versions import PublishedVersions
from tests.retriever.published import CONFIG, Published, Publisher
from tests.retriever.running import Running, running, wait_until
from tests.trainer.publishing import publishings
from trainer.contract import CHECKSUM_FILE, MANIFEST_FILE, QUERY_TOWER_FILE, version_checksum, version_directory
from trainer.item_events import ItemChange
from trainer.rollout import PublishSettings
from trainer.towers import TowerConfig, build_towers, query_inputs

pytestmark = pytest.mark.index


def test_a_switch_changes_the_answers_and_is_counted(retriever: Running, publisher: Publisher) -> None:
    for number in (1, 2):
        version = publisher.publish(number)
        retriever.wait_for_version(number)
        answer = retriever.ask(history=["item-3"], k=5)
        assert answer["model_version"] == number
        assert [c["item_id"] for c in answer["candidates"]] == [
            item for item, _ in version.best(5, history=["item-3"], without=["item-3"])
        ]
        assert retriever.value("model_version") == number
        assert retriever.value("version_created_timestamp_seconds") == version.manifest.created_at
    assert retriever.value("version_switches_total") == 1
    assert retriever.value("version_load_failures_total") == 0


def test_after_a_rollback_by_hand_the_query_tower_of_the_old_version_answers(
    retriever: Running, publisher: Publisher, qdrant_url: str
) -> None:
    published = {number: publisher.publish(number) for number in (1, 2)}
    retriever.wait_for_version(2)
    qdrant = Qdrant(qdrant_url)
    by_hand = PublishedVersions(qdrant, publisher.alias, publisher.model_dir)
    for number, make_live in ((1, by_hand.rollback), (2, lambda: by_hand.promote(None))):
        assert make_live().number == number
        retriever.wait_for_version(number)
        answer = retriever.ask(history=["item-3"], k=5)
        expected = published[number].best(5, history=["item-3"], without=["item-3"])
        assert answer["model_version"] == number
        assert [candidate["item_id"] for candidate in answer["candidates"]] == [item for item, _ in expected]
    qdrant.close()


def test_a_version_of_another_shape_is_served_too(retriever: Running, publisher: Publisher) -> None:
    publisher.publish(1)
    retriever.wait_for_version(1)
    version = publisher.publish(2, config=TowerConfig(embedding_dim=16, row_dim=4, item_rows=2**8, hidden=(12,)))
    retriever.wait_for_version(2)
    answer = retriever.ask(history=["item-3"], exclude_seen=False, k=60)
    expected = version.best(60, history=["item-3"])
    np.testing.assert_allclose([c["score"] for c in answer["candidates"]], [s for _, s in expected], rtol=1e-4)


def test_no_answer_mixes_two_versions_or_is_old_while_they_switch_back_and_forth_under_load(
    settings: RetrieverSettings, publisher: Publisher
) -> None:
    """Items have their version in their name, and every score must be its version's own.

    Each version is published, taken back and switched to again, 21 switches in all; then the one before it is removed
    at once, though the trainer keeps it: requests in flight lose it. An answer may be of a version that the alias has
    left, but only for as long as the setting allows.
    """
    max_age = settings.version_max_age_seconds
    versions = {1: publisher.publish(1, item_stem="v1")}
    switches = [(time.monotonic(), 1)]
    answers: list[tuple[float, dict[str, Any]]] = []
    failures: list[str] = []
    stopping = threading.Event()

    def switched_to(number: int) -> None:
        switches.append((time.monotonic(), number))
        wait_until(
            lambda: failures or (answers and answers[-1][1]["model_version"] == number), f"version {number} answers"
        )

    with running(settings) as retriever:
        retriever.wait_for_version(1)

        def hammer() -> None:
            with httpx.Client(base_url=retriever.http.base_url, timeout=30, trust_env=False) as http:
                while not stopping.is_set():
                    asked_at = time.monotonic()
                    answer = http.post("/v1/candidates", json={"history": ["seed"], "k": 5})
                    if answer.status_code == 200:
                        answers.append((asked_at, answer.json()))
                    else:
                        failures.append(answer.text)

        threads = [threading.Thread(target=hammer) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: answers, "version 1 answers")
            for number in range(2, 9):
                versions[number] = publisher.publish(number, item_stem=f"v{number}")
                switched_to(number)
                for again in (number - 1, number):
                    publisher.switch_to(again)
                    if again == number:
                        publisher.remove(number - 1)
                    switched_to(again)
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        assert retriever.value("version_switches_total") == 21
    assert not failures
    assert {answer["model_version"] for _, answer in answers} == set(versions)
    expected = {number: version.best(5, history=["seed"]) for number, version in versions.items()}
    for asked_at, answer in answers:
        best = expected[answer["model_version"]]
        assert [c["item_id"] for c in answer["candidates"]] == [item for item, _ in best]
        np.testing.assert_allclose([c["score"] for c in answer["candidates"]], [s for _, s in best], rtol=1e-4)
        first = max(place for place, (at, _) in enumerate(switches) if at <= max(asked_at - max_age, switches[0][0]))
        assert answer["model_version"] in {number for _, number in switches[first:]}


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/candidates": {"history": ["item-1"], "exclude_seen": False, "k": 60, "with_payload": True},
    "/v1/similar": {"item_ids": ["item-1"], "k": 60, "with_payload": True},
    "/v1/candidates:batch": {
        "requests": [{"history": [f"item-{n}"], "exclude_seen": False, "k": 60, "with_payload": True} for n in range(3)]
    },
}


def test_no_request_fails_and_none_misses_a_delta_while_the_trainers_publisher_switches_versions(
    retriever: Running, publisher: Publisher, settings: RetrieverSettings, qdrant_url: str
) -> None:
    """One item is told a higher number again and again, before a version begins, while it is filled, and once it is
    live: what is asked later than the setting allows after a delta is done must know its number, on every route.

    No version but the live one is kept, so that requests in flight lose theirs.
    """
    done: list[tuple[float, int]] = []
    answers: list[tuple[float, str, httpx.Response]] = []
    stopping = threading.Event()

    def hammer(path: str) -> None:
        with httpx.Client(base_url=retriever.http.base_url, timeout=30, trust_env=False) as http:
            while not stopping.is_set():
                answers.append((time.monotonic(), path, http.post(path, json=ROUTES[path])))

    with publishings(qdrant_url, publisher.alias, publisher.model_dir) as make:
        trainer = make(settings=PublishSettings(publish_batch_points=100, keep_versions=1))

        def tell(number: int) -> None:
            trainer.take(ItemChange("told", payload=b'{"number":%d}' % number))
            trainer.click("told", *(f"item-{(7 * number + place) % 40}" for place in range(5)))

        def settled(number: int) -> None:
            trainer.settle()
            done.append((time.monotonic(), number))

        def all_asked_later() -> bool:
            held_to = done[-1][0] + settings.version_max_age_seconds
            return {path for asked_at, path, _ in answers[-100:] if asked_at > held_to} == set(ROUTES)

        trainer.click(*(f"item-{number}" for number in range(40)))
        tell(0)
        settled(0)
        retriever.wait_for_version(1)
        threads = [threading.Thread(target=hammer, args=(path,)) for path in ROUTES]
        for thread in threads:
            thread.start()
        try:
            for version in range(2, 10):
                tell(3 * version)
                trainer.clock.now += 1_000.0
                trainer.publisher.advance()
                tell(3 * version + 1)
                trainer.until(lambda version=version: trainer.live == version and trainer.publisher.idle)
                settled(3 * version + 1)
                wait_until(all_asked_later, "every route answers, held to what came while the version was filled")
                tell(3 * version + 2)
                settled(3 * version + 2)
                wait_until(all_asked_later, "every route answers, held to the delta")
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        assert trainer.value("items_published_total", kind="delta") >= 48
    assert [answer.text for _, _, answer in answers if answer.status_code != 200] == []
    for asked_at, path, answer in answers:
        told = answer.json()
        several = told["answers"] if path.endswith("batch") else [told]
        assert len({one["model_version"] for one in several}) == 1
        least = max([number for at, number in done if at <= asked_at - settings.version_max_age_seconds], default=0)
        for one in several:
            payloads = {candidate["item_id"]: candidate["payload"] for candidate in one["candidates"]}
            assert len(payloads) == 41 - (path == "/v1/similar"), "every item, and once"
            assert payloads["told"]["number"] >= least
    assert {
        one["model_version"] for _, path, answer in answers if path == "/v1/candidates" for one in [answer.json()]
    } == (set(range(1, 10)))


class Aliases:
    """An index that knows nothing but where the alias points; a clock beside it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lookups = 0
        self.is_away = False

    async def collection_of(self, alias: str) -> str | None:
        self.lookups += 1
        if self.is_away:
            raise IndexUnavailable("away")
        return None


def test_a_request_that_comes_long_after_the_last_look_up_looks_itself_and_only_one_of_many(tmp_path: Path) -> None:
    aliases = Aliases()
    versions = Versions(
        aliases,
        "items",
        tmp_path,
        Metrics(),
        max_age_seconds=2.0,
        rising=lambda: aliases.now,  # type: ignore[arg-type]
    )

    async def none() -> ServedVersion | None:
        return await versions.current()

    assert asyncio.run(none()) is None and aliases.lookups == 0, "before the first version only the watch looks"
    versions.served = cast(ServedVersion, object())

    async def many() -> None:
        await asyncio.gather(*[versions.current() for _ in range(10)])

    asyncio.run(many())
    assert aliases.lookups == 1
    aliases.now = 2.0
    asyncio.run(many())
    assert aliases.lookups == 1
    aliases.now = 2.1
    asyncio.run(many())
    assert aliases.lookups == 2
    aliases.now, aliases.is_away = 5.0, True
    with pytest.raises(IndexUnavailable, match="away"):
        asyncio.run(many())


def test_a_torn_version_leaves_the_one_before_served(retriever: Running, publisher: Publisher) -> None:
    publisher.publish(1)
    retriever.wait_for_version(1)
    publisher.publish(2, switch=False)
    manifest = version_directory(publisher.model_dir, 2) / MANIFEST_FILE
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[: len(whole) // 2])
    publisher.switch_to(2)
    wait_until(lambda: retriever.value("version_load_failures_total") >= 1, "the torn version is noticed")
    assert retriever.ask(history=[])["model_version"] == 1
    problem = retriever.http.get("/readyz").json()
    assert (problem["status"], problem["detail"][:30]) == (503, "version 2 cannot be loaded: no")
    manifest.write_bytes(whole)
    retriever.wait_for_version(2)
    assert retriever.http.get("/readyz").status_code == 200


@pytest.mark.parametrize("name", [MANIFEST_FILE, QUERY_TOWER_FILE])
def test_a_version_with_a_single_wrong_bit_leaves_the_one_before_served(
    retriever: Running, publisher: Publisher, name: str
) -> None:
    publisher.publish(1)
    retriever.wait_for_version(1)
    publisher.publish(2, switch=False)
    directory = version_directory(publisher.model_dir, 2)
    (directory / CHECKSUM_FILE).write_text(version_checksum(directory))
    whole = (directory / name).read_bytes()
    damaged = bytearray(whole)
    damaged[-20] ^= 1
    (directory / name).write_bytes(damaged)
    publisher.switch_to(2)
    wait_until(lambda: retriever.value("version_load_failures_total") >= 1, "the damage is noticed")
    assert retriever.ask(history=[])["model_version"] == 1
    assert "contradicts its checksum" in retriever.http.get("/readyz").json()["detail"]
    (directory / name).write_bytes(whole)
    retriever.wait_for_version(2)


def test_a_directory_that_cannot_be_read_leaves_the_version_before_served_and_is_told(
    retriever: Running, publisher: Publisher
) -> None:
    publisher.publish(1)
    retriever.wait_for_version(1)
    publisher.publish(2, switch=False)
    directory = version_directory(publisher.model_dir, 2)
    directory.chmod(0)
    if is_root := os.geteuid() == 0:  # whom no mode keeps out
        os.seteuid(65_534)
    try:
        publisher.switch_to(2)
        wait_until(lambda: retriever.value("version_load_failures_total") >= 1, "it is noticed")
        assert retriever.ask(history=[])["model_version"] == 1
        problem = retriever.http.get("/readyz").json()
        assert problem["status"] == 503 and "Permission denied" in problem["detail"]
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o755)
    retriever.wait_for_version(2)
    assert retriever.http.get("/readyz").status_code == 200


def test_a_clock_that_has_jumped_back_hinders_nothing(retriever: Running, publisher: Publisher) -> None:
    """As seen from the retriever: the version is of the day after tomorrow."""
    publisher.publish(1, switch=False)
    path = version_directory(publisher.model_dir, 1) / MANIFEST_FILE
    manifest = msgspec.json.decode(path.read_bytes()) | {"created_at": time.time() + 2 * 86_400}
    path.write_bytes(msgspec.json.encode(manifest))
    publisher.switch_to(1)
    retriever.wait_for_version(1)
    assert retriever.ask(history=[])["model_version"] == 1
    assert retriever.value("staleness_seconds", of="version") == 0
    publisher.publish(2)
    retriever.wait_for_version(2)


def test_an_alias_on_a_foreign_collection_is_told(retriever: Running, publisher: Publisher) -> None:
    foreign = publisher.alias + "-foreign"
    publisher.client.create_collection(
        foreign, vectors_config={"other": models.VectorParams(size=2, distance=models.Distance.DOT)}
    )
    action = models.CreateAliasOperation(
        create_alias=models.CreateAlias(collection_name=foreign, alias_name=publisher.alias)
    )
    publisher.client.update_collection_aliases([action])
    wait_until(lambda: "no version published under that alias" in (retriever.versions.problem or ""), "it is told")
    assert retriever.http.post("/v1/candidates", json={"history": []}).status_code == 503


def test_a_collection_of_other_dimensions_is_not_served(retriever: Running, publisher: Publisher) -> None:
    version = publisher.publish(1, config=dataclasses.replace(CONFIG, popularity_dims=0), switch=False)
    wrong = msgspec.structs.replace(version.manifest, popularity_dims=2, popularity_weights=[1.0, 1.0])
    publisher.write(wrong, version.tower)
    publisher.switch_to(1)
    wait_until(lambda: "dense vectors of 9 dimensions, its Manifest 10" in (retriever.versions.problem or ""), "told")
    assert retriever.versions.served is None


def test_everything_begun_anew_under_the_same_number_is_loaded_again(retriever: Running, publisher: Publisher) -> None:
    publisher.publish(1)
    retriever.wait_for_version(1)
    publisher.remove(1)
    again = publisher.publish(1, item_stem="again", config=TowerConfig(embedding_dim=8, row_dim=4, item_rows=2**8))
    wait_until(
        lambda: retriever.versions.served and retriever.versions.served.manifest == again.manifest, "the new version 1"
    )
    answer = retriever.ask(history=["again-1"], k=5)
    assert [c["item_id"] for c in answer["candidates"]] == [
        item for item, _ in again.best(5, history=["again-1"], without=["again-1"])
    ]


def test_a_collection_that_is_gone_for_good_is_a_503(
    retriever: Running, published: Published, publisher: Publisher
) -> None:
    publisher.remove(1)
    answer = retriever.http.post("/v1/candidates", json={"history": []})
    assert answer.status_code == 503
    assert "is gone" in answer.json()["detail"]
    wait_until(lambda: retriever.http.get("/readyz").status_code == 503, "not ready")


def test_a_served_version_outlives_its_directory(
    retriever: Running, published: Published, publisher: Publisher
) -> None:
    for name in (MANIFEST_FILE, QUERY_TOWER_FILE):
        (version_directory(publisher.model_dir, 1) / name).unlink()
    refreshed = retriever.value("version_load_failures_total")
    for _ in range(3):
        assert retriever.ask(history=[])["model_version"] == 1
    assert retriever.value("version_load_failures_total") == refreshed == 0


class TestLoading:
    """`load_version` on a directory alone."""

    @pytest.fixture
    def version(self, publisher: Publisher) -> Published:
        return publisher.publish(3)

    def test_the_loaded_tower_makes_the_same_query_bit_for_bit(self, version: Published, publisher: Publisher) -> None:
        served = load_version(publisher.model_dir, publisher.alias, version.manifest.collection)
        assert served.manifest == version.manifest
        assert served.config == CONFIG
        asked = Asked(7, hash_ids(["item-1"]), {"device": "phone"}, 0.5)
        query = served.encode([asked])[0]
        here = type(served)(served.collection, served.manifest, served.config, version.tower)
        assert query == here.encode([asked])[0]
        assert len(query.dense) == 9
        known = np.log(2) - 1.5
        np.testing.assert_allclose(np.linalg.norm(query.dense[:8]), (0.7 + 0.2 * known) / CONFIG.temperature, rtol=1e-5)
        assert query.indices == [hash_id("item-1") & 0xFFFFFFFF] and query.values == [0.3]
        assert query.covisit_weight == pytest.approx(0.6 - 0.1 * known)
        user, history = np.array([7], np.uint64), hash_ids(["item-1"])
        inputs = query_inputs(CONFIG, user, history, np.array([0, 1]), {"device": ["phone"]})
        leaning = version.tower(inputs)[0, 8].item()
        assert abs(leaning) > 0.1
        assert query.dense[8] == pytest.approx(0.5 * (1.2 + 0.1 * known + (0.7 + 0.2 * known) * leaning) * 20.0)

    def test_nobody_is_not_the_user_of_row_0(self, version: Published, publisher: Publisher) -> None:
        served = load_version(publisher.model_dir, publisher.alias, version.manifest.collection)
        nobody, row_0 = served.encode([Asked(user, hash_ids(["item-1"]), {}, 1.0) for user in (None, 0)])
        assert nobody != row_0

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (lambda directory, manifest: (directory / MANIFEST_FILE).unlink(), "no Manifest in"),
            (lambda directory, manifest: (directory / QUERY_TOWER_FILE).unlink(), "cannot be loaded"),
            (lambda directory, manifest: (directory / QUERY_TOWER_FILE).write_bytes(b"torn"), "no query tower"),
            (lambda directory, manifest: rewrite(directory, manifest, collection="other__v3"), "belongs to another"),
            (lambda directory, manifest: rewrite(directory, manifest, model_version=4), "holds version 4"),
            (lambda directory, manifest: rewrite(directory, manifest, embedding_dim=9), "embedding_dim 9, its tower 8"),
            (lambda directory, manifest: rewrite(directory, manifest, popularity_dims=2), "dims 2, its tower 1"),
            (lambda directory, manifest: rewrite(directory, manifest, towers={"wrong": 1}), "no setting of the towers"),
            (
                lambda directory, manifest: rewrite(directory, manifest, towers=manifest.towers | {"row_dim": 4}),
                "holds no query tower of this configuration",
            ),
        ],
    )
    def test_a_spoilt_version_is_refused_with_its_reason(
        self, version: Published, publisher: Publisher, spoil: Any, reason: str
    ) -> None:
        spoil(version_directory(publisher.model_dir, 3), version.manifest)
        with pytest.raises(VersionError, match=reason):
            load_version(publisher.model_dir, publisher.alias, version.manifest.collection)


def rewrite(directory: Any, manifest: Any, **changes: Any) -> None:
    (directory / MANIFEST_FILE).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, **changes)))


def test_towers_of_two_seeds_differ() -> None:
    """Else the tests above could not tell one version from another."""
    (one, _), (two, _) = (build_towers(CONFIG, seed=seed) for seed in (1, 2))
    assert not np.allclose(one.tables.items.numpy(), two.tables.items.numpy())
