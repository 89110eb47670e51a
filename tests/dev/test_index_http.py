"""What the endpoint says of itself, keeps of the settings it is given, and refuses, over plain HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("qdrant_edge", reason="needs the extra `embedded`")

from streamtower.dev.index.process import LocalIndex

pytestmark = pytest.mark.index

VECTORS = {"dense": {"size": 4, "distance": "Dot"}}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of an endpoint of these tests' own: what is tested here is not what a server does."""
    with (
        LocalIndex(tmp_path_factory.mktemp("index")) as index,
        httpx.Client(base_url=index.url, timeout=30) as client,
    ):
        yield client


@pytest.fixture
def items(http: httpx.Client) -> Iterator[str]:
    """Path of a collection of four points."""
    path = "/collections/items"
    assert http.put(path, json={"vectors": VECTORS, "sparse_vectors": {"covisit": {}}}).status_code == 200
    points = [{"id": i, "vector": {"dense": [i, 1, 0, 0]}, "payload": {"step": i}} for i in range(4)]
    assert http.put(f"{path}/points?wait=true", json={"points": points}).status_code == 200
    yield path
    http.delete(path)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Status and words of an error in Qdrant's form."""
    document = answer.json()
    assert set(document) == {"status", "time"}
    return answer.status_code, document["status"]["error"]


def test_the_title_says_that_this_is_no_server(http: httpx.Client) -> None:
    assert "not a Qdrant server" in http.get("/").json()["title"]


