"""A strict reading of JSON (RFC 8259, UTF-8 without a mark), by the standard library alone; and of ids."""

from __future__ import annotations

import json
from typing import Any

MAX_ID_BYTES = 512


class Refused(Exception):
    """The input must not be accepted."""


class Undecided(Exception):
    """Nested so deep that how far a reader goes is its own affair: it may accept or refuse, but not fail."""


def read(data: bytes) -> Any:
    """The value; of a name that comes twice, the last one counts.

    Raises:
        Refused: not one JSON text, or with half a surrogate pair in it.
        Undecided: nested too deep to say.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_refuse, parse_int=_integer)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Undecided from None
    except ValueError as error:
        raise Refused from error
    return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= 4300 else float(digits)


def is_number(value: object) -> bool:
    """A number that a double can tell from infinity; no boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or abs(value) != float("inf")


def id_of(value: object) -> str:
    """An id as text."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Refused("an id is a string or an integer")
    text = str(value)
    if not 0 < len(text.encode()) <= MAX_ID_BYTES:
        raise Refused("an id has 1 to 512 bytes")
    return text


def typed(value: object) -> object:
    """The same value in a form that tells 1 from 1.0 and from true, for comparisons."""
    if isinstance(value, dict):
        return {name: typed(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [typed(inner) for inner in value]
    return type(value).__name__, repr(value)
