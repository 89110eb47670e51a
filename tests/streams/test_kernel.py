"""Kernels are compiled wherever the code lies, and cached where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from streams import history
from streams.kernel import kernel


def test_a_kernel_without_a_place_for_its_cache_is_compiled_all_the_same() -> None:
    """As in a container that lets nothing be written: numba finds no place for code that has no file, either."""
    names: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", names)
    twice: Callable[[int], int] = kernel(names["twice"])
    assert twice(21) == 42
    assert twice.signatures, "it was compiled, not merely called"  # type: ignore[attr-defined]


def test_kernels_of_this_package_are_cached() -> None:
    assert history._join._cache.cache_path  # type: ignore[attr-defined]
