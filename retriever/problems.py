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
    "method-not-allowed": (405, "Method not allowed"),
    "body-timeout": (408, "The body came too slowly"),
    "body-too-large": (413, "The body is too large"),
    "invalid-request": (422, "The request breaks the contract"),
    "filter-refused": (422, "Qdrant refuses the filter"),
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

    def __init__(self, slug: str, detail: str, errors: Sequence[InvalidValue] = ()) -> None:
        super().__init__(detail)
        self.slug = slug
        self.detail = detail
        self.errors = list(errors)


def problem_response(error: ProblemError, headers: Mapping[str, str] | None = None) -> Response:
    """The error as a response; 401 and 503 say how to go on."""
    status, title = KINDS[error.slug]
    problem = Problem(
        type=f"urn:streamtower:problem:{error.slug}",
        title=title,
        status=status,
        detail=error.detail,
        errors=error.errors,
    )
    extra = dict(headers or {})
    if status == 503:
        extra["retry-after"] = str(RETRY_AFTER_SECONDS)
    elif status == 401:
        extra["www-authenticate"] = "Bearer"
    return Response(problem.model_dump_json(), status, extra, PROBLEM_JSON)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ProblemError:
    """What pydantic found wrong with a request, told so that a caller can mend it."""
    if any(error["type"] == "json_invalid" for error in errors):
        position, reason = errors[0]["loc"][-1], errors[0].get("ctx", {}).get("error", "")
        return ProblemError("malformed-body", f"expected JSON, but at character {position}: {reason}")
    told = [InvalidValue(location=_location(error["loc"]), message=_message(error)) for error in _clearest(errors)]
    told = list({(value.location, value.message): value for value in told}.values())[:_MAX_ERRORS]
    return ProblemError("invalid-request", "; ".join(f"{value.location}: {value.message}" for value in told[:3]), told)


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "model_attributes_type" and isinstance(error.get("input"), bytes):
        return "must be a JSON object, sent as content-type application/json"
    return str(error["msg"]).removeprefix("Value error, ")[:_MAX_MESSAGE]


def _location(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path if not _is_alternative(part))


def _is_alternative(part: str | int) -> bool:
    """Whether a part of an error's path names one type of a union, not a place in the caller's JSON."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part)


def _clearest(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Qdrant's filter is a tree of unions, and pydantic reports every alternative that the caller did not mean.

    The one that was meant got furthest into the JSON with the fewest complaints: of each field of the request's body
    only that one's errors are kept.
    """
    by_field: dict[tuple[str | int, ...], dict[tuple[str, ...], list[Mapping[str, Any]]]] = {}
    for error in errors:
        path = error["loc"]
        alternative = tuple(str(part) for part in path if _is_alternative(part))
        by_field.setdefault(tuple(path[:2]), {}).setdefault(alternative, []).append(error)
    clearest = []
    for alternatives in by_field.values():
        meant = min(alternatives.items(), key=lambda found: (-len(found[0]), len(found[1])))
        clearest += meant[1]
    return clearest
