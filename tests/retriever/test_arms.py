"""Two versions at once: who is answered by which, what is measured, and what happens when one is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from pydantic import ValidationError

from retriever.arms import Arms, place_of
from retriever.settings import RetrieverSettings
from streams.contract import hash_id
from tests.retriever.published import Published, Publisher
from tests.retriever.running import Running, running, wait_until
from tests.retriever.test_candidates import assert_ranked

USERS = [f"user-{number}" for number in range(40)]


def test_users_are_spread_evenly_and_stay_with_their_arm() -> None:
    places = np.array([place_of(hash_id(str(number))) for number in range(20_000)])
    counts = np.histogram(places, bins=10, range=(0, 1))[0]
    assert np.all(abs(counts - 2_000) < 6 * np.sqrt(2_000 * 0.9))
    assert place_of(hash_id("1899")) == pytest.approx(0.675049013288606)  # on every machine, in every release
    arms = Arms(0.3, 0.5)
    for place, user in zip(places, range(20_000), strict=True):
        assert arms.arm_of(hash_id(str(user))) == ("second" if place < 0.3 else "live")
        assert arms.is_shadowed(hash_id(str(user))) == (0.3 <= place < 0.65)
    assert (arms.arm_of(None), arms.is_shadowed(None)) == ("live", False)
    assert {Arms(1.0).arm_of(hash_id(user)) for user in USERS} == {"second"}
    assert {Arms().arm_of(hash_id(user)) for user in USERS} == {"live"}


@contextmanager
def comparing(settings: RetrieverSettings, **values: object) -> Iterator[Running]:
    with running(settings.model_copy(update=values)) as made:
        yield made


def wait_for_second(retriever: Running, number: int | None) -> None:
    wait_until(
        lambda: (second := retriever.versions.second) is None if number is None
        else (second := retriever.versions.second) is not None and second.manifest.model_version == number,
        f"second version {number}",
    )  # fmt: skip


@pytest.mark.index
def test_each_user_is_answered_by_their_arm_with_its_own_scores(
    settings: RetrieverSettings, publisher: Publisher
) -> None:
    versions = {number: publisher.publish(number, item_stem=f"v{number}") for number in (1, 2)}
    with comparing(settings, second_version="previous", second_share_ratio=0.5) as retriever:
        retriever.wait_for_version(2)
        wait_for_second(retriever, 1)
        expected = {user: 1 if place_of(hash_id(user)) < 0.5 else 2 for user in USERS}
        assert set(expected.values()) == {1, 2}
        for user in USERS:
            answer = retriever.ask(user_id=user, k=3)
            assert answer["model_version"] == expected[user]
            assert_ranked(answer, versions[expected[user]].best(3, user_id=user))
        assert retriever.ask(history=[])["model_version"] == 2
        batch = retriever.http.post("/v1/candidates:batch", json={"requests": [{"user_id": user} for user in USERS]})
        assert [one["model_version"] for one in batch.json()["answers"]] == list(expected.values())
        num_second = sum(number == 1 for number in expected.values())
        assert retriever.value("arm_queries_total", arm="second") == 2 * num_second
        assert retriever.value("arm_queries_total", arm="live") == 2 * (len(USERS) - num_second) + 1
        assert (retriever.value("arm_version", arm="live"), retriever.value("arm_version", arm="second")) == (2, 1)
        assert retriever.value("arm_seconds_count", arm="second") == num_second + 1

        publisher.publish(3, item_stem="v3")
        wait_for_second(retriever, 2)
        assert {retriever.ask(user_id=user)["model_version"] for user in USERS} == {2, 3}
        publisher.remove(2)
        assert {retriever.ask(user_id=user)["model_version"] for user in USERS} == {3}, (
            "it is gone: the live one serves"
        )
        wait_for_second(retriever, None)
        wait_until(lambda: retriever.value("arm_version", arm="second") == 0, "it is told")
        assert retriever.http.get("/readyz").status_code == 200


@pytest.mark.index
def test_a_version_by_number_answers_in_the_shadow_and_is_compared(
    settings: RetrieverSettings, publisher: Publisher
) -> None:
    one, two, three = (publisher.publish(number) for number in (1, 2, 3))

    def shared(live: Published, user: str) -> int:
        """Of the ten best, by both versions."""
        ours, theirs = ({item for item, _ in version.best(10, user_id=user)} for version in (live, one))
        return len(ours & theirs)

    with comparing(settings, second_version="1", shadow_ratio=1.0) as retriever:
        retriever.wait_for_version(3)
        wait_for_second(retriever, 1)
        expected = 0
        for number, user in enumerate(USERS[:6], start=1):
            if number == 4:
                publisher.switch_to(2)
                retriever.wait_for_version(2)
            live = three if number < 4 else two
            answer = retriever.ask(user_id=user, k=10)
            assert_ranked(answer, live.best(10, user_id=user))
            expected += shared(live, user)
            compared = lambda n=number: retriever.value("shadow_queries_total", outcome="compared") == n  # noqa: E731
            wait_until(compared, "the shadow has answered")
        assert retriever.value("shadow_candidates_total") == 60
        assert retriever.value("shadow_shared_candidates_total") == expected
        assert retriever.value("arm_queries_total", arm="second") == 0
        assert retriever.value("arm_seconds_count", arm="second") == 6
        publisher.switch_to(1)
        retriever.wait_for_version(1)
        wait_for_second(retriever, None)
        assert retriever.value("shadow_queries_total", outcome="failed") == 0


@pytest.mark.parametrize("wrong", ["0", "-1", "next", "1.5", "previous "])
def test_a_second_version_is_a_number_or_previous(wrong: str) -> None:
    with pytest.raises(ValidationError, match="second_version"):
        RetrieverSettings(second_version=wrong)
