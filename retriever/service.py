"""The HTTP interface: routes, probes, metrics, and how errors are told.

Station: the outermost; callers come in here. Everything it does itself is HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.responses import Response

from retriever.contract import (
    PROBLEM_JSON,
    BatchAnswer,
    BatchRequest,
    CandidatesAnswer,
    CandidatesRequest,
    HistoryAnswer,
    Id,
    InvalidValue,
    Problem,
    QueryAnswer,
    QueryRequest,
    SimilarAnswer,
    SimilarRequest,
    StatusAnswer,
    VersionAnswer,
)
from retriever.gate import CHARGE, GUARDED, Gate
from retriever.keys import Keys, Rates
from retriever.metrics import Metrics
from retriever.problems import KINDS, ProblemError, invalid_request, problem_response
from retriever.retrieve import ItemsUnknown, NotReady, Retriever
from retriever.search import FilterRefused, SearchError
from retriever.settings import RetrieverSettings

log = structlog.get_logger(__name__)

_JSON = "application/json"
_BODY = (400, 408, 413)
"""Statuses that only a request with a body can have."""
_CALLER = (401, 429)
"""Statuses of a caller who may not come in, or not now."""
_KEY_SCHEME = "key"


def create_app(
    settings: RetrieverSettings, retriever: Retriever, metrics: Metrics, not_ready: Callable[[], str | None]
) -> FastAPI:
    """The ASGI application. `not_ready` says why the service is not ready, None where it is.

    Raises:
        KeyFileError: the file of keys cannot be used.
    """
    register_url_convertor("id", _IdConvertor())
    keys = Keys(settings.api_keys, settings.api_keys_file, metrics)
    app = FastAPI(
        title="Streamtower retriever",
        version="1",
        description="Candidates for a user, from a two-tower model that learns from live clicks.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # served below, as finished bytes
    )
    app.add_middleware(
        Gate,
        metrics=metrics,
        keys=keys,
        rates=Rates(settings.rate_limit_per_second, settings.rate_limit_burst),
        max_body_bytes=settings.max_body_bytes,
        body_timeout_seconds=settings.body_timeout_seconds,
        max_in_flight=settings.max_in_flight,
    )
    _add_error_handlers(app)

    @app.post("/v1/candidates", response_model=CandidatesAnswer, responses=_problems(*_BODY, *_CALLER, 422, 503))
    async def candidates(request: CandidatesRequest) -> Response:
        """The best items for a user, by id, by history, or both."""
        answer = await retriever.candidates(request)
        return Response(answer.model_dump_json(exclude=_hidden(request)), media_type=_JSON)

    @app.post("/v1/candidates:batch", response_model=BatchAnswer, responses=_problems(*_BODY, *_CALLER, 422, 503))
    async def batch(request: BatchRequest, http: Request) -> Response:
        """The best items for several users, by one query to Qdrant. To the rate limit it is as many requests as it
        holds: it is let in as one, and then the next call waits until all of them are paid for."""
        getattr(http.state, CHARGE)(len(request.requests) - 1)
        answers = await retriever.batch(request.requests)
        told = (one.model_dump_json(exclude=_hidden(of)) for of, one in zip(request.requests, answers, strict=True))
        return Response(f'{{"answers":[{",".join(told)}]}}', media_type=_JSON)

    @app.post("/v1/query", response_model=QueryAnswer, responses=_problems(*_BODY, *_CALLER, 422, 503))
    async def query(request: QueryRequest) -> QueryAnswer:
        """What /v1/candidates would send to Qdrant, ready to be sent by the caller."""
        return await retriever.ready_query(request)

    @app.post("/v1/similar", response_model=SimilarAnswer, responses=_problems(*_BODY, *_CALLER, 404, 422, 503))
    async def similar(request: SimilarRequest) -> Response:
        """The items most like one, or like several together."""
        answer = await retriever.similar(request)
        return Response(answer.model_dump_json(exclude=_hidden(request)), media_type=_JSON)

    @app.get("/v1/version", response_model=VersionAnswer, responses=_problems(*_CALLER, 503))
    async def version() -> VersionAnswer:
        """The version that is served now."""
        return retriever.version()

    @app.get(
        "/v1/users/{user_id:id}/history",
        response_model=HistoryAnswer,
        responses=_problems(*_CALLER, 422, 503),
    )
    async def history(user_id: Id) -> HistoryAnswer:
        """The items that a user clicked last, as followed from the stream."""
        return await retriever.history(user_id)

    @app.get("/healthz", response_model=StatusAnswer)
    async def alive() -> StatusAnswer:
        """Whether the process answers at all."""
        return StatusAnswer(status="alive")

    @app.get("/readyz", response_model=StatusAnswer, responses=_problems(503))
    async def ready() -> StatusAnswer:
        """Whether candidates can be had: a version is served and Qdrant answers."""
        if (reason := not_ready()) is not None:
            raise ProblemError("not-ready", reason)
        return StatusAnswer(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """What Prometheus scrapes."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/openapi.json", response_class=Response, responses={200: {"content": {_JSON: {}}}})
    async def openapi() -> Response:
        """This document."""
        return Response(document, media_type=_JSON)

    document = json.dumps(_openapi(app, with_keys=keys.are_wanted)).encode()
    return app


