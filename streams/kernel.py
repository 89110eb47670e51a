"""PUBLIC: compiles the loops that walk clicks one after the other.

Station: none; it is how `frequency`, `history`, the trainer's `covisit_kernels` and others stay fast, whatever they
compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numba

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def kernel(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function` compiled by numba at its first call, and cached on disk where the disk lets it.

    numba refuses to decorate at all where it finds no directory that it may write to (a read-only container): then the
    kernel is compiled anew in every process, which costs a second or two at start and nothing else.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]
