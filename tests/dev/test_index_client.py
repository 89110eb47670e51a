"""The endpoint through the real client, against the client's own local mode, whose semantics are checked upstream."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qdrant_client import QdrantClient, models

from tests.fixtures.qdrant import names_of_its_own

pytestmark = [
    pytest.mark.index,
    # Local mode says so once when a payload index is made; the endpoint has real ones.
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant:UserWarning"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning"),
]

DIM = 8
NUM_POINTS = 120
TOLERANCE = 1e-4
VECTORS: dict[str, models.VectorParams] = {"dense": models.VectorParams(size=DIM, distance=models.Distance.DOT)}
SPARSE = {"covisit": models.SparseVectorParams()}
UUIDS = [f"00000000-0000-4000-8000-{i:012d}" for i in range(4)]


@dataclass
class Both:
    """One collection, held by the endpoint and by local mode."""

    endpoint: QdrantClient
    oracle: QdrantClient
    name: str

    def do(self, method: str, **arguments: Any) -> tuple[Any, Any]:
        """The same call of both clients."""
        return (
            getattr(self.endpoint, method)(self.name, **arguments),
            getattr(self.oracle, method)(self.name, **arguments),
        )


def both_clients(url: str, name: str) -> Both:
    both = Both(QdrantClient(url=url, headers={"accept-encoding": "identity"}), QdrantClient(":memory:"), name)
    both.do("create_collection", vectors_config=VECTORS, sparse_vectors_config=SPARSE)
    for field, kind in (("item_id", "keyword"), ("step", "integer"), ("category", "keyword"), ("price", "float")):
        both.do("create_payload_index", field_name=field, field_schema=kind, wait=True)
    return both


@pytest.fixture(scope="module")
def filled(qdrant_url: str) -> Iterator[Both]:
    """Points with all kinds of gaps, for reading only."""
    random = np.random.default_rng(7)
    with names_of_its_own(qdrant_url) as name:
        both = both_clients(qdrant_url, name)
        both.do("upsert", points=[random_point(random, i) for i in range(NUM_POINTS)], wait=True)
        yield both
        both.endpoint.close()


def random_point(random: np.random.Generator, number: int) -> models.PointStruct:
    vector: dict[str, Any] = {}
    if random.random() < 0.9:
        vector["dense"] = random.normal(size=DIM).astype(np.float32).tolist()
    if random.random() < 0.7:
        indices = random.choice(30, size=random.integers(1, 8), replace=False)
        vector["covisit"] = models.SparseVector(
            indices=indices.tolist(), values=random.random(len(indices)).astype(np.float32).tolist()
        )
    payload: dict[str, Any] = {"item_id": f"item {number}", "step": int(random.integers(0, 9))}
    if random.random() < 0.8:
        tags = random.choice(list("abcd"), size=random.integers(1, 3), replace=False).tolist()
        payload["category"] = tags if random.random() < 0.5 else tags[0]
    if random.random() < 0.8:
        payload["price"] = round(float(random.random() * 10), 2)
    payload |= {"sale": bool(random.random() < 0.5)} if random.random() < 0.5 else {"sale": None}
    # Few digits: of 17 the engine's storage may lose the last bit, as a server's does.
    payload["place"] = {axis: round(float(random.uniform(-10, 10)), 3) for axis in ("lon", "lat")}
    payload["added"] = f"2026-01-{1 + number % 28:02d}T00:00:00Z"
    payload["parts"] = [
        {"size": int(size), "kind": str(kind)} for size, kind in zip([1, number % 5], "xy", strict=True)
    ]
    return models.PointStruct(
        id=UUIDS[number] if number < len(UUIDS) else number * 10**16, vector=vector, payload=payload
    )


def scores(points: list[models.ScoredPoint]) -> dict[Any, float]:
    return {point.id: pytest.approx(point.score, abs=TOLERANCE) for point in points}


def assert_same(answers: tuple[models.QueryResponse, models.QueryResponse]) -> None:
    """The same points in the same order with the same scores; order among equal scores is free."""
    ours, theirs = (answer.points for answer in answers)
    assert [point.score for point in ours] == pytest.approx([point.score for point in theirs], abs=TOLERANCE)
    assert {point.id: point.score for point in ours} == scores(theirs)
    assert {point.id: point.payload for point in ours} == {point.id: point.payload for point in theirs}


# Filters

numbers = st.integers(0, 9)
bounds = st.fixed_dictionaries({}, optional=dict.fromkeys(("gt", "gte", "lt", "lte"), numbers))
matches = st.one_of(
    st.builds(lambda value: models.MatchValue(value=value), st.sampled_from(["a", "b", "z"])),
    st.builds(lambda values: models.MatchAny(any=values), st.lists(st.sampled_from(list("abz")), max_size=3)),
    st.builds(
        lambda values: models.MatchExcept(**{"except": values}), st.lists(st.sampled_from(list("abz")), max_size=3)
    ),
)
conditions = st.one_of(
    st.builds(lambda match: models.FieldCondition(key="category", match=match), matches),
    st.builds(lambda value: models.FieldCondition(key="step", match=models.MatchValue(value=value)), numbers),
    st.builds(lambda value: models.FieldCondition(key="sale", match=models.MatchValue(value=value)), st.booleans()),
    st.builds(
        lambda key, limits: models.FieldCondition(key=key, range=models.Range(**limits)),
        st.sampled_from(["step", "price", "parts[].size", "nothing"]),
        bounds,
    ),
    st.builds(
        lambda day: models.FieldCondition(key="added", range=models.DatetimeRange(gte=f"2026-01-{day:02d}T00:00:00Z")),
        st.integers(1, 28),
    ),
    st.builds(
        lambda count: models.FieldCondition(key="category", values_count=models.ValuesCount(gte=count)),
        st.integers(0, 3),
    ),
    st.builds(
        lambda radius: models.FieldCondition(
            key="place", geo_radius=models.GeoRadius(center=models.GeoPoint(lon=0, lat=0), radius=radius)
        ),
        st.floats(1e3, 2e6),
    ),
    st.builds(
        lambda east: models.FieldCondition(
            key="place",
            geo_bounding_box=models.GeoBoundingBox(
                top_left=models.GeoPoint(lon=-5, lat=5), bottom_right=models.GeoPoint(lon=east, lat=-5)
            ),
        ),
        st.floats(-4, 9),
    ),
    st.builds(
        lambda key: models.IsEmptyCondition(is_empty=models.PayloadField(key=key)),
        st.sampled_from(["category", "sale", "nothing"]),
    ),
    st.builds(
        lambda key: models.IsNullCondition(is_null=models.PayloadField(key=key)), st.sampled_from(["sale", "category"])
    ),
    st.builds(
        lambda ids: models.HasIdCondition(has_id=ids), st.lists(st.sampled_from([*UUIDS, 5 * 10**16, 3]), max_size=3)
    ),
    st.builds(lambda name: models.HasVectorCondition(has_vector=name), st.sampled_from(["dense", "covisit"])),
    st.builds(
        lambda size, kind: models.NestedCondition(
            nested=models.Nested(
                key="parts",
                filter=models.Filter(
                    must=[
                        models.FieldCondition(key="size", match=models.MatchValue(value=size)),
                        models.FieldCondition(key="kind", match=models.MatchValue(value=kind)),
                    ]
                ),
            )
        ),
        st.integers(0, 4),
        st.sampled_from("xy"),
    ),
)
clauses = st.one_of(st.none(), st.lists(conditions, min_size=1, max_size=3))
filters = st.recursive(
    st.builds(models.Filter, must=clauses, should=clauses, must_not=clauses),
    lambda inner: st.one_of(
        st.builds(lambda one, two: models.Filter(must=[one], must_not=[two]), inner, inner),
        st.builds(
            lambda some, count: models.Filter(min_should=models.MinShould(conditions=some, min_count=count)),
            # Each condition once: the engine's answer to the same one twice is not what its documentation says.
            st.lists(conditions, min_size=1, max_size=4, unique_by=repr),
            st.integers(1, 3),
        ),
    ),
    max_leaves=3,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(condition=filters)
def test_any_filter_selects_the_points_that_local_mode_selects(filled: Both, condition: models.Filter) -> None:
    ours, theirs = filled.do("count", count_filter=condition, exact=True)
    assert ours == theirs
    (ours, _), (theirs, _) = filled.do("scroll", scroll_filter=condition, limit=NUM_POINTS, with_payload=True)
    assert {point.id: point.payload for point in ours} == {point.id: point.payload for point in theirs}
    query = np.linspace(-1, 1, DIM).tolist()
    assert_same(filled.do("query_points", query=query, using="dense", query_filter=condition, limit=NUM_POINTS))


# Searches

dense_query = np.linspace(1, -0.5, DIM).tolist()
sparse_query = models.SparseVector(indices=[3, 7, 11, 29], values=[1.0, 0.5, 2.0, 0.25])
SOME_ID = 77 * 10**16
dense_prefetch = models.Prefetch(query=dense_query, using="dense", limit=20)
sparse_prefetch = models.Prefetch(query=sparse_query, using="covisit", limit=20)

SEARCHES: dict[str, dict[str, Any]] = {
    "dense": {"query": dense_query, "using": "dense", "limit": 15},
    "dense with payload": {"query": dense_query, "using": "dense", "limit": 15, "with_payload": True},
    "two payload fields": {"query": dense_query, "using": "dense", "with_payload": ["item_id", "step"]},
    "payload without a field": {
        "query": dense_query, "using": "dense", "with_payload": models.PayloadSelectorExclude(exclude=["parts"]),
    },
    "sparse": {"query": sparse_query, "using": "covisit", "limit": 15},
    "offset": {"query": dense_query, "using": "dense", "limit": 10, "offset": 7},
    "threshold": {"query": dense_query, "using": "dense", "limit": 100, "score_threshold": 0.8},
    "exact": {"query": dense_query, "using": "dense", "search_params": models.SearchParams(exact=True, hnsw_ef=128)},
    "by id": {"query": SOME_ID, "using": "dense"},
    "by uuid": {"query": UUIDS[1], "using": "dense"},
    "recommend by average": {
        "query": models.RecommendQuery(
            recommend=models.RecommendInput(positive=[SOME_ID, dense_query], negative=[UUIDS[1]])
        ),
        "using": "dense",
    },
    "recommend by best score": {
        "query": models.RecommendQuery(
            recommend=models.RecommendInput(positive=[SOME_ID], negative=[UUIDS[1]], strategy="best_score")
        ),
        "using": "dense",
    },
    "recommend by sum": {
        "query": models.RecommendQuery(
            recommend=models.RecommendInput(positive=[SOME_ID], negative=[UUIDS[1]], strategy="sum_scores")
        ),
        "using": "dense",
    },
    "reciprocal ranks": {
        "prefetch": [dense_prefetch, sparse_prefetch], "query": models.FusionQuery(fusion="rrf"), "limit": 10,
    },
    "distribution-based": {
        "prefetch": [dense_prefetch, sparse_prefetch], "query": models.FusionQuery(fusion="dbsf"), "limit": 10,
    },
    "rescored": {"prefetch": [sparse_prefetch], "query": dense_query, "using": "dense", "limit": 10},
    "formula of payload": {
        "prefetch": [dense_prefetch],
        "query": models.FormulaQuery(
            formula=models.SumExpression(
                sum=[
                    "$score",
                    models.MultExpression(mult=[0.1, "step"]),
                    models.FieldCondition(key="category", match=models.MatchValue(value="a")),
                    models.NegExpression(neg=models.AbsExpression(abs="price")),
                    models.DivExpression(div=models.DivParams(left=1, right=models.ExpExpression(exp=0.5))),
                    models.PowExpression(pow=models.PowParams(base=2, exponent=models.SqrtExpression(sqrt=4.0))),
                    models.GaussDecayExpression(
                        gauss_decay=models.DecayParamsExpression(x="step", target=4, scale=2, midpoint=0.5)
                    ),
                ]
            ),
            defaults={"price": 1.5},
        ),
        "limit": 10,
    },
}  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_a_search_finds_what_local_mode_finds(filled: Both, search: dict[str, Any]) -> None:
    assert_same(filled.do("query_points", **search))


def test_a_batch_of_searches_finds_what_each_alone_finds(filled: Both) -> None:
    requests = [
        models.QueryRequest(query=dense_query, using="dense", limit=3),
        models.QueryRequest(query=sparse_query, using="covisit", limit=4, with_payload=True),
    ]
    ours, theirs = filled.do("query_batch_points", requests=requests)
    assert len(ours) == 2
    for pair in zip(ours, theirs, strict=True):
        assert_same(pair)


def test_order_by_a_payload_field_goes_through_all_points_in_order(filled: Both) -> None:
    points, _ = filled.endpoint.scroll(filled.name, limit=NUM_POINTS, order_by="step")
    steps = [point.payload["step"] for point in points if point.payload]
    assert steps == sorted(steps) and len(points) == NUM_POINTS
    answer = filled.endpoint.query_points(
        filled.name, query=models.OrderByQuery(order_by=models.OrderBy(key="step", direction="desc")), limit=5
    )
    ours = filled.endpoint.retrieve(filled.name, [point.id for point in answer.points])
    assert [point.payload["step"] for point in ours if point.payload] == sorted(steps)[::-1][:5]


def test_scrolling_page_by_page_meets_every_point_once(filled: Both) -> None:
    met, offset = [], None
    while True:
        points, offset = filled.endpoint.scroll(filled.name, limit=7, offset=offset, with_payload=False)
        met += [point.id for point in points]
        if offset is None:
            break
    assert len(met) == NUM_POINTS == len(set(met))


def test_retrieved_points_are_what_was_sent(filled: Both) -> None:
    ids = [UUIDS[0], SOME_ID, 3]
    ours, theirs = filled.do("retrieve", ids=ids, with_vectors=True)
    assert {p.id: p.payload for p in ours} == {p.id: p.payload for p in theirs}
    for mine, other in zip(sorted(ours, key=str), sorted(theirs, key=str), strict=True):
        assert_same_vectors(mine.vector, other.vector)


def assert_same_vectors(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, vector in theirs.items():
        if name == "covisit":
            mine = dict(zip(ours[name].indices, ours[name].values, strict=True))
            assert mine == pytest.approx(dict(zip(vector.indices, vector.values, strict=True)), abs=TOLERANCE)
        else:
            assert ours[name] == pytest.approx(vector, abs=TOLERANCE)


def test_nested_prefetches_and_a_formula_give_numpys_scores(filled: Both) -> None:
    """The whole score in one query: both sides score the union of both sides' best."""
    boost, best = 0.7, 12
    points, _ = filled.oracle.scroll(filled.name, limit=NUM_POINTS, with_vectors=True)
    dense, sparse = {}, {}
    weights = dict(zip(sparse_query.indices, sparse_query.values, strict=True))
    for point in points:
        assert isinstance(point.vector, dict)
        if "dense" in point.vector:
            dense[point.id] = float(np.dot(np.asarray(point.vector["dense"], np.float32), dense_query))
        partners = point.vector.get("covisit")
        if isinstance(partners, models.SparseVector) and weights.keys() & set(partners.indices):
            pairs = zip(partners.indices, partners.values, strict=True)
            sparse[point.id] = sum(weights.get(index, 0.0) * value for index, value in pairs)
    union = {id for side in (dense, sparse) for id in sorted(side, key=side.__getitem__)[-best:]}
    expected = {id: dense.get(id, -100.0) + boost * np.log(1 + sparse.get(id, 0.0)) for id in union}

    firsts = [
        models.Prefetch(query=dense_query, using="dense", limit=best),
        models.Prefetch(query=sparse_query, using="covisit", limit=best),
    ]
    answer = filled.endpoint.query_points(
        filled.name,
        prefetch=[
            models.Prefetch(prefetch=firsts, query=dense_query, using="dense", limit=2 * best),
            models.Prefetch(prefetch=firsts, query=sparse_query, using="covisit", limit=2 * best),
        ],
        query=models.FormulaQuery(
            formula=models.SumExpression(
                sum=[
                    "$score[0]",
                    models.MultExpression(
                        mult=[boost, models.LnExpression(ln=models.SumExpression(sum=[1.0, "$score[1]"]))]
                    ),
                ]
            ),
            defaults={"$score[0]": -100.0, "$score[1]": 0.0},
        ),
        limit=len(expected) + 10,
    )
    assert {point.id: point.score for point in answer.points} == pytest.approx(expected, abs=TOLERANCE)
    found = [point.score for point in answer.points]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    "narrowed", [None, models.Filter(must=[models.FieldCondition(key="step", range=models.Range(gte=3))])]
)
def test_prefetches_that_two_sides_share_are_those_that_each_has_for_itself(
    filled: Both, narrowed: models.Filter | None
) -> None:
    """The endpoint runs shared ones once; in another order they are not the same, and are run for each side."""
    firsts = [
        models.Prefetch(query=dense_query, using="dense", limit=12, filter=narrowed),
        models.Prefetch(query=sparse_query, using="covisit", limit=12, filter=narrowed),
    ]

    def ask(
        of_dense: list[models.Prefetch], of_sparse: list[models.Prefetch], limit: int
    ) -> list[tuple[object, float]]:
        answer = filled.endpoint.query_points(
            filled.name,
            prefetch=[
                models.Prefetch(prefetch=of_dense, query=dense_query, using="dense", limit=limit, filter=narrowed),
                models.Prefetch(prefetch=of_sparse, query=sparse_query, using="covisit", limit=limit),
            ],
            query=models.FormulaQuery(
                formula=models.SumExpression(sum=["$score[0]", "$score[1]"]),
                defaults={"$score[0]": -100.0, "$score[1]": 0.0},
            ),
            query_filter=models.Filter(must_not=[models.HasIdCondition(has_id=[1, 2, 3])]),
            limit=30,
        )
        return sorted(((point.id, point.score) for point in answer.points), key=str)

    for limit in (5, 24):
        shared, apart = ask(firsts, firsts, limit), ask(firsts, firsts[::-1], limit)
        assert len(shared) > 4 and [id for id, _ in shared] == [id for id, _ in apart]
        assert [score for _, score in shared] == pytest.approx([score for _, score in apart], abs=TOLERANCE)