class _IdConvertor(StringConvertor):
    """Any text in a path: ids may have slashes and line breaks."""

    regex = r"[\s\S]*"


def _add_error_handlers(app: FastAPI) -> None:
    def answer_with(make: Callable[[Any], ProblemError]) -> Callable[[Request, Any], Any]:
        async def handle(_: Request, error: Any) -> Response:
            return problem_response(make(error), getattr(error, "headers", None))

        return handle

    def of_search(error: SearchError) -> ProblemError:
        return ProblemError("index-unavailable", str(error))

    def of_refusal(error: FilterRefused) -> ProblemError:
        return ProblemError("filter-refused", str(error))

    def of_items(error: ItemsUnknown) -> ProblemError:
        places = [InvalidValue(location=f"body.item_ids.{place}", message="unknown") for place in error.places]
        return ProblemError("unknown-items", str(error), places)

    def of_http(error: HTTPException) -> ProblemError:
        slug = next((slug for slug, (status, _) in KINDS.items() if status == error.status_code), "bug")
        return ProblemError(slug, error.detail)

    app.add_exception_handler(ProblemError, answer_with(lambda error: error))
    app.add_exception_handler(
        RequestValidationError, answer_with(lambda error: invalid_request(error.errors(), error.body))
    )
    app.add_exception_handler(HTTPException, answer_with(of_http))
    app.add_exception_handler(ItemsUnknown, answer_with(of_items))
    app.add_exception_handler(NotReady, answer_with(lambda error: ProblemError("not-ready", str(error))))
    app.add_exception_handler(FilterRefused, answer_with(of_refusal))
    app.add_exception_handler(SearchError, answer_with(of_search))
    app.add_exception_handler(
        Exception, answer_with(lambda error: ProblemError("bug", "the service has logged what happened"))
    )


def _hidden(request: CandidatesRequest | SimilarRequest) -> dict[str, Any]:
    """The fields of each candidate that were not asked for."""
    asked = {"payload": request.with_payload, "explanation": isinstance(request, CandidatesRequest) and request.explain}
    return {"candidates": {"__all__": {name for name, is_wanted in asked.items() if not is_wanted}}}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What an error of each status looks like, for the OpenAPI document."""
    told = {status: [title for of, title in KINDS.values() if of == status] for status in statuses}
    return {status: {"model": Problem, "description": ", or: ".join(titles)} for status, titles in told.items()}


def _openapi(app: FastAPI, *, with_keys: bool) -> dict[str, Any]:
    """The OpenAPI document: errors under their own media type, and the key where one is wanted."""
    document = app.openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status >= "400":
                    response["content"] = {PROBLEM_JSON: response["content"].pop(_JSON)}
            if with_keys and path.startswith(GUARDED):
                operation["security"] = [{_KEY_SCHEME: []}]
    if with_keys:
        document["components"]["securitySchemes"] = {_KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
    return document
