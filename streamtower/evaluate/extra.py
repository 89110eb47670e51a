"""What the extra `evaluate` brings, and what is said where it is missing.

Station: asked before an evaluation starts, so that nobody waits for a run that cannot end. It loads nothing.
"""

from __future__ import annotations

import importlib.util


class MissingExtraError(RuntimeError):
    """A library of the extra is missing: says what it is for and how to get it."""


def require(what: str, library: str) -> None:
    """
    Args:
        what: needs the library.
        library: its import name.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(f"{what} needs {library}: pip install 'streamtower[evaluate]'")