# Updates

ids = st.one_of(st.integers(0, 9), st.sampled_from(UUIDS[:2]))
id_lists = st.lists(ids, min_size=1, max_size=5, unique=True)
payloads = st.fixed_dictionaries(
    {}, optional={"step": numbers, "category": st.sampled_from("ab"), "note": st.text(max_size=3)}
)
coordinates = st.integers(-40, 40).map(lambda number: number / 8)
dense_vectors = st.lists(coordinates, min_size=DIM, max_size=DIM)
sparse_vectors = st.dictionaries(st.integers(0, 5), st.integers(1, 9), min_size=1, max_size=3).map(
    lambda parts: models.SparseVector(indices=list(parts), values=[float(value) for value in parts.values()])
)
vectors = st.fixed_dictionaries({}, optional={"dense": dense_vectors, "covisit": sparse_vectors})
points = st.lists(
    st.builds(models.PointStruct, id=ids, vector=vectors, payload=payloads),
    min_size=1,
    max_size=5,
    unique_by=lambda point: point.id,
)
older = st.integers(0, 9).map(
    lambda step: models.Filter(must=[models.FieldCondition(key="step", range=models.Range(lt=step))])
)


def call(method: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(method), st.fixed_dictionaries(arguments))


@st.composite
def batches(draw: st.DrawFn) -> models.Batch:
    chosen = draw(id_lists)
    several = st.lists(dense_vectors, min_size=len(chosen), max_size=len(chosen))
    return models.Batch(
        ids=chosen,
        vectors={"dense": draw(several)},
        payloads=draw(st.lists(payloads, min_size=len(chosen), max_size=len(chosen))),
    )


