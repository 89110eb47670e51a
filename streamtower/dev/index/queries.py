"""Search requests → those of the engine: nearest, by example, nested prefetches, fusion and formulas.

Station: between `schema` and the engine's `query`. Ids in a query become the vectors of those points, which are then
left out of the result, as on a server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import qdrant_edge as edge

from streamtower.dev.index import schema
from streamtower.dev.index.errors import format_error, invalid, not_found, refused, wrong_input
from streamtower.dev.index.filters import both, condition_of, filter_of, point_id, with_ids, without_ids
from streamtower.dev.index.storage import Collection

_UNARY: dict[str, Callable[[Any], edge.Expression]] = {
    "neg": edge.Expression.Neg,
    "abs": edge.Expression.Abs,
    "sqrt": edge.Expression.Sqrt,
    "exp": edge.Expression.Exp,
    "log10": edge.Expression.Log10,
    "ln": edge.Expression.Ln,
    "acosh": edge.Expression.Acosh,
    "datetime": edge.Expression.Datetime,
    "datetime_key": edge.Expression.DatetimeKey,
}
_N_ARY: dict[str, Callable[[list[edge.Expression]], edge.Expression]] = {
    "sum": edge.Expression.Sum,
    "mult": edge.Expression.Mult,
    "max": edge.Expression.Max,
    "min": edge.Expression.Min,
}
_DECAYS = {
    "exp_decay": edge.DecayKind.Exp,
    "gauss_decay": edge.DecayKind.Gauss,
    "lin_decay": edge.DecayKind.Lin,
}
_FUSIONS = {"rrf": lambda: edge.Fusion.Rrf(2), "dbsf": edge.Fusion.Dbsf}
_UNSUPPORTED = ("discover", "context", "relevance_feedback", "mmr", "text")


def query_request(source: schema.Query, collection: Collection) -> edge.QueryRequest:
    """The engine's request.

    Raises:
        ApiError: 400, 404 or 422.
        ValueError: the engine does not accept a key, a time or a formula.
    """
    limit = schema.limit_of(source.limit)
    scoring, ids = _scoring(source, collection)
    return edge.QueryRequest(
        limit=limit,
        offset=source.offset,
        query=scoring,
        prefetches=_prefetches(source, collection),
        filter=without_ids(filter_of(source.filter), ids),
        score_threshold=source.score_threshold,
        with_payload=payload_selector(source.with_payload),
        with_vector=source.with_vector,
    )


def has_formula(source: schema.Prefetch) -> bool:
    """Whether some part of the query is a formula."""
    return (isinstance(source.query, dict) and "formula" in source.query) or any(
        has_formula(prefetch) for prefetch in _list(source.prefetch)
    )


def payload_selector(source: schema.WithPayload) -> Any:
    """Which part of the payload to answer with."""
    if not isinstance(source, schema.PayloadSelector):
        return source
    if source.include is not None:
        return edge.PayloadSelector.Include(source.include)
    return edge.PayloadSelector.Exclude(source.exclude or [])


def order_by(source: schema.OrderBy | str) -> edge.OrderBy:
    """The engine's order by a payload field."""
    if isinstance(source, str):
        return edge.OrderBy(source)
    direction = source.direction and (edge.Direction.Desc if source.direction == "desc" else edge.Direction.Asc)
    return edge.OrderBy(source.key, direction, source.start_from)


def sparse_vector(source: schema.SparseVector, place: str) -> edge.SparseVector:
    """The engine's vector. The checks come first: the engine itself ends in a panic, at every later start too.

    Raises:
        ApiError: 422: indices twice, or not as many as values.
    """
    if len(source.indices) != len(source.values):
        raise invalid(f"{place}.values: Validation error: must be the same length as indices [{{}}]")
    if len(set(source.indices)) != len(source.indices):
        raise invalid(f"{place}.indices: Validation error: must be unique [{{}}]")
    try:
        return edge.SparseVector(source.indices, source.values)
    except OverflowError:
        raise format_error(f"{place}.indices: invalid value, expected u32") from None


def _list(prefetch: list[schema.Prefetch] | schema.Prefetch | None) -> list[schema.Prefetch]:
    if prefetch is None:
        return []
    return prefetch if isinstance(prefetch, list) else [prefetch]