def test_nothing_is_compressed(http: httpx.Client, items: str) -> None:
    answer = http.post(f"{items}/points/scroll", json={"with_vector": True}, headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in answer.headers and "content-length" in answer.headers


def test_settings_without_effect_are_kept_and_shown(http: httpx.Client, items: str) -> None:
    body = {
        "vectors": {"dense": {"size": 4, "distance": "Dot", "on_disk": True, "hnsw_config": {"m": 0}}},
        "hnsw_config": {"m": 0, "ef_construct": 200},
        "optimizers_config": {"indexing_threshold": 0, "default_segment_number": 2},
        "quantization_config": {"scalar": {"type": "int8", "always_ram": True}},
        "shard_number": 6,
        "replication_factor": 2,
        "write_consistency_factor": 2,
        "on_disk_payload": False,
    }
    assert http.put("/collections/other", json=body).json()["result"] is True
    assert http.patch("/collections/other", json={"optimizers_config": {"indexing_threshold": 20000}}).json()["result"]
    result = http.get("/collections/other").json()["result"]
    config = result["config"]
    assert result["status"] == "green"
    assert config["params"] == {
        name: body[name]
        for name in ("vectors", "shard_number", "replication_factor", "write_consistency_factor", "on_disk_payload")
    }
    assert (config["hnsw_config"]["m"], config["hnsw_config"]["ef_construct"]) == (0, 200)
    assert config["optimizer_config"]["indexing_threshold"] == 20000
    assert config["optimizer_config"]["default_segment_number"] == 2
    assert config["quantization_config"] == body["quantization_config"]
    http.delete("/collections/other")


@pytest.mark.parametrize("vectors", [VECTORS, VECTORS["dense"]], ids=["named", "unnamed"])
def test_a_vectors_settings_can_be_changed_but_not_its_size(http: httpx.Client, vectors: Any) -> None:
    name = "dense" if vectors is VECTORS else ""
    http.put("/collections/other", json={"vectors": vectors})
    change = {"vectors": {name: {"size": 5, "hnsw_config": {"m": 0}}}, "quantization_config": "Disabled"}
    assert http.patch("/collections/other", json=change).json()["result"] is True
    assert refusal(http.patch("/collections/other", json={"vectors": {"nope": {}}}))[0] == 400
    shown = http.get("/collections/other").json()["result"]["config"]["params"]["vectors"]
    assert (shown[name] if name else shown) == {"size": 4, "distance": "Dot", "hnsw_config": {"m": 0}}
    http.delete("/collections/other")


def test_payload_indexes_are_shown_with_their_parameters_and_can_be_removed(http: httpx.Client, items: str) -> None:
    schema = {"type": "integer", "lookup": True, "range": False}
    for field, kind in (("step", schema), ("words", {"type": "text", "tokenizer": "word", "lowercase": True})):
        answer = http.put(f"{items}/index?wait=true", json={"field_name": field, "field_schema": kind})
        assert answer.status_code == 200, answer.text
    shown = http.get(items).json()["result"]["payload_schema"]
    assert shown["step"] == {"data_type": "integer", "params": schema, "points": 4}
    assert shown["words"]["data_type"] == "text"
    assert http.delete(f"{items}/index/step?wait=true").status_code == 200
    assert set(http.get(items).json()["result"]["payload_schema"]) == {"words"}


@pytest.mark.parametrize(
    ("method", "path", "body", "word"),
    [
        ("POST", "/points/query", {"query": {"text": "shoes", "model": "m"}, "using": "dense"}, "text"),
        ("POST", "/points/query", {"query": {"discover": {"target": 1, "context": []}}, "using": "dense"}, "discover"),
        ("POST", "/points/query", {"query": {"context": []}, "using": "dense"}, "context"),
        ("POST", "/points/query", {"query": {"nearest": 1, "mmr": {}}, "using": "dense"}, "mmr"),
        ("POST", "/points/query", {"query": 1, "using": "dense", "lookup_from": {"collection": "a"}}, "lookup_from"),
        ("POST", "/points/query", {"query": [[1, 0, 0, 0]], "using": "dense"}, "multivectors"),
        ("POST", "/points/query/groups", {"query": 1, "group_by": "step"}, "grouped"),
        ("POST", "/facet", {"key": "step"}, "facets"),
        ("POST", "/points/search/matrix/pairs", {}, "matrices"),
        ("POST", "/snapshots", {}, "snapshots"),
        ("GET", "/cluster", None, "clusters"),
        ("PUT", "/vectors/more", {}, "vector name"),
    ],
)
def test_what_only_a_server_does_is_refused_by_name(
    http: httpx.Client, items: str, method: str, path: str, body: Any, word: str
) -> None:
    status, words = refusal(http.request(method, items + path, json=body))
    assert status == 400 and word in words and "local endpoint does not do this" in words


@pytest.mark.parametrize(
    "body",
    [
        {"vectors": {"dense": {"size": 4, "distance": "Dot", "multivector_config": {"comparator": "max_sim"}}}},
        {"vectors": VECTORS, "init_from": {"collection": "items"}},
        {"vectors": VECTORS, "sharding_method": "custom"},
        {"shard_number": 1},
    ],
    ids=lambda body: list(body)[-1],
)
def test_a_collection_that_only_a_server_can_have_is_refused(http: httpx.Client, body: Any) -> None:
    status, words = refusal(http.put("/collections/other", json=body))
    assert status == 400 and "local endpoint does not do this" in words
    assert http.get("/collections/other/exists").json()["result"] == {"exists": False}


@pytest.mark.parametrize(
    ("points", "status"),
    [
        ([{"id": 2**64, "vector": {}}], 400),
        ([{"id": True, "vector": {}}], 400),
        ([{"id": 1.5, "vector": {}}], 400),
        ([{"id": 9}], 400),
        ([{"id": 9, "vector": [1, 2, 3, 4]}], 400),
        ([{"id": 9, "vector": {"dense": {"indices": [1], "values": [1]}}}], 400),
        ([{"id": 9, "vector": {"covisit": [1, 2, 3, 4]}}], 400),
        ([{"id": 9, "vector": {"covisit": {"indices": [-1], "values": [1]}}}], 400),
        ([{"id": 9, "vector": {"covisit": {"indices": [2**32], "values": [1]}}}], 400),
        ([{"id": 9, "vector": {"covisit": {"indices": [1, 2], "values": [1]}}}], 422),
        ([{"id": 9, "vector": {"dense": [1, 2, None, 4]}}], 400),
        ([{"id": 9, "vector": {"dense": [1, 2, "3", 4]}}], 400),
        ([{"id": 9, "vector": {}, "payload": [1]}], 400),
        ([{"id": 9, "vector": {}, "payload": json.loads('{"a":' * 101 + "1" + "}" * 101)}], 400),
    ],
)
def test_a_bad_point_keeps_its_whole_batch_out(http: httpx.Client, items: str, points: list[Any], status: int) -> None:
    good = {"id": 8, "vector": {"dense": [1, 1, 1, 1]}}
    answer = http.put(f"{items}/points?wait=true", json={"points": [good, *points]})
    assert refusal(answer)[0] == status
    assert http.post(f"{items}/points/count", json={}).json()["result"] == {"count": 4}


def test_a_payload_as_deep_as_allowed_can_be_read_again(http: httpx.Client, items: str) -> None:
    payload = json.loads('{"a":' * 100 + "1" + "}" * 100)
    for body in ({"payload": payload, "points": [3]}, {"payload": {"a": payload}, "points": [3]}):
        http.post(f"{items}/points/payload?wait=true", json=body)
    assert http.get(f"{items}/points/3").json()["result"]["payload"] == payload | {"step": 3}


def test_a_bad_operation_keeps_its_whole_batch_out(http: httpx.Client, items: str) -> None:
    operations = [{"delete": {"points": [1]}}, {"delete": {"points": ["x"]}}]
    assert refusal(http.post(f"{items}/points/batch?wait=true", json={"operations": operations}))[0] == 400
    assert http.post(f"{items}/points/count", json={}).json()["result"] == {"count": 4}


@pytest.mark.parametrize(
    "batch",
    [
        {"ids": [8, 9], "vectors": {"dense": [[1, 1, 1, 1]]}},
        {"ids": [8], "vectors": {"dense": [[1, 1, 1, 1]], "covisit": []}},
        {"ids": [8], "vectors": {"dense": [[1, 1, 1, 1]]}, "payloads": [{}, {}]},
    ],
)
def test_columns_of_a_batch_must_be_of_one_length(http: httpx.Client, items: str, batch: Any) -> None:
    assert refusal(http.put(f"{items}/points", json={"batch": batch}))[0] == 422


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("dense", [1, 1, 1]),
        ("dense", {"indices": [1], "values": [1]}),
        ("covisit", {"indices": [7, 7], "values": [1, 2]}),
        ("covisit", {"indices": [7], "values": [1, 2]}),
        ("covisit", {"indices": [2**32], "values": [1]}),
        ("covisit", [1, 1, 1, 1]),
        ("nope", [1, 1, 1, 1]),
    ],
)
def test_a_vector_is_refused_in_a_column_as_in_a_point(http: httpx.Client, items: str, name: str, bad: Any) -> None:
    good = {"covisit": {"indices": [7], "values": [1]}}.get(name, [1, 1, 1, 1])
    points = [{"id": 8, "vector": {} if name == "nope" else {name: good}}, {"id": 9, "vector": {name: bad}}]
    words = refusal(http.put(f"{items}/points?wait=true", json={"points": points}))
    assert words[0] in (400, 422)
    batch = {"ids": [8, 9], "vectors": {name: [good, bad]}}
    assert refusal(http.put(f"{items}/points?wait=true", json={"batch": batch})) == words
    assert http.post(f"{items}/points/count", json={}).json()["result"] == {"count": 4}