updates = st.one_of(
    call("upsert", points=points),
    call("upsert", points=batches()),
    call("upsert", points=points, update_filter=older),
    call("upsert", points=points, update_mode=st.sampled_from(["insert_only", "update_only"]).map(models.UpdateMode)),
    call("delete", points_selector=id_lists),
    call("delete", points_selector=older.map(lambda chosen: models.FilterSelector(filter=chosen))),
    call("set_payload", payload=payloads, points=older),
    call("overwrite_payload", payload=payloads, points=older),
    call("delete_payload", keys=st.just(["note", "category"]), points=older),
    call("clear_payload", points_selector=older.map(lambda chosen: models.FilterSelector(filter=chosen))),
    call("delete_vectors", vectors=st.just(["covisit"]), points=older),
)


@pytest.fixture(scope="module")
def changed(qdrant_url: str) -> Iterator[Both]:
    """A collection that every example of updates begins by emptying."""
    with names_of_its_own(qdrant_url) as name:
        both = both_clients(qdrant_url, name)
        yield both
        both.endpoint.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=st.lists(updates, min_size=1, max_size=12))
def test_any_updates_leave_what_local_mode_has(changed: Both, calls: list[tuple[str, dict[str, Any]]]) -> None:
    changed.do("delete", points_selector=models.FilterSelector(filter=models.Filter()), wait=True)
    for method, arguments in calls:
        ours, _ = changed.do(method, **arguments, wait=True)
        assert ours.status == models.UpdateStatus.COMPLETED
    (ours, _), (theirs, _) = changed.do("scroll", limit=100, with_vectors=True)
    mine, others = ({str(point.id): point for point in points} for points in (ours, theirs))
    assert mine.keys() == others.keys()
    for id, other in others.items():
        assert mine[id].payload == other.payload
        assert_same_vectors(mine[id].vector, other.vector)