def _prefetches(
    source: schema.Prefetch, collection: Collection, above: edge.Filter | None = None
) -> list[edge.Prefetch]:
    """The engine's prefetches of a query, or of a prefetch; `above`: the filters of what these are within.

    The engine applies a query's filter to all its prefetches, too.
    """
    siblings = _list(source.prefetch)
    above = both(above, filter_of(source.filter))
    found = _found_once(siblings, collection, above)
    prefetches = []
    for prefetch in siblings:
        limit = schema.limit_of(prefetch.limit)
        scoring, ids = _scoring(prefetch, collection)
        narrowed = without_ids(filter_of(prefetch.filter), ids)
        prefetches.append(
            edge.Prefetch(
                limit=limit,
                query=scoring,
                prefetches=_prefetches(prefetch, collection, above) if found is None else [],
                filter=narrowed if found is None else with_ids(narrowed, found),
                score_threshold=prefetch.score_threshold,
            )
        )
    return prefetches


def _found_once(
    siblings: list[schema.Prefetch], collection: Collection, above: edge.Filter | None
) -> set[int | str | UUID] | None:
    """What the prefetches within all of the siblings find, where they are the same ones; else None.

    To score what nested prefetches have found by a vector is to search by it among those points alone. So they need
    not be run once for each sibling, as the engine does; the answer is the same.
    """
    nested = _list(siblings[0].prefetch) if len(siblings) > 1 else []
    if not nested or any(prefetch.query is None for prefetch in nested):
        return None
    alike = ((_list(one.prefetch), one.filter) == (nested, siblings[0].filter) for one in siblings)
    if not all(alike) or not all(_is_nearest(one.query) for one in siblings):
        return None
    above = both(above, filter_of(siblings[0].filter))
    ids: set[int | str | UUID] = set()
    for prefetch in nested:
        scoring, own = _scoring(prefetch, collection)
        request = edge.QueryRequest(
            limit=schema.limit_of(prefetch.limit),
            query=scoring,
            prefetches=_prefetches(prefetch, collection, above),
            filter=both(above, without_ids(filter_of(prefetch.filter), own)),
            score_threshold=prefetch.score_threshold,
        )
        ids.update(point.id for point in collection.shard.query(request))
    return ids


def _is_nearest(query: Any) -> bool:
    return isinstance(query, list) or (isinstance(query, dict) and ("nearest" in query or "indices" in query))


def _scoring(source: schema.Prefetch, collection: Collection) -> tuple[Any, list[int | str]]:
    """The engine's scoring query, and the ids of points that it was made of."""
    query, using = source.query, source.using or ""
    if source.lookup_from is not None:
        raise refused("lookup_from")
    if query is None:
        return None, []
    if not isinstance(query, dict) or "indices" in query:
        query = {"nearest": query}
    for feature in _UNSUPPORTED:
        if query.get(feature) is not None:
            raise refused(f"a {feature} query")
    ids: list[int | str] = []
    if "nearest" in query:
        return edge.Query.Nearest(_vector(query["nearest"], using, collection, ids), using), ids
    if "recommend" in query:
        return _recommend(query["recommend"], using, collection, ids), ids
    if "order_by" in query:
        key = query["order_by"]
        return order_by(key if isinstance(key, str) else schema.convert(key, schema.OrderBy)), ids
    if query.get("fusion") in _FUSIONS:
        return _FUSIONS[query["fusion"]](), ids
    if isinstance(rrf := query.get("rrf"), dict):
        return edge.Fusion.Rrf(rrf.get("k") or 2, rrf.get("weights")), ids
    if "formula" in query:
        defaults = schema.convert(query.get("defaults") or {}, dict[str, Any])
        return edge.Formula(expression(query["formula"]), defaults), ids
    if query.get("sample") == "random":
        return edge.Sample.Random, ids
    raise format_error("data did not match any variant of untagged enum QueryInterface")