def test_columns_of_unnamed_vectors_are_points(http: httpx.Client) -> None:
    assert http.put("/collections/other", json={"vectors": VECTORS["dense"]}).status_code == 200
    batch = {"ids": [1, 2], "vectors": [[1, 0, 0, 0], [0, 2, 0, 0]], "payloads": [None, {"a": 1}]}
    assert http.put("/collections/other/points?wait=true", json={"batch": batch}).status_code == 200
    found = http.post("/collections/other/points/scroll", json={"with_vector": True}).json()["result"]["points"]
    assert [point["vector"] for point in found] == batch["vectors"]
    assert [point["payload"] for point in found] == [{}, {"a": 1}]
    bad = {"ids": [3, 4], "vectors": [[1, 0, 0, 0], [0, 2, 0]]}
    assert refusal(http.put("/collections/other/points?wait=true", json={"batch": bad}))[0] == 400
    http.delete("/collections/other")


@pytest.mark.parametrize(
    "condition",
    [
        {"key": "step", "match": {}},
        {"key": "step", "match": {"value": 1.5}},
        {"key": "step", "match": {"any": ["a", 1]}},
        {"key": "step", "range": {"gt": "yesterday"}},
        {"key": "step", "range": {"gt": 1, "lt": "2026-01-01T00:00:00Z"}},
        {"key": "a b[", "match": {"value": 1}},
        {"has_id": [-1]},
        {"has_id": ["x"]},
        {"nested": {"key": "a"}},
        "step",
    ],
    ids=json.dumps,
)
def test_a_condition_that_is_none_is_refused(http: httpx.Client, items: str, condition: Any) -> None:
    assert refusal(http.post(f"{items}/points/scroll", json={"filter": {"must": [condition]}}))[0] == 400


