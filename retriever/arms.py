"""Which version answers whom, where two are served: the live one, and another beside it for comparison.

Station: between `retrieve` and `versions`. It decides by a hash of the user's id alone, so that a user stays with an
arm through restarts, publishes, and on every replica.
"""

from __future__ import annotations

from typing import Literal

import xxhash

Arm = Literal["live", "second"]
_SEED = 0x41524D53
"""Of the hash that chooses; any other than that of ids, so that arms have nothing to do with rows and partitions."""


class Arms:
    """The shares of users."""

    def __init__(self, second_share: float = 0.0, shadow_ratio: float = 0.0) -> None:
        """
        Args:
            second_share: of the users who are answered by the second version, 0 … 1.
            shadow_ratio: of the other users whose requests it gets too, 0 … 1.
        """
        self._second_share = second_share
        self._shadow_until = second_share + (1 - second_share) * shadow_ratio

    def arm_of(self, user_hash: int | None) -> Arm:
        """Who answers; nobody in particular is answered by the live version."""
        return "second" if user_hash is not None and place_of(user_hash) < self._second_share else "live"

    def is_shadowed(self, user_hash: int | None) -> bool:
        """Whether the second version gets a request that the live one answers."""
        if user_hash is None:
            return False
        return self._second_share <= place_of(user_hash) < self._shadow_until


def place_of(user_hash: int) -> float:
    """Where a user stands between 0 and 1, uniform over users."""
    return xxhash.xxh64_intdigest(user_hash.to_bytes(8, "little"), seed=_SEED) / 2**64
