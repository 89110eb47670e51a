"""The answers of a real Qdrant 1.19.0, recorded exchange by exchange, against the endpoint: status and structure.

Each exchange is asked in the recorded order, under names of the test's own, so that it works on a server in use and
leaves nothing behind. Compared is everything but: the words of error messages, `time`, and numbers that count a
server's inner work (operation_id, version, segments_count). Floats may differ by 1e-5; points of equal score may come
in any order, and so may collections and aliases, whose order Qdrant does not promise.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fixtures.qdrant import names_of_its_own

pytestmark = pytest.mark.index

EXCHANGES = [json.loads(line) for line in Path(__file__).with_name("answers-1.19.0.jsonl").read_text().splitlines()]
DIFFERENT = {
    "root": "the title says that this is the local endpoint and not a Qdrant server",
}
"""What the local endpoint answers otherwise, on purpose, and why. On a real server nothing may differ."""
TIED = {
    "query sparse": {21: {"id": 21, "score": 0.5}, 22: None},
    "fused, with filter": {21: {"id": 21, "score": 0.09 + 0.5 * math.log(1.5)}},
}
"""Where points 21 and 22 have the same sparse score and the limit, here or in a prefetch, leaves room for one of them:
which one, is open on a server too. What the answer says of each point if it was not the recorded one."""
NAMES = {"items__v1", "items__v2", "plain", "nope", "z", "items", "half", "whole", "zzz", "y"}
NAME_FIELDS = {"collection_name", "alias_name", "old_alias_name", "new_alias_name"}
UNCOMPARED = {"operation_id", "version", "segments_count", "time"}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def answers(qdrant_url: str) -> Iterator[dict[int, tuple[int, Any]]]:
    """Status and answer to every exchange, by its place in the file; asked in order, once."""
    with names_of_its_own(qdrant_url) as prefix, httpx.Client(base_url=qdrant_url, timeout=30) as client:
        yield {place: _own(_ask(client, exchange, prefix), prefix) for place, exchange in enumerate(EXCHANGES)}


def _ask(client: httpx.Client, exchange: dict[str, Any], prefix: str) -> tuple[int, Any]:
    path = "/".join(prefix + part if part in NAMES else part for part in exchange["path"].split("/"))
    if exchange["path"].count("/") == 1:
        path = exchange["path"]  # /aliases, /nope: no collection's
    body = exchange.get("raw_body", "").encode()
    if "body" in exchange:
        body = json.dumps(_renamed(exchange["body"], prefix)).encode()
    answer = client.request(exchange["method"], path, content=body, headers={"content-type": "application/json"})
    try:
        return answer.status_code, answer.json()
    except ValueError:
        return answer.status_code, answer.text


def _renamed(document: Any, prefix: str) -> Any:
    if isinstance(document, list):
        return [_renamed(entry, prefix) for entry in document]
    if not isinstance(document, dict):
        return document
    return {
        name: prefix + value if name in NAME_FIELDS else _renamed(value, prefix) for name, value in document.items()
    }


def _own(answer: tuple[int, Any], prefix: str) -> tuple[int, Any]:
    """The answer with our names as recorded, and without the collections and aliases of others."""
    status, document = answer
    if isinstance(document, dict) and isinstance(document.get("result"), dict):
        for part in ("collections", "aliases"):
            if part in document["result"]:
                document["result"][part] = [
                    {field: name.removeprefix(prefix) for field, name in entry.items()}
                    for entry in document["result"][part]
                    if next(iter(entry.values())).startswith(prefix)
                ]
    return status, document


def canonical(document: Any) -> Any:
    """The part of an answer that is compared, with what may come in any order put into one."""
    if isinstance(document, list):
        entries = [canonical(entry) for entry in document]
        if entries and isinstance(entries[0], dict) and "score" in entries[0]:
            entries.sort(key=lambda point: (-point["score"], -point.get("order_value", 0), str(point["id"])))
        return entries
    if not isinstance(document, dict):
        return round(document, 6) if isinstance(document, float) else document
    kept = {name: canonical(value) for name, value in document.items() if name not in UNCOMPARED}
    if isinstance(kept.get("status"), dict) and "error" in kept["status"]:
        assert kept["status"]["error"], "an error without words"
        kept["status"] = {"error": "…"}
    for part in ("collections", "aliases"):
        if isinstance(kept.get(part), list):
            kept[part].sort(key=str)
    return kept


def difference(ours: Any, theirs: Any, place: str = "") -> str | None:
    """Where the first difference is and what it is."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return f"{place}: fields {sorted(ours)} instead of {sorted(theirs)}"
        return next(filter(None, (difference(ours[name], theirs[name], f"{place}.{name}") for name in ours)), None)
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return f"{place}: {len(ours)} entries instead of {len(theirs)}: {ours} instead of {theirs}"
        pairs = enumerate(zip(ours, theirs, strict=True))
        return next(filter(None, (difference(*pair, f"{place}[{i}]") for i, pair in pairs)), None)
    numbers = (int, float)
    if type(ours) in numbers and type(theirs) in numbers:
        return None if abs(ours - theirs) <= TOLERANCE * max(1, abs(theirs)) else f"{place}: {ours} instead of {theirs}"
    return None if ours == theirs and type(ours) is type(theirs) else f"{place}: {ours!r} instead of {theirs!r}"


def with_other_tie(exchange: dict[str, Any]) -> dict[str, Any]:
    """The recorded answer as it would be had the other one of two equal points been taken."""
    others = TIED[exchange["name"]]
    points = [point for point in exchange["answer"]["result"]["points"] if point["id"] not in others]
    points += [point for point in others.values() if point]
    return exchange["answer"] | {"result": {"points": points}}


@pytest.mark.parametrize("place", range(len(EXCHANGES)), ids=[exchange["name"] for exchange in EXCHANGES])
def test_the_endpoint_answers_as_a_server_did(place: int, answers: dict[int, tuple[int, Any]]) -> None:
    exchange = EXCHANGES[place]
    status, answer = answers[place]
    found = f"status {status} instead of {exchange['status']}" if status != exchange["status"] else None
    found = found or difference(canonical(answer), canonical(exchange["answer"]))
    if found and exchange["name"] in TIED:
        found = difference(canonical(answer), canonical(with_other_tie(exchange)))
    if exchange["name"] in DIFFERENT and "STREAMTOWER_TEST_QDRANT" not in os.environ:
        assert found, f"{exchange['name']!r} is declared as different, and is not: take it off the list"
    else:
        assert found is None, f"{found}\nanswer: {answer}"


def test_every_declared_difference_is_an_exchange() -> None:
    assert DIFFERENT.keys() | TIED.keys() <= {exchange["name"] for exchange in EXCHANGES}
