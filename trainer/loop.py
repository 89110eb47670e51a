"""The trainer's story: micro-batches in; tested, learnt, remembered, saved, published.

Station: the middle of the trainer; it alone changes learner and catalogue. One thread: between two calls of `_keep_up`
everything fits together, and there copies are taken for checkpoints and publishing.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import structlog

from streams.contract import MicroBatch
from trainer.catalogue import Catalogue
from trainer.checkpoint import Checkpoints, Progress
from trainer.evaluate import Prequential
from trainer.metrics import Metrics
from trainer.publish import Publisher
from trainer.source import Delivery, Poll, Source
from trainer.step import Clicks, Learner
from trainer.towers import QueryInputs, query_inputs

POLL_SECONDS = 0.1
log = structlog.get_logger()


@dataclass
class Loop:
    """Parts that belong together: catalogue, learner and progress as the checkpoint had them, or new."""

    source: Source
    catalogue: Catalogue
    learner: Learner
    evaluation: Prequential | None
    checkpoints: Checkpoints
    publisher: Publisher
    progress: Progress
    metrics: Metrics

    def run(self, stop: threading.Event) -> None:
        """The story, until told to stop or the source is at its end. Ends with a checkpoint of all that was learnt."""
        self.source.start(self.progress.positions)
        self.catalogue.embed(np.arange(len(self.catalogue)), self.learner.embed_items)
        log.info("ready", clicks_learnt=self.progress.clicks_learnt, items=self.catalogue.num_items)
        poll = Poll()
        while not (stop.is_set() or poll.ended):
            with self.metrics.stage("wait"):
                poll = self.source.poll(POLL_SECONDS)
            with self.metrics.stage("items"):
                self._take_items(poll)
            for place, delivery in enumerate(poll.deliveries, 1):
                self._learn(delivery)
                self._keep_up(poll, len(poll.deliveries) - place)
                if stop.is_set():
                    break
            self._keep_up(poll, 0)
        self.publisher.close()
        if self.checkpoints.finish(self.progress, self.learner, self.catalogue):
            self.source.show_positions(self.progress.positions.micro_batches)

    def _take_items(self, poll: Poll) -> None:
        if poll.items:
            self.progress.step += 1
            rows = self.catalogue.take(poll.items, self.progress.step)
            self.catalogue.embed(rows, self.learner.embed_items)
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

    def _learn_rows(self, batch: MicroBatch) -> None:
        progress, config = self.progress, self.learner.config
        context = {f.name: batch.context[f.name].to_pylist() for f in config.context if f.name in batch.context}
        query = query_inputs(config, batch.user_hash, batch.history_values, batch.history_offsets, context)
        with self.metrics.stage("evaluate"):
            self._evaluate(batch, query)
        with self.metrics.stage("learn"):
            progress.step += 1
            rows = self.catalogue.admit(batch.item_hash, batch.item_id, progress.step)
            log_q, histories = np.log(batch.sampling_probability), (batch.history_values, batch.history_offsets)
            result = self.learner.learn(Clicks(query, batch.item_hash, batch.reward, log_q, *histories))
        with self.metrics.stage("touch"):
            self.catalogue.count(rows)
            self.catalogue.embed(np.unique(rows), self.learner.embed_items)
            self.publisher.freshness.note(progress.step, batch.ingest_time)
        progress.note(len(batch), result.loss)
        self.metrics.learnt(len(batch), result.num_steps, result.loss, float(batch.ingest_time.max()))

    def _evaluate(self, batch: MicroBatch, query: QueryInputs) -> None:
        if self.evaluation is not None and self.catalogue.num_items:
            queries, items = self.learner.embed_queries(query), self.catalogue.embedding
            target, histories = self.catalogue.find(batch.item_hash), self.catalogue.find(batch.history_values)
            popularity, offsets = self.catalogue.popularity(), batch.history_offsets
            self.evaluation.observe(queries, items, popularity, target, histories, offsets)

    def _keep_up(self, poll: Poll, in_hand: int) -> None:
        with self.metrics.stage("checkpoint"):
            if written := self.checkpoints.collect():
                self.source.show_positions(written.positions.micro_batches)
            if self.checkpoints.due:
                self.checkpoints.save(self.progress, self.learner, self.catalogue)
        with self.metrics.stage("publish"):
            if not poll.loading:
                self.publisher.advance()
        self.metrics.report(self.catalogue, self.progress, self.evaluation, self.source.lag() + in_hand)
