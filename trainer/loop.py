"""The trainer's story: micro-batches in; tested, learnt, remembered, saved, published.

Station: the middle of the trainer; it alone changes the model. One thread: between two calls of `_keep_up`
everything fits together, and there copies are taken for checkpoints and publishing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import structlog

from streams.contract import MicroBatch
from trainer.checkpoint import Checkpoints
from trainer.guard import Guard
from trainer.metrics import Metrics
from trainer.model import Model
from trainer.progress import Progress
from trainer.publish import Publisher
from trainer.source import Delivery, Poll, Source
from trainer.step import NonFiniteError

POLL_SECONDS = 0.1
log = structlog.get_logger()


@dataclass
class Loop:
    """Parts that belong together: model and progress as the checkpoint had them, or new."""

    source: Source
    model: Model
    checkpoints: Checkpoints
    publisher: Publisher
    progress: Progress
    metrics: Metrics
    guard: Guard

    def run(self, stop: threading.Event) -> None:
        """The story, until told to stop or the source is at its end. Ends with a checkpoint of all that was learnt.

        Raises:
            RollBackError: the guard has tripped, and rolls back.
        """
        self.source.start(self.progress.positions)
        log.info("ready", clicks_learnt=self.progress.clicks_learnt, items=self.model.catalogue.num_items)
        if self.checkpoints.due:  # a new model: to copy all its tables later would hold up clicks
            self.checkpoints.save(self.progress, self.model)
        poll = Poll()
        while not (stop.is_set() or poll.ended):
            with self.metrics.stage("wait"):
                poll = self.source.poll(POLL_SECONDS)
            self.publisher.freshness.taken()
            with self.metrics.stage("items"):
                self._take_items(poll)
            for place, delivery in enumerate(poll.deliveries, 1):
                self._learn(delivery)
                self._keep_up(poll, len(poll.deliveries) - place)
                if stop.is_set():
                    break
            self._keep_up(poll, 0)
        self.publisher.close()
        if not self.guard.tripped and self.checkpoints.finish(self.progress, self.model):
            self.source.show_positions(self.progress.positions.micro_batches)

    def _take_items(self, poll: Poll) -> None:
        if poll.items:
            self.progress.step += 1
            self.model.take(poll.items, self.progress.step)
            self.metrics.item_events.inc(len(poll.items))
        self.progress.positions.items.update(poll.item_positions)

    def _learn(self, delivery: Delivery) -> None:
        progress, batch = self.progress, delivery.batch
        learnt = progress.learnt.setdefault(batch.partition, batch.first_offset)
        if batch.first_offset > learnt:
            self.metrics.source_gap.inc(batch.first_offset - learnt)
            log.warning("clicks were never delivered", partition=batch.partition, first=learnt, next=batch.first_offset)
        new = batch.from_offset(learnt)
        self.metrics.rows_already_learnt.inc(len(batch) - (len(new) if new else 0))
        if new:
            self._learn_rows(new)
        progress.learnt[batch.partition] = max(learnt, batch.next_offset)
        progress.positions.micro_batches[batch.partition] = delivery.next_position
        self.guard.check()

    def _learn_rows(self, batch: MicroBatch) -> None:
        progress = self.progress
        progress.step += 1
        if (learnable := self.publisher.without_canary(batch)) is None:
            return
        batch = learnable
        try:
            result = self.model.learn(batch, progress.step, self.metrics.stage).result
        except NonFiniteError as error:
            self.guard.trip("non_finite", f"clicks {batch.offset[0]} … of partition {batch.partition}: {error}")
            self.metrics.clicks_passed_over.inc(len(batch))
            return
        shown = self.model.catalogue.serves(batch.item_hash)
        self.publisher.freshness.note(progress.step, batch.item_hash[shown], batch.ingest_time[shown])
        progress.note(len(batch), result.loss)
        self.metrics.learnt(len(batch), result.num_steps, result.loss, float(batch.ingest_time.max()))
        self.guard.observe(result.gradient_norm, result.weight_norm, self.model.evaluation)

    def _keep_up(self, poll: Poll, in_hand: int) -> None:
        with self.metrics.stage("checkpoint"):
            if written := self.checkpoints.collect():
                self.source.show_positions(written.positions.micro_batches)
            if self.checkpoints.due and not self.guard.tripped:
                self.checkpoints.save(self.progress, self.model)
        with self.metrics.stage("publish"):
            if not poll.loading and not self.guard.tripped:
                self.publisher.advance()
        waiting = self.source.lag() + in_hand
        self.metrics.report(self.model.catalogue, self.progress, self.model.evaluation, waiting)
