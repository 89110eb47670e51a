"""Who may come in and how often: keys that change while the service runs, and a rate for each caller."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from retriever.keys import KeyFileError, Keys, Rates
from retriever.metrics import Metrics
from retriever.settings import RetrieverSettings
from streams.service import ConfigurationError, load_settings
from tests.retriever.running import Running, running, wait_until
from tests.retriever.test_problems import DEAD

# The Qdrant client looks for the server's version in a thread of its own, and says so when nobody answers.
pytestmark = pytest.mark.filterwarnings("ignore:Failed to obtain server version:UserWarning")

FIXED, OLD, NEW = "a-key-of-the-settings", "an-old-key-of-the-file", "a-new-key-of-the-file"


class Clock:
    """Seconds that a test turns on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class File:
    """Keys with a file, and a clock."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path = folder / "keys"
        self.path.write_text(text)
        self.clock, self.metrics = Clock(), Metrics()
        self.keys = Keys([SecretStr(FIXED)], self.path, self.metrics, self.clock)

    def opening(self, *keys: str) -> list[str]:
        return [key for key in keys if self.keys.fitting(key) is not None]

    def exchange(self, text: str) -> None:
        """As one should: written aside and put in place."""
        aside = self.path.with_name("aside")
        aside.write_text(text)
        aside.replace(self.path)

    @property
    def failures(self) -> float | None:
        return self.metrics.registry.get_sample_value("streamtower_retriever_key_file_failures_total")


def test_keys_are_exchanged_while_the_service_runs(tmp_path: Path) -> None:
    file = File(tmp_path, f"# ours\n\n{OLD}\n")
    assert file.opening(FIXED, OLD, NEW, "# ours", "") == [FIXED, OLD]
    file.exchange(f"{NEW}\n{OLD}")
    assert file.opening(FIXED, OLD, NEW) == [FIXED, OLD], "looked at once a second"
    file.clock.now += 1
    assert file.opening(FIXED, OLD, NEW) == [FIXED, OLD, NEW]
    file.exchange(NEW)
    file.clock.now += 1
    assert file.opening(FIXED, OLD, NEW) == [FIXED, NEW]
    file.exchange("")
    file.clock.now += 1
    assert file.opening(FIXED, OLD, NEW) == [FIXED]
    assert file.failures == 0


def test_a_file_that_cannot_be_read_leaves_the_keys_before_it_good(tmp_path: Path) -> None:
    file = File(tmp_path, OLD)
    for text in ("short", f"{NEW}\ntwo words are no key", "schlüssel-mit-umlaut"):
        file.exchange(text)
        file.clock.now += 1
        assert file.opening(OLD, NEW, text) == [OLD]
    file.path.unlink()
    file.clock.now += 1
    assert file.opening(OLD, NEW) == [OLD]
    assert file.failures == 4
    file.exchange(NEW)
    file.clock.now += 1
    assert file.opening(OLD, NEW) == [NEW]


def test_a_file_without_keys_lets_nobody_in_and_no_file_and_no_keys_let_everybody_in(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n")
    closed = Keys([], tmp_path / "keys", Metrics())
    assert (closed.are_wanted, closed.fitting(""), closed.fitting(OLD)) == (True, None, None)
    assert not Keys([], None, Metrics()).are_wanted


def test_every_key_is_compared_in_constant_time_whether_or_not_one_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = File(tmp_path, f"{OLD}\n{NEW}")
    compared: list[tuple[int, int]] = []
    really = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return really(one, other)

    monkeypatch.setattr("retriever.keys.hmac.compare_digest", compare)
    for key in (FIXED, NEW, "x", "x" * 5000):
        compared.clear()
        file.keys.fitting(key)
        assert compared == [(32, 32)] * 3


@pytest.mark.parametrize("text", ["short", "with spaces in between it", None])
def test_a_file_of_no_keys_refuses_to_start_and_does_not_say_what_stands_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(f"{OLD}\n{text}")
    with pytest.raises(KeyFileError):
        Keys([], path, Metrics())
    monkeypatch.setenv("STREAMTOWER_RETRIEVER_API_KEYS_FILE", str(path))
    monkeypatch.setenv("STREAMTOWER_RETRIEVER_PORT", "99999")
    with pytest.raises(ConfigurationError) as caught:
        load_settings(RetrieverSettings)
    told = "\n".join(caught.value.problems)
    assert "API_KEYS_FILE" in told and "PORT" in told
    assert OLD not in told and (text is None or text not in told)


def test_a_caller_has_a_burst_and_then_the_rate() -> None:
    clock = Clock()
    rates = Rates(2.0, 3, clock)
    assert [rates.seconds_to_wait(b"a") for _ in range(5)] == [0, 0, 0, 1, 1]
    assert rates.seconds_to_wait(b"b") == 0, "another caller"
    clock.now += 0.5
    assert [rates.seconds_to_wait(b"a") for _ in range(2)] == [0, 1]
    clock.now += 1000
    assert [rates.seconds_to_wait(b"a") for _ in range(4)] == [0, 0, 0, 1]


def test_a_slow_rate_says_how_long_to_wait() -> None:
    clock = Clock()
    rates = Rates(0.1, 1, clock)
    assert [rates.seconds_to_wait(b"a"), rates.seconds_to_wait(b"a")] == [0, 10]
    clock.now += 9.5
    assert rates.seconds_to_wait(b"a") == 1
    clock.now += 0.5
    assert rates.seconds_to_wait(b"a") == 0


def test_what_one_call_takes_beyond_its_bucket_is_waited_for_afterwards() -> None:
    clock = Clock()
    rates = Rates(2.0, 3, clock)
    assert rates.seconds_to_wait(b"a") == 0
    rates.charge(b"a", 9)
    assert rates.seconds_to_wait(b"a") == 4, "7 below nothing, and one for itself, at 2 a second"
    assert rates.seconds_to_wait(b"b") == 0
    clock.now += 3.5
    assert rates.seconds_to_wait(b"a") == 1
    clock.now += 0.5
    assert [rates.seconds_to_wait(b"a") for _ in range(2)] == [0, 1]


def test_without_a_rate_nobody_is_held_back_or_remembered() -> None:
    rates = Rates(0.0, 1)
    rates.charge(b"a", 5)
    assert {rates.seconds_to_wait(b"a") for _ in range(100)} == {0}
    assert len(rates) == 0


@given(st.floats(0.5, 50), st.integers(1, 20), st.lists(st.tuples(st.integers(0, 30), st.floats(0, 2)), max_size=200))
def test_no_caller_exceeds_rate_and_burst_and_memory_stays_bounded(
    per_second: float, burst: int, requests: list[tuple[int, float]]
) -> None:
    clock = Clock()
    rates = Rates(per_second, burst, clock, max_callers=40)
    started, let_in = clock.now, dict.fromkeys(range(31), 0)
    for caller, pause in requests:
        clock.now += pause
        let_in[caller] += rates.seconds_to_wait(bytes([caller])) == 0
        assert let_in[caller] <= burst + per_second * (clock.now - started) + 1e-6
    few = Rates(per_second, burst, clock, max_callers=5)
    for caller, _ in requests:
        few.seconds_to_wait(bytes([caller]))
        assert len(few) <= 5


def ask(retriever: Running, key: str | None = None) -> tuple[int, str | None]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    answer = retriever.http.get("/v1/version", headers=headers)
    return answer.status_code, answer.headers.get("retry-after")


def test_over_http_a_key_has_its_own_rate_and_guesses_count_for_their_address(tmp_path: Path) -> None:
    settings = RetrieverSettings(
        qdrant=DEAD, model_dir=tmp_path, search_timeout_seconds=0.1, api_keys=(SecretStr(OLD), SecretStr(NEW)),
        rate_limit_per_second=0.001, rate_limit_burst=2,
    )  # fmt: skip
    with running(settings) as made:
        assert [ask(made, OLD)[0] for _ in range(3)] == [503, 503, 429]  # 503: let in, and there is no version
        assert ask(made, OLD) == (429, "1000")
        assert [ask(made, "a-guess-of-the-key")[0], ask(made)[0], ask(made, FIXED)[0]] == [401, 401, 429]
        assert ask(made, NEW)[0] == 503, "who has a key is not held back by others' guesses"
        answer = made.http.get("/v1/version", headers={"authorization": f"Bearer {OLD}"})
        assert answer.json()["type"] == "urn:streamtower:problem:too-many-requests"
        assert {made.http.get("/healthz").status_code for _ in range(5)} == {200}, "probes have no rate"
        refused = [made.value("requests_refused_total", reason=reason) for reason in ("key", "rate", "overload")]
        assert refused == [2, 4, 0]
        document = made.http.get("/openapi.json").json()["paths"]["/v1/candidates"]["post"]
        assert {"401", "429"} <= document["responses"].keys()


def test_over_http_without_keys_the_address_has_a_rate(tmp_path: Path) -> None:
    settings = RetrieverSettings(
        qdrant=DEAD, model_dir=tmp_path, search_timeout_seconds=0.1, rate_limit_per_second=0.5, rate_limit_burst=1
    )
    with running(settings) as made:
        assert [ask(made)[0], ask(made, OLD)[0]] == [503, 429]


def test_over_http_a_batch_is_as_many_requests_as_it_holds(tmp_path: Path) -> None:
    settings = RetrieverSettings(
        qdrant=DEAD, model_dir=tmp_path, search_timeout_seconds=0.1, rate_limit_per_second=0.1, rate_limit_burst=10
    )
    with running(settings) as made:
        invalid = made.http.post("/v1/candidates:batch", json={"requests": []})
        of_eight = made.http.post("/v1/candidates:batch", json={"requests": [{"user_id": "u"}] * 8})
        assert (invalid.status_code, of_eight.status_code) == (422, 503)
        assert [ask(made)[0] for _ in range(2)] == [503, 429]
        batch = made.http.get("/openapi.json").json()["paths"]["/v1/candidates:batch"]["post"]
        assert "as many requests as it" in " ".join(batch["description"].split())


def test_over_http_an_exchanged_file_of_keys_opens_and_closes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(OLD)
    settings = RetrieverSettings(qdrant=DEAD, model_dir=tmp_path, search_timeout_seconds=0.1, api_keys_file=path)
    with running(settings) as made:
        assert (ask(made, OLD)[0], ask(made, NEW)[0]) == (503, 401)
        aside = tmp_path / "aside"
        aside.write_text(NEW)
        os.replace(aside, path)
        wait_until(lambda: ask(made, NEW)[0] == 503, "the new key opens")
        assert ask(made, OLD)[0] == 401