@pytest.mark.parametrize(
    "formula", [{"sum": 1}, {"nope": [1]}, {"ln": None}, {"div": {"left": 1}}, True, {"sum": ["$scoreboard"]}], ids=str
)
def test_a_formula_that_is_none_is_refused(http: httpx.Client, items: str, formula: Any) -> None:
    body = {"prefetch": {"query": [1, 1, 1, 1], "using": "dense"}, "query": {"formula": formula}}
    assert refusal(http.post(f"{items}/points/query", json=body))[0] == 400


def test_a_formula_outside_its_range_is_the_callers_error(http: httpx.Client, items: str) -> None:
    body = {"prefetch": {"query": [-1, 0, 0, 0], "using": "dense"}, "query": {"formula": {"ln": "$score"}}}
    status, words = refusal(http.post(f"{items}/points/query", json=body))
    assert status == 400 and "no finite value" in words


def test_a_body_over_32_mib_is_refused(http: httpx.Client, items: str) -> None:
    status, words = refusal(http.put(f"{items}/points", content=b" " * (32 * 1024**2 + 1)))
    assert status == 400 and "larger than allowed" in words


def test_whoever_does_not_wait_does_not_hear_of_missing_points(http: httpx.Client, items: str) -> None:
    body = {"payload": {"a": 1}, "points": [999]}
    assert http.post(f"{items}/points/payload?wait=true", json=body).status_code == 404
    assert http.post(f"{items}/points/payload", json=body).json()["result"]["status"] == "acknowledged"


def test_names_are_taken_as_they_are_written(http: httpx.Client) -> None:
    """No name can reach a directory outside the endpoint's own, and any allowed one works."""
    for name in ("..", ".", "%2e%2e", "größe 1", "a" * 255):
        path = f"/collections/{httpx.URL(path='/' + name).raw_path.decode()[1:]}"
        if name in ("..", "."):
            path = f"/collections/{name.replace('.', '%2E')}"
        assert http.put(path, json={"vectors": VECTORS}).status_code == 200, name
        assert http.get(path).json()["result"]["points_count"] == 0
        assert http.delete(path).json()["result"] is True
    assert http.put(f"/collections/{'a' * 256}", json={"vectors": VECTORS}).status_code == 422


def test_an_alias_is_no_name_for_a_new_collection(http: httpx.Client, items: str) -> None:
    action = {"create_alias": {"collection_name": "items", "alias_name": "shown"}}
    assert http.post("/collections/aliases", json={"actions": [action]}).json()["result"] is True
    assert refusal(http.put("/collections/shown", json={"vectors": VECTORS}))[0] == 400
    assert http.delete("/collections/shown").json()["result"] is False
    assert http.get("/collections/shown").json()["result"]["points_count"] == 4


def test_metrics_count_answers_and_points(http: httpx.Client, items: str) -> None:
    query = {"query": [1, 0, 0, 0], "using": "dense"}
    route = "/collections/{name}/points/query"

    def answers() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        points = [s.value for s in samples if s.name == "collection_points" and s.labels["id"] == "items"]
        assert points == [4.0]
        return {
            (sample.labels["endpoint"], sample.labels["status"]): sample.value
            for sample in samples
            if sample.name == "rest_responses_total" and sample.labels["method"] == "POST"
        }

    before = answers()
    assert http.post(f"{items}/points/query", json=query).status_code == 200
    assert http.post(f"{items}/points/query", json={"query": [1], "using": "dense"}).status_code == 400
    after = answers()
    for status in ("200", "400"):
        assert after[route, status] - before.get((route, status), 0.0) == 1.0


def test_a_key_is_asked_for_where_data_is(tmp_path: Path) -> None:
    with LocalIndex(tmp_path, api_key="secret") as index, httpx.Client(base_url=index.url) as client:
        for path in ("/", "/readyz", "/livez", "/healthz"):
            assert client.get(path).status_code == 200
        for path in ("/collections", "/metrics", "/nope"):
            for headers in ({}, {"api-key": "Secret"}, {"authorization": "Bearer x"}):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["content-type"].startswith("text/plain")
        for headers in ({"api-key": "secret"}, {"authorization": "Bearer secret"}):
            assert client.get("/collections", headers=headers).status_code == 200
