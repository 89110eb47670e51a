"""Why a request is refused, with the status and the kind of message that a Qdrant server gives.

Station: raised anywhere below `app`, which makes the answer of it. The engine says its errors as plain exceptions with
a text; `from_engine` sorts them.
"""

from __future__ import annotations

import re


class ApiError(Exception):
    """A request that is refused: the HTTP status, and the words for the body's `status.error`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class StorageError(Exception):
    """The directory cannot be used: says what is wrong with it and what to do."""


def wrong_input(message: str) -> ApiError:
    return ApiError(400, f"Wrong input: {message}")


def format_error(message: str) -> ApiError:
    return ApiError(400, f"Format error in JSON body: {message}")


def invalid(message: str) -> ApiError:
    """Well-formed, but outside the allowed values."""
    return ApiError(422, f"Validation error in JSON body: [{message}]")


def not_found(message: str) -> ApiError:
    return ApiError(404, f"Not found: {message}")


def refused(feature: str) -> ApiError:
    """What a Qdrant server does and this endpoint does not."""
    return ApiError(400, f"Bad request: {feature}: the local endpoint does not do this; use a Qdrant server for it")


def is_panic(error: BaseException) -> bool:
    """Whether the engine broke down; to Python its panics are no Exception."""
    return type(error).__module__ == "pyo3_runtime"


def from_engine(error: Exception, *, formula: bool = False) -> ApiError:
    """The engine's exception as an answer.

    Args:
        error: what an engine call raised.
        formula: whether the request holds a formula. One that cannot be computed for a candidate (a payload field that
            is missing, a logarithm of 0) is said by the engine to be cancelled, without the reason.
    """
    text = str(error)
    if missing := re.match(r"No point with id (\S+)", text):
        return not_found(f"No point with id {missing[1]} found")
    if "cancelled" in text and formula:
        return wrong_input(
            "the formula has no finite value for some candidate: a field that is neither in its payload nor in the "
            "formula's defaults, or is no number, or a logarithm, root or division outside its range"
        )
    if text.startswith("Service ") or "cancelled" in text:
        return ApiError(500, f"Service internal error: {text}")
    return wrong_input(text)
