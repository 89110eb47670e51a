"""A typed client of the retriever's HTTP interface, for programs of one's own: `StreamtowerClient`, and the same async.

Station: the caller's side of the retriever. It loads httpx and pydantic, and neither torch nor numba; it computes no
score. What goes out and what comes back are the models of `retriever.contract`.

    StreamtowerError
    ├── ServiceProblem       the service answered with a problem document (RFC 9457): its fields are here
    │   └── ServiceNotReady  … with status 429 or 503: come again after `retry_after_seconds`
    └── ServiceAway          nobody answers at the URL, not in time, or it is no Streamtower
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from retriever.contract import (
    BatchAnswer,
    BatchRequest,
    CandidatesAnswer,
    CandidatesRequest,
    HistoryAnswer,
    Problem,
    QueryAnswer,
    QueryRequest,
    SimilarAnswer,
    SimilarRequest,
    VersionAnswer,
)

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_TIMEOUT_SECONDS = 5.0

AnswerT = TypeVar("AnswerT", bound=BaseModel)


class StreamtowerError(Exception):
    """A request that was not answered as it was meant."""


class ServiceAway(StreamtowerError):
    """Nobody answers, or not in time, or not as a Streamtower does."""


class ServiceProblem(StreamtowerError):
    """The service refuses, and says why."""

    def __init__(self, problem: Problem, retry_after_seconds: float | None = None) -> None:
        told = "".join(f"; {error.location}: {error.message}" for error in problem.errors)
        super().__init__(f"{problem.title}: {problem.detail}{told if problem.errors else ''}")
        self.problem = problem
        """The whole document."""
        self.retry_after_seconds = retry_after_seconds
        """When to come again; None where the service does not say."""

    @property
    def kind(self) -> str:
        """The last part of the problem's type, as `invalid-request`."""
        return self.problem.type.rpartition(":")[2]

    @property
    def status(self) -> int:
        """HTTP status."""
        return self.problem.status


class ServiceNotReady(ServiceProblem):
    """The service cannot answer now; the same request may be answered later."""


def _body(request: BaseModel) -> dict[str, Any]:
    """Only what was said: what was not, the service decides."""
    return {
        "content": request.model_dump_json(exclude_unset=True, by_alias=True),
        "headers": {"content-type": "application/json"},
    }


def _read(response: httpx.Response, answer: type[AnswerT]) -> AnswerT:
    """The answer.

    Raises:
        StreamtowerError: see the module's tree.
    """
    try:
        if response.status_code == 200:
            return answer.model_validate_json(response.content, extra="ignore")
        problem = Problem.model_validate_json(response.content, extra="ignore")
    except ValidationError as error:
        reason = f"{response.request.url} answers with {response.status_code} and no Streamtower's document"
        raise ServiceAway(reason) from error
    after = response.headers.get("retry-after", "")
    kind = ServiceNotReady if response.status_code in (429, 503) else ServiceProblem
    raise kind(problem, float(after) if after.isdecimal() else None)


def _away(error: httpx.HTTPError) -> ServiceAway:
    return ServiceAway(f"no retriever answers: {error or type(error).__name__}")


