"""Whatever bytes come: no reader fails on them, and none takes them for something else. The longer form of it is
`python -m benchmarks.fuzz`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streams.contract import ContractError, MicroBatch
from streams.service import ConfigurationError, load_settings
from streams.settings import StreamsSettings
from streams.snapshot import decode as decode_snapshot
from streams.snapshot import encode as encode_snapshot
from tests.contract.batches import FIXED, assert_same, micro_batches
from tests.fuzz import clicks, items, snapshots
from tests.fuzz.http_bodies import Application, application
from tests.fuzz.micro_batches import check as check_micro_batch
from tests.fuzz.mutator import Mutator
from tests.fuzz.targets import SHARES, Target, fuzz, target
from tests.trainer.test_checkpoint import load, write
from trainer.checkpoint import CheckpointError

INPUTS = 12_000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module", params=list(SHARES))
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Target]]:
    with target(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield request.param, made


def test_what_is_good_is_accepted_and_what_is_damaged_is_read_right_or_refused(reader: tuple[str, Target]) -> None:
    name, made = reader
    for good in made.corpus:
        assert made.check(good), good[:200]
    outcome = fuzz(made, round(INPUTS * SHARES[name]), seed=1)
    assert outcome.failures == []
    assert outcome.num_accepted < outcome.num_inputs


def test_the_same_seed_damages_in_the_same_way_and_never_not_at_all() -> None:
    first, second = (Mutator(clicks.CORPUS, clicks.WORDS, seed=3) for _ in range(2))
    made = [first.mutated() for _ in range(500)]
    assert made == [second.mutated() for _ in range(500)]
    assert not set(made) & set(clicks.CORPUS)
    assert len(set(made)) > 450


def test_a_reader_that_takes_one_click_for_another_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: validate without its bound on rewards."""
    monkeypatch.setattr("streams.validate.MAX_REWARD", 1e300)
    with pytest.raises(AssertionError, match="no reward"):
        clicks.check(b'{"user_id":"u","item_id":"i","event_time":1,"reward":1e7}')


@given(st.dictionaries(st.sampled_from(["user_id", "item_id", "event_time", "reward", "context", "event_id"]), JSON))
def test_any_json_object_is_read_as_the_click_it_is_or_refused(value: dict[str, object]) -> None:
    clicks.check(json.dumps(value, ensure_ascii=False).encode())


@given(st.dictionaries(st.sampled_from(["item_id", "features", "payload", "other"]), JSON))
def test_any_json_object_is_read_as_the_item_it_is_or_refused(value: dict[str, object]) -> None:
    items.check(json.dumps(value, ensure_ascii=False).encode())


@pytest.fixture(scope="module")
def http() -> Iterator[Application]:
    with application() as made:
        yield made


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.dictionaries(
        st.sampled_from(["user_id", "history", "context", "k", "filter", "popularity", "exclude_seen"]), JSON
    )
)
def test_any_json_object_is_answered_as_the_request_it_is_or_refused(
    http: Application, value: dict[str, object]
) -> None:
    http.check(json.dumps(value, ensure_ascii=False).encode())


@given(batch=micro_batches(), place=st.integers(0, 10**6), bits=st.integers(1, 255))
def test_a_micro_batch_with_one_changed_byte_is_refused_or_keeps_the_contract(
    batch: MicroBatch, place: int, bits: int
) -> None:
    data = bytearray(batch.encode())
    data[place % len(data)] ^= bits
    check_micro_batch(bytes(data))


@pytest.mark.parametrize("said", ['"partition":1.5,', '"partition":"1",', '"partition":1e0,', '"partition":tru,'])
def test_a_header_is_not_rounded(said: str) -> None:
    data = FIXED.encode()
    assert data.count(b'"partition": 1, ') == 1
    assert_same(MicroBatch.decode(data), FIXED)
    with pytest.raises(ContractError, match=r"as integers|not a micro-batch"):
        MicroBatch.decode(data.replace(b'"partition": 1, ', said.encode()))


def test_an_id_that_is_not_its_hash_is_refused() -> None:
    data = FIXED.encode()
    with pytest.raises(ContractError, match="'user_hash' is not the hash of 'user_id'"):
        MicroBatch.decode(data.replace("annböbann".encode(), "annböbanm".encode()))


@given(st.binary(max_size=300))
def test_bytes_from_anywhere_are_what_they_are_or_nothing(data: bytes) -> None:
    for check in (clicks.check, items.check, check_micro_batch, snapshots.check):
        check(data)


@pytest.mark.parametrize(
    "click",
    [
        b'{"user_id":"u","item_id":"i","event_time":"\\ud800"}',
        b'{"user_id":"u","item_id":"i","event_time":1,"reward":' + b"9" * 400 + b"}",
    ],
    ids=["half a surrogate pair as a time", "a reward of 400 digits"],
)
def test_a_click_that_once_ended_the_worker_is_a_dead_letter(click: bytes) -> None:
    assert not clicks.check(click)


@pytest.mark.parametrize("text", [rb"\ud800", b"\xed\xa0\x80", b"\xff"], ids=["escaped", "encoded", "no UTF-8"])
@pytest.mark.parametrize("place", [b'{"a":"%s"}', b'{"%s":1}'], ids=["value", "name"])
def test_a_context_that_is_no_unicode_is_refused(http: Application, place: bytes, text: bytes) -> None:
    body = b'{"user_id":"u","context":%s}' % (place % text)
    assert not http.check(body)
    assert http.post(body)[0] in (400, 422)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_filter_that_qdrant_could_not_be_asked_is_refused(http: Application, number: str) -> None:
    body = b'{"user_id":"u","filter":{"must":[{"key":"n","range":{"gte":%s}}]}}' % number.encode()
    assert not http.check(body)
    assert http.post(body)[0] == 422


def test_a_snapshot_with_a_right_checksum_and_an_array_of_another_rank_is_passed_over() -> None:
    good = dict(decode_snapshot(snapshots.CORPUS[0]))
    assert snapshots.load(encode_snapshot(good)) is not None
    for name in ("estimator.last_seen_step", "estimator.mean_gap", "histories.items", "drift.counts"):
        assert snapshots.load(encode_snapshot(good | {name: good[name][..., None]})) is None, name


def test_a_manifest_that_is_nested_without_end_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, [1])
    (path,) = tmp_path.glob("c*/manifest.json")
    path.write_bytes(b'{"identity":' + b"[" * 100_000)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("YOUNG_MINUTES", "inf", "finite"),
        ("ALPHA", "nan", "finite"),
        ("KAFKA_PASSWORD", "\udcff", "not UTF-8"),
        ("BATCH_SIZE", "9" * 5000, "integer"),
    ],
)
def test_a_value_that_means_nothing_is_a_problem_of_configuration(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"STREAMTOWER_STREAMS_{name}", value)
    with pytest.raises(ConfigurationError, match=f"STREAMTOWER_STREAMS_{name}.*{said}"):
        load_settings(StreamsSettings)