def test_vectors_of_points_that_are_there_can_be_replaced(alias: str, qdrant_url: str) -> None:
    both = both_clients(qdrant_url, alias)
    random = np.random.default_rng(3)
    both.do("upsert", points=[random_point(random, i) for i in range(20)], wait=True)
    changed = [models.PointVectors(id=UUIDS[0], vector={"dense": [1.0] * DIM}),
               models.PointVectors(id=5 * 10**16, vector={"covisit": sparse_query})]  # fmt: skip
    both.do("update_vectors", points=changed, wait=True)
    (ours, _), (theirs, _) = both.do("scroll", limit=100, with_vectors=True)
    mine = {point.id: point for point in ours}
    for other in theirs:
        assert_same_vectors(mine[other.id].vector, other.vector)
    both.endpoint.close()


@pytest.mark.parametrize("distance", models.Distance)
def test_an_unnamed_vector_is_searched_by_any_distance(alias: str, qdrant_url: str, distance: models.Distance) -> None:
    both = Both(QdrantClient(url=qdrant_url, headers={"accept-encoding": "identity"}), QdrantClient(":memory:"), alias)
    both.do("create_collection", vectors_config=models.VectorParams(size=DIM, distance=distance))
    random = np.random.default_rng(5)
    numbers = random.normal(size=(50, DIM)).astype(np.float32)
    both.do("upsert", points=models.Batch(ids=list(range(50)), vectors=numbers.tolist()), wait=True)
    assert_same(both.do("query_points", query=dense_query, limit=20))
    assert_same(both.do("query_points", query=7, limit=20))
    (ours, _), (theirs, _) = both.do("scroll", limit=50, with_vectors=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.vector == pytest.approx(other.vector, abs=TOLERANCE)
    both.endpoint.close()


def test_uploads_of_many_points_arrive(alias: str, qdrant_url: str) -> None:
    both = both_clients(qdrant_url, alias)
    random = np.random.default_rng(3)
    both.endpoint.upload_points(alias, [random_point(random, i) for i in range(500)], batch_size=64, wait=True)
    assert both.endpoint.count(alias).count == 500
    info = both.endpoint.get_collection(alias)
    assert info.status == models.CollectionStatus.GREEN and info.points_count == 500
    assert info.payload_schema["step"].data_type == models.PayloadSchemaType.INTEGER
    both.endpoint.close()
