"""Deletes what went in the versions that get no deltas.

Station: beside publishing. Deltas delete in the version that they go into; here the same goes into every other version
that may be served: the ones kept to go back to or to compare with, and the pinned one. It publishes nothing else there:
vectors of today's model mean nothing beside their query towers.
"""

from __future__ import annotations

import math
from concurrent.futures import Future

import structlog

from streams.contract import UInt64Array
from trainer.catalogue import Catalogue
from trainer.gone import Sweeps
from trainer.index import CollectionGoneError, IndexAwayError, PublishStoppedError
from trainer.metrics import Metrics
from trainer.progress import Progress
from trainer.rollout import Rollout, start_job

LONGEST_PAUSE_SECONDS = 30.0
"""Between attempts, while Qdrant is away."""

log = structlog.get_logger()


class OtherVersions:
    """Deletes in all whole versions but the one that deltas go into. All methods are for the loop's thread."""

    def __init__(self, rollout: Rollout, catalogue: Catalogue, progress: Progress, metrics: Metrics) -> None:
        """
        Args:
            rollout: has index, versions and settings.
            catalogue: says what went; after a start, all that is marked deleted counts as gone just now.
            progress: its step is that of each delete.
            metrics: counts failures.
        """
        self._rollout, self._catalogue, self._progress, self._metrics = rollout, catalogue, progress, metrics
        self.sweeps = Sweeps()
        self.job: Future[int] | None = None
        """Gives the step up to which it has deleted."""
        self._due, self._failures = -math.inf, 0

    def advance(self, now: float, own: int | None, *, own_gets_deltas: bool) -> None:
        """Takes up what has finished and begins what is due; never waits.

        Args:
            now: seconds that never go back.
            own: the version that this process has published last.
            own_gets_deltas: it is left out. Where another one is pinned it is not, for it may be served to some.
        """
        if self.job is not None and self.job.done():
            job, self.job = self.job, None
            self._finish(job, now)
        if self.job is not None or now < self._due or self._catalogue.gone.last <= self.sweeps.step:
            return
        self._due = now + self._rollout.settings.publish_interval_seconds
        # Looked up here and not on the thread: when that runs, a version filled since may be there too, and in it what
        # has come back.
        numbers = [number for number in self._rollout.versions.numbers() if not (own_gets_deltas and number == own)]
        gone, step = self._catalogue.gone.since(self.sweeps.step), self._progress.step
        self.job = start_job(lambda: self._delete(numbers, gone, step, own))

    def _delete(self, numbers: list[int], gone: UInt64Array, step: int, own: int | None) -> int:
        for number in numbers:
            try:
                # An earlier process may have come to higher steps; nobody writes points into its versions any more.
                self._rollout.index.delete(number, gone, step if number == own else None)
            except CollectionGoneError:
                continue
        return step

    def _finish(self, job: Future[int], now: float) -> None:
        try:
            self.sweeps.acknowledge(now, job.result())
            self._failures = 0
        except PublishStoppedError:
            return
        except IndexAwayError as error:
            pause = min(2.0 ** min(self._failures, 30), LONGEST_PAUSE_SECONDS)
            self._failures, self._due = self._failures + 1, now + pause
            self._metrics.publish_failures.labels("delete").inc()
            log.warning("items not deleted in other versions", error=str(error), next_attempt_seconds=pause)
