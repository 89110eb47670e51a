"""Errors of the HTTP interface as RFC 9457 problem details: one kind of error, one slug, one status.

Station: between anything that can go wrong in a request and the caller. No foreign exception's text leaves the service
but Qdrant's own words about a caller's filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from retriever.contract import PROBLEM_JSON, InvalidValue, Problem

KINDS: dict[str, tuple[int, str]] = {
    "malformed-body": (400, "The body is not JSON"),
    "unauthorized": (401, "No valid API key"),
    "not-found": (404, "No such resource"),
    "unknown-items": (404, "The live index does not hold these items"),
    "method-not-allowed": (405, "Method not allowed"),
    "body-timeout": (408, "The body came too slowly"),
    "body-too-large": (413, "The body is too large"),
    "invalid-request": (422, "The request breaks the contract"),
    "filter-refused": (422, "Qdrant refuses the filter"),
    "too-many-requests": (429, "Too many requests of this caller"),
    "bug": (500, "A fault of the service"),
    "overloaded": (503, "Too many requests at once"),
    "not-ready": (503, "Nothing can be served yet"),
    "index-unavailable": (503, "Qdrant does not answer"),
}
"""Slug → status and title."""

RETRY_AFTER_SECONDS = 1
_MAX_ERRORS = 20
_MAX_MESSAGE = 500


class ProblemError(Exception):
    """A request that is answered with a problem."""

    def __init__(
        self,
        slug: str,
        detail: str,
        errors: Sequence[InvalidValue] = (),
        retry_after_seconds: int = RETRY_AFTER_SECONDS,
    ) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds
        self.slug = slug
        self.detail = detail
        self.errors = list(errors)


def problem_response(error: ProblemError, headers: Mapping[str, str] | None = None) -> Response:
    """The error as a response; 401, 429 and 503 say how to go on."""
    status, title = KINDS[error.slug]
    problem = Problem(
        type=f"urn:streamtower:problem:{error.slug}",
        title=title,
        status=status,
        detail=error.detail,
        errors=error.errors,
    )
    extra = dict(headers or {})
    if status in (429, 503):
        extra["retry-after"] = str(error.retry_after_seconds)
    elif status == 401:
        extra["www-authenticate"] = "Bearer"
    return Response(problem.model_dump_json(), status, extra, PROBLEM_JSON)


def invalid_request(errors: Sequence[Mapping[str, Any]], body: object) -> ProblemError:
    """What pydantic found wrong with a request, told so that a caller can mend it.

    Args:
        errors: pydantic's own, each with the path `loc`: body, path or header, then the way into it.
        body: the request's JSON.
    """
    if any(error["type"] == "json_invalid" for error in errors):
        position, reason = errors[0]["loc"][-1], errors[0].get("ctx", {}).get("error", "")
        return ProblemError("malformed-body", f"expected JSON, but at character {position}: {reason}")
    told = [
        InvalidValue(location=".".join(map(str, location)), message=_message(error))
        for error, location in _clearest(errors, body)
    ]
    told = list({(value.location, value.message): value for value in told}.values())[:_MAX_ERRORS]
    return ProblemError("invalid-request", "; ".join(f"{value.location}: {value.message}" for value in told[:3]), told)


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "model_attributes_type" and isinstance(error.get("input"), bytes):
        return "must be a JSON object, sent as content-type application/json"
    return str(error["msg"]).removeprefix("Value error, ")[:_MAX_MESSAGE]


_Location = tuple[str | int, ...]
_Placed = tuple[Mapping[str, Any], _Location]


def _clearest(errors: Sequence[Mapping[str, Any]], body: object) -> list[_Placed]:
    """The errors worth telling, each with its place.

    Qdrant's filter is a tree of unions, and pydantic reports every alternative, meant or not. The one that was meant
    got furthest into the JSON, with the fewest complaints: for each field only that one's errors are kept.
    """
    fields: dict[_Location, dict[_Location, list[_Placed]]] = {}
    for error in errors:
        location, alternative = _split(error, body)
        fields.setdefault(location[:2], {}).setdefault(alternative, []).append((error, location))

    def rank(found: list[_Placed]) -> tuple[int, int]:
        return -max(len(location) for _, location in found), len(found)

    return [error for alternatives in fields.values() for error in min(alternatives.values(), key=rank)]


def _split(error: Mapping[str, Any], body: object) -> tuple[_Location, _Location]:
    """An error's path as its place in the caller's JSON, and the names of the union's types on the way."""
    root, *path = error["loc"]
    if root != "body":
        return (root, *path), ()
    location: list[str | int] = [root]
    alternative: list[str | int] = []
    value = body
    for position, part in enumerate(path):
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if inside:
            value = value[part]  # type: ignore[index]
            location.append(part)
        elif error["type"] == "missing" and position == len(path) - 1:
            location.append(part)
        else:
            alternative.append(part)
    return tuple(location), tuple(alternative)
