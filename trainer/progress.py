"""CORE: how far the trainer is, as plain data.

Station: changed by the loop; saved in checkpoints with the model, and read by all that tell of it or decide by it.
"""

from __future__ import annotations

import msgspec

FIRST_LOSSES = 100


class Positions(msgspec.Struct):
    """Where to go on reading."""

    micro_batches: dict[int, int] = {}
    """Partition of `micro-batches` → next offset to read."""
    items: dict[int, int] = {}
    """Partition of `items` → next offset to read."""
    topic_ids: dict[str, str] = {}
    """Topic → the id that the broker gave it when it was made, where brokers do."""


class Progress(msgspec.Struct):
    """How far the trainer is: all that a checkpoint holds besides model and catalogue."""

    step: int = 0
    """Rising count of changes: one for each learnt micro-batch and each taken batch of item events."""
    learnt: dict[int, int] = {}
    """Partition of `clicks` → next source offset to learn."""
    positions: Positions = msgspec.field(default_factory=Positions)
    clicks_learnt: int = 0
    micro_batches: int = 0
    first_losses: list[float] = []
    """Mean losses of the first micro-batches, up to `FIRST_LOSSES`."""
    model_version: int = 0
    """Newest model version that was begun: the next one is above."""

    def note(self, num_clicks: int, loss: float) -> None:
        """A micro-batch of so many clicks was learnt, with this mean loss."""
        self.clicks_learnt += num_clicks
        self.micro_batches += 1
        if len(self.first_losses) < FIRST_LOSSES:
            self.first_losses.append(loss)
