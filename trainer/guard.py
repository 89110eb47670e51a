"""Whether what is learnt may go out: saved as a checkpoint and published.

Station: inside the loop, after each micro-batch and before anything is saved or published. It sees numbers alone and
changes no model. Once tripped it stays so for the life of the loop, because a model that has come apart does not mend
itself: what is served and the checkpoints stay as they were before.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal, Protocol

import structlog

from trainer.metrics import Metrics

if TYPE_CHECKING:
    from trainer.evaluate import Prequential
    from trainer.progress import Progress

Danger = Literal["non_finite", "norm", "recall"]
WARM_UP = 100
"""Micro-batches before the size of gradients is judged: the first ones of a new model are large."""
MEMORY = 1_000
"""Micro-batches that the usual size is taken over."""
WINDOWS = 8
"""Windows of tested clicks that the usual recall is the median of."""
LEAST_WINDOWS = 2
LEAST_HITS = 100
"""Below so many usual hits in a window, its recall is too noisy to be judged."""

log = structlog.get_logger()


class RollBackError(Exception):
    """The loop has ended to be begun again with the last checkpoint, without what was learnt since."""


class Recall(Protocol):
    """Recalls of a window of tested clicks."""

    def recall(self, k: int) -> float:
        """Of the served score, 0 … 1."""

    def popularity_recall(self, k: int) -> float:
        """Of live popularity, 0 … 1."""


def pass_over(progress: Progress, left: Progress, metrics: Metrics) -> None:
    """Moves the beginning of a loop behind the clicks that the one before had come to, when it was rolled back.

    The micro-batches between are read again, and dropped.

    Args:
        progress: of the checkpoint that the loop begins with; changed here.
        left: of the loop before, at its end.
        metrics: counts.
    """
    num_clicks = left.clicks_learnt - progress.clicks_learnt
    log.warning("rolled back", clicks_passed_over=num_clicks, learnt=progress.learnt, next=left.learnt)
    progress.learnt = {**progress.learnt, **left.learnt}
    metrics.rollbacks.inc()
    metrics.clicks_passed_over.inc(num_clicks)


@dataclass
class _Usual:
    """How long something usually is."""

    num_norms: int = 0
    log_norm: float = 0.0

    @property
    def norm(self) -> float:
        """The geometric mean; infinite before there are enough to judge."""
        return math.exp(self.log_norm) if self.num_norms >= WARM_UP else math.inf

    def observe(self, norm: float) -> None:
        self.num_norms += 1
        self.log_norm += (math.log(norm) - self.log_norm) * max(1 / self.num_norms, 1 / MEMORY)


class Guard:
    """Trips on what is not finite, on exploding gradients or weights, and on a collapse of recall.

    norm: of a micro-batch, the longest gradient, or the longest of the table rows and layers that it has changed, is
    more than `norm_factor` times as long as usual: than the geometric mean exp(m), m ← m + (ln norm − m) · max(1/n,
    1/1,000), after 100 micro-batches.
    recall: in a whole window of tested clicks, recall at 10 is below `recall_ratio` times the usual one, the median of
    the last 8 windows, and below that of popularity alone in the same window. A stream that has become hard to foresee
    lowers both, and trips nothing.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        window_clicks: int = 5_000,
        norm_factor: float = 100.0,
        recall_ratio: float = 0.5,
        rolls_back: bool = False,
    ) -> None:
        """
        Args:
            metrics: counts what trips.
            window_clicks: tested clicks of a window, ≥ 1.
            norm_factor: > 1; 0: the size of gradients and weights is not judged.
            recall_ratio: 0 … 1; 0: recall is not judged.
            rolls_back: whether the loop is to begin again once it trips.
        """
        self._metrics = metrics
        self._window_clicks = window_clicks
        self._norm_factor, self._recall_ratio = norm_factor, recall_ratio
        self.rolls_back = rolls_back
        self.tripped: Danger | None = None
        self._gradient, self._weight = _Usual(), _Usual()
        self._recalls: deque[float] = deque(maxlen=WINDOWS)
        self._next_window = window_clicks
        metrics.publishing_held.set(0)

    def trip(self, danger: Danger, what: str) -> None:
        """Says that something is wrong; counted and logged each time."""
        self._metrics.dangers.labels(danger).inc()
        self._metrics.publishing_held.set(1)
        log.error("nothing is saved or published any more", danger=danger, reason=what, rolls_back=self.rolls_back)
        self.tripped = self.tripped or danger

    def check(self) -> None:
        """To be called when all that belongs to a micro-batch is noted.

        Raises:
            RollBackError: it has tripped, and rolls back.
        """
        if self.tripped and self.rolls_back:
            raise RollBackError(self.tripped)

    def observe(self, gradient_norm: float, weight_norm: float, evaluation: Prequential | None) -> None:
        """Judges what a micro-batch gave: see `trainer.step.StepResult`."""
        self.observe_gradient(gradient_norm)
        self.observe_weights(weight_norm)
        if evaluation is not None and self.is_window_due(evaluation.num_evaluated):
            self.observe_recall(evaluation.window(), evaluation.num_evaluated)

    def observe_gradient(self, norm: float) -> None:
        """Judges the norm of a micro-batch's largest gradient, finite and ≥ 0."""
        self._judge(self._gradient, norm, "a gradient has the norm")

    def observe_weights(self, norm: float) -> None:
        """Judges the longest of the weights that a micro-batch has changed, ≥ 0 or not finite."""
        if math.isfinite(norm):
            self._judge(self._weight, norm, "a table row or a layer has the norm")
        else:
            self.trip("non_finite", f"a table row or a layer has become {norm}")

    def _judge(self, usual: _Usual, norm: float, what: str) -> None:
        if self._norm_factor and norm > self._norm_factor * usual.norm:
            self.trip("norm", f"{what} {norm:.3g}, and usually {usual.norm:.3g}")
        elif norm > 0:
            usual.observe(norm)

    def is_window_due(self, num_evaluated: int) -> bool:
        """Whether a window more has been tested, and `observe_recall` is to be called with it."""
        return bool(self._recall_ratio) and num_evaluated >= self._next_window

    def observe_recall(self, window: Recall, num_evaluated: int) -> None:
        """Judges the newest window of tested clicks, of which there were `num_evaluated` so far."""
        self._next_window = num_evaluated + self._window_clicks
        recall, popularity = window.recall(10), window.popularity_recall(10)
        if len(self._recalls) >= LEAST_WINDOWS:
            usual = median(self._recalls)
            collapsed = recall < self._recall_ratio * usual and recall < popularity
            if collapsed and usual * self._window_clicks >= LEAST_HITS:
                self.trip(
                    "recall", f"recall at 10 is {recall:.4f}, usually {usual:.4f}; of popularity {popularity:.4f}"
                )
                return
        self._recalls.append(recall)