def _vector(source: Any, using: str, collection: Collection, ids: list[int | str]) -> Any:
    """The vector that `source` is, or that the point of this id has; such an id is added to `ids`."""
    if isinstance(source, list):
        if source and isinstance(source[0], list):
            raise refused("multivectors")
        vector = schema.convert(source, list[float])
        size = collection.vector_sizes.get(using, len(vector))  # the engine refuses other names by itself
        if len(vector) != size:
            raise wrong_input(f"Vector dimension error: expected dim: {size}, got {len(vector)}")
        return vector
    if isinstance(source, dict):
        if "indices" not in source:
            raise refused("inference of vectors from texts or images")
        return sparse_vector(schema.convert(source, schema.SparseVector), "query")
    if isinstance(source, bool) or not isinstance(source, int | str):
        raise format_error("data did not match any variant of untagged enum VectorInput")
    id = point_id(schema.convert(source, schema.PointId))  # type: ignore[arg-type]
    if using not in collection.vector_sizes and using not in collection.sparse_vectors:
        raise wrong_input(f"Not existing vector name error: {using}")
    points = collection.shard.retrieve([id], False, [using])
    if not points:
        raise not_found(f"No point with id {id} found")
    found: Any = points[0].vector
    if isinstance(found, dict):
        found = found.get(using)
    if found is None:
        raise wrong_input(f"Point {id} has no vector with name {using}")
    ids.append(id)
    return found


def _recommend(source: Any, using: str, collection: Collection, ids: list[int | str]) -> edge.Query:
    if not isinstance(source, dict):
        raise format_error("data did not match any variant of untagged enum QueryInterface")
    positives = [_vector(one, using, collection, ids) for one in source.get("positive") or []]
    negatives = [_vector(one, using, collection, ids) for one in source.get("negative") or []]
    strategy = source.get("strategy") or "average_vector"
    if strategy == "best_score":
        return edge.Query.RecommendBestScore(edge.RecommendQuery(positives, negatives), using)
    if strategy == "sum_scores":
        return edge.Query.RecommendSumScores(edge.RecommendQuery(positives, negatives), using)
    if strategy != "average_vector":
        raise format_error(
            f"unknown variant `{strategy}`, expected one of `average_vector`, `best_score`, `sum_scores`"
        )
    if not positives:
        raise wrong_input("At least one positive vector ID required")
    if not all(isinstance(vector, list) for vector in positives + negatives):
        raise refused("recommendation by the average of sparse vectors")
    target = _mean(positives)
    if negatives:
        target = [2 * good - bad for good, bad in zip(target, _mean(negatives), strict=True)]
    return edge.Query.Nearest(target, using)


def _mean(vectors: list[list[float]]) -> list[float]:
    return [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]


def expression(source: Any) -> edge.Expression:
    """A formula, or a part of it.

    Raises:
        ApiError: 400.
        ValueError: the engine does not accept a key or a time in it.
    """
    if isinstance(source, bool):
        raise _no_expression()
    if isinstance(source, int | float):
        return edge.Expression.Constant(float(source))
    if isinstance(source, str):
        return edge.Expression.Variable(source)
    if not isinstance(source, dict):
        raise _no_expression()
    name, argument = next(iter(source.items()), ("", None))
    if len(source) == 1 and name in _N_ARY:
        if not isinstance(argument, list):
            raise _no_expression()
        return _N_ARY[name]([expression(one) for one in argument])
    if len(source) == 1 and name in _UNARY:
        if name.startswith("datetime"):
            return _UNARY[name](schema.convert(argument, str))
        return _UNARY[name](expression(argument))
    if len(source) == 1 and isinstance(argument, dict):
        if name == "div":
            return edge.Expression.Div(
                expression(argument.get("left")), expression(argument.get("right")), argument.get("by_zero_default")
            )
        if name == "pow":
            return edge.Expression.Pow(expression(argument.get("base")), expression(argument.get("exponent")))
        if name == "geo_distance":
            origin = schema.convert(argument.get("origin"), schema.GeoPoint)
            return edge.Expression.GeoDistance(
                edge.GeoPoint(origin.lon, origin.lat), schema.convert(argument.get("to"), str)
            )
        if name in _DECAYS:
            target = argument.get("target")
            return edge.Expression.Decay(
                _DECAYS[name],
                expression(argument.get("x")),
                None if target is None else expression(target),
                argument.get("midpoint"),
                argument.get("scale"),
            )
    return edge.Expression.Condition(condition_of(schema.convert(source, schema.Condition)))


def _no_expression() -> Exception:
    return format_error("data did not match any variant of untagged enum Expression")