class StreamtowerClient:
    """Asks a retriever; keeps its connections. Usable from many threads. Close it, or use `with`.

    Keyword arguments of `candidates`, `query` and `similar` are the fields of `CandidatesRequest`, `QueryRequest` and
    `SimilarRequest` of `retriever.contract`; a wrong one is a pydantic `ValidationError` before anything is sent.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """
        Args:
            url: of the retriever.
            api_key: one of its keys, where it wants one.
            timeout_seconds: longest wait for each step of a request, > 0.
            transport: httpx's, for tests and proxies of one's own.
        """
        self._http = httpx.Client(**_options(url, api_key, timeout_seconds), transport=transport)

    def candidates(self, user_id: str | None = None, **fields: Any) -> CandidatesAnswer:
        """The best items for a user, for a `history`, or for both."""
        return self._post("/v1/candidates", CandidatesRequest(**_with(user_id, fields)), CandidatesAnswer)

    def batch(self, requests: Sequence[CandidatesRequest | Mapping[str, Any]]) -> list[CandidatesAnswer]:
        """The best items for each of several requests, in their order."""
        return self._post("/v1/candidates:batch", _batch(requests), BatchAnswer).answers

    def similar(self, item_ids: Sequence[str], **fields: Any) -> SimilarAnswer:
        """Items like these."""
        return self._post("/v1/similar", SimilarRequest(item_ids=list(item_ids), **fields), SimilarAnswer)

    def query(self, user_id: str | None = None, **fields: Any) -> QueryAnswer:
        """The request to Qdrant that gives the candidates, to be sent by the caller."""
        return self._post("/v1/query", QueryRequest(**_with(user_id, fields)), QueryAnswer)

    def history(self, user_id: str) -> HistoryAnswer:
        """What the service knows of a user."""
        return self._get(f"/v1/users/{quote(user_id, safe='')}/history", HistoryAnswer)

    def version(self) -> VersionAnswer:
        """The version that is served."""
        return self._get("/v1/version", VersionAnswer)

    def close(self) -> None:
        """Gives the connections back."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _get(self, path: str, answer: type[AnswerT]) -> AnswerT:
        try:
            return _read(self._http.get(path), answer)
        except httpx.HTTPError as error:
            raise _away(error) from error

    def _post(self, path: str, request: BaseModel, answer: type[AnswerT]) -> AnswerT:
        try:
            return _read(self._http.post(path, **_body(request)), answer)
        except httpx.HTTPError as error:
            raise _away(error) from error


class AsyncStreamtowerClient:
    """`StreamtowerClient` for asyncio: the same methods, awaited. Close it, or use `async with`."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As `StreamtowerClient`."""
        self._http = httpx.AsyncClient(**_options(url, api_key, timeout_seconds), transport=transport)

    async def candidates(self, user_id: str | None = None, **fields: Any) -> CandidatesAnswer:
        """The best items for a user, for a `history`, or for both."""
        return await self._post("/v1/candidates", CandidatesRequest(**_with(user_id, fields)), CandidatesAnswer)

    async def batch(self, requests: Sequence[CandidatesRequest | Mapping[str, Any]]) -> list[CandidatesAnswer]:
        """The best items for each of several requests, in their order."""
        return (await self._post("/v1/candidates:batch", _batch(requests), BatchAnswer)).answers

    async def similar(self, item_ids: Sequence[str], **fields: Any) -> SimilarAnswer:
        """Items like these."""
        return await self._post("/v1/similar", SimilarRequest(item_ids=list(item_ids), **fields), SimilarAnswer)

    async def query(self, user_id: str | None = None, **fields: Any) -> QueryAnswer:
        """The request to Qdrant that gives the candidates, to be sent by the caller."""
        return await self._post("/v1/query", QueryRequest(**_with(user_id, fields)), QueryAnswer)

    async def history(self, user_id: str) -> HistoryAnswer:
        """What the service knows of a user."""
        return await self._get(f"/v1/users/{quote(user_id, safe='')}/history", HistoryAnswer)

    async def version(self) -> VersionAnswer:
        """The version that is served."""
        return await self._get("/v1/version", VersionAnswer)

    async def close(self) -> None:
        """Gives the connections back."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()

    async def _get(self, path: str, answer: type[AnswerT]) -> AnswerT:
        try:
            return _read(await self._http.get(path), answer)
        except httpx.HTTPError as error:
            raise _away(error) from error

    async def _post(self, path: str, request: BaseModel, answer: type[AnswerT]) -> AnswerT:
        try:
            return _read(await self._http.post(path, **_body(request)), answer)
        except httpx.HTTPError as error:
            raise _away(error) from error


def _options(url: str, api_key: str | None, timeout_seconds: float) -> dict[str, Any]:
    """Of an httpx client. Answers are asked for as they are: compressing them costs more than it saves."""
    headers = {"accept-encoding": "identity"}
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key}"
    return {"base_url": url.rstrip("/"), "headers": headers, "timeout": timeout_seconds, "trust_env": False}


def _with(user_id: str | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    return dict(fields) if user_id is None else {"user_id": user_id, **fields}


def _batch(requests: Sequence[CandidatesRequest | Mapping[str, Any]]) -> BatchRequest:
    made = [one if isinstance(one, CandidatesRequest) else CandidatesRequest(**one) for one in requests]
    return BatchRequest(requests=made)
