"""The guard: what trips it, by value; and that nothing goes out once it has tripped."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from streams.contract import MicroBatch
from tests.trainer.small_trainer import Trainer
from tests.trainer.streams_of_clicks import click_stream
from tests.trainer.test_loop import assert_same_model
from trainer.guard import Guard, RollBackError, pass_over
from trainer.metrics import DANGERS, Metrics
from trainer.source import Poll


@dataclass
class Window:
    """Recalls at 10."""

    of_score: float
    of_popularity: float

    def recall(self, k: int) -> float:
        return self.of_score if k == 10 else 1.0

    def popularity_recall(self, k: int) -> float:
        return self.of_popularity if k == 10 else 1.0


def new_guard(**settings: float) -> Guard:
    return Guard(Metrics(), window_clicks=1_000, **settings)  # type: ignore[arg-type]


def counts(guard: Guard) -> dict[str, float | None]:
    value = guard._metrics.registry.get_sample_value
    return {danger: value("streamtower_trainer_dangers_total", {"danger": danger}) for danger in DANGERS}


def test_a_gradient_a_hundred_times_as_long_as_usual_trips() -> None:
    guard = new_guard()
    for norm in [1.0, 4.0] * 50:  # of the geometric mean 2
        guard.observe_gradient(norm)
    guard.observe_gradient(199.0)
    assert guard.tripped is None
    guard = new_guard()
    for norm in [1.0, 4.0] * 50:
        guard.observe_gradient(norm)
    guard.observe_gradient(201.0)
    assert guard.tripped == "norm" and counts(guard) == {"non_finite": 0, "norm": 1, "recall": 0}


def test_weights_a_hundred_times_as_long_as_usual_or_not_finite_trip() -> None:
    for norm, tripped in [(199.0, None), (201.0, "norm"), (float("nan"), "non_finite"), (float("inf"), "non_finite")]:
        guard = new_guard()
        for usual in [1.0, 4.0] * 50:
            guard.observe(0.1, usual, None)
        guard.observe(0.1, norm, None)
        assert guard.tripped == tripped


def test_weights_that_explode_hold_publishing_and_checkpoints(tmp_path: Path) -> None:
    trainer = start(tmp_path, click_stream(110), rolls_back=False, checkpoint_at=48)
    give = trainer.source.poll

    def poll(timeout_seconds: float) -> Poll:
        if trainer.progress.micro_batches == 105:
            trainer.learner.state_dict()["tables.items"].mul_(1e4)
        return give(timeout_seconds)  # type: ignore[no-any-return]

    trainer.source.poll = poll
    trainer.run()
    assert trainer.guard is not None and trainer.guard.tripped == "norm"
    assert trainer.value("dangers_total", danger="norm") >= 1 and trainer.value("publishing_held") == 1


def test_the_first_gradients_of_a_life_trip_nothing() -> None:
    guard = new_guard()
    for norm in [1.0] * 99 + [1e9]:
        guard.observe_gradient(norm)
    assert guard.tripped is None


def test_recall_below_half_of_the_usual_and_below_popularity_trips() -> None:
    for newest, tripped in [
        (Window(0.149, 0.15), "recall"),
        (Window(0.149, 0.14), None),  # the stream is hard to foresee, for popularity too
        (Window(0.151, 0.2), None),
    ]:
        guard = new_guard()
        for number, window in enumerate([Window(0.4, 0.1), Window(0.2, 0.1), Window(0.3, 0.1)], 1):
            guard.observe_recall(window, number * 1_000)
        guard.observe_recall(newest, 4_000)
        assert guard.tripped == tripped
        assert counts(guard)["recall"] == (tripped == "recall")


def test_windows_are_judged_each_once_and_only_when_there_is_something_usual() -> None:
    guard = new_guard()
    assert [guard.is_window_due(n) for n in (0, 999, 1_000)] == [False, False, True]
    guard.observe_recall(Window(0.9, 0.1), 1_007)
    assert [guard.is_window_due(n) for n in (2_006, 2_007)] == [False, True]
    guard.observe_recall(Window(0.0, 0.1), 2_007)
    assert guard.tripped is None


def test_a_recall_of_few_hits_is_noise() -> None:
    guard = new_guard()
    for number in range(1, 4):
        guard.observe_recall(Window(0.09, 0.01), number * 1_000)
    guard.observe_recall(Window(0.0, 0.01), 4_000)
    assert guard.tripped is None


def test_what_is_turned_off_trips_nothing() -> None:
    guard = new_guard(norm_factor=0.0, recall_ratio=0.0)
    for norm in [1.0] * 100 + [1e30]:
        guard.observe_gradient(norm)
    assert guard.tripped is None and not guard.is_window_due(10**9)


def poisoned(batch: MicroBatch) -> MicroBatch:
    """Rewards within the contract whose loss is beyond what a float can hold."""
    return dataclasses.replace(batch, reward=np.full(len(batch), 3e38, np.float32))


def start(directory: Path, entries: list[MicroBatch], *, rolls_back: bool, checkpoint_at: int) -> Trainer:
    """A trainer that has a checkpoint of its first `checkpoint_at` clicks when it meets the rest."""
    trainer = Trainer(directory, entries, interval=0.0)
    trainer.guard = Guard(trainer.metrics, rolls_back=rolls_back)
    give = trainer.source.poll

    def poll(timeout_seconds: float) -> Poll:
        trainer.checkpoints.collect(wait=True)
        trainer.checkpoints._interval = 1e9 if trainer.progress.clicks_learnt >= checkpoint_at else 0.0
        return give(timeout_seconds)  # type: ignore[no-any-return]

    trainer.source.poll = poll
    return trainer


BATCHES = click_stream(8)
POISONED = [*BATCHES[:5], poisoned(BATCHES[5]), *BATCHES[6:]]


def test_a_loss_that_is_not_finite_holds_publishing_and_checkpoints_and_learning_goes_on(tmp_path: Path) -> None:
    quiet = start(tmp_path / "quiet", BATCHES[:5], rolls_back=False, checkpoint_at=48)
    quiet.run()
    trainer = start(tmp_path / "held", POISONED, rolls_back=False, checkpoint_at=48)
    trainer.run()
    assert trainer.value("dangers_total", danger="non_finite") == 1
    assert trainer.value("publishing_held") == 1 and trainer.value("rollbacks_total") == 0
    assert trainer.value("clicks_passed_over_total") == 16
    assert trainer.progress.clicks_learnt == 7 * 16 and trainer.progress.learnt == {0: 8 * 16}
    # Two turns for each of the five good micro-batches, and none after; the quiet one ends with a turn more.
    assert trainer.publisher.num_advances == 2 * 5 == quiet.publisher.num_advances - 1
    after = Trainer(tmp_path / "held")
    assert after.progress.clicks_learnt == 48
    after.checkpoints.close()


def test_rolled_back_it_goes_on_from_the_checkpoint_without_the_clicks_since(tmp_path: Path) -> None:
    trainer = start(tmp_path / "a", POISONED, rolls_back=True, checkpoint_at=48)
    with pytest.raises(RollBackError, match="non_finite"):
        trainer.run()
    trainer.checkpoints.close()
    assert trainer.progress.learnt == {0: 6 * 16}
    again = Trainer(tmp_path / "a", POISONED)
    pass_over(again.progress, trainer.progress, again.metrics)
    again.run()
    assert again.value("rollbacks_total") == 1 and again.value("publishing_held") == 0
    assert again.value("clicks_passed_over_total") == 2 * 16
    assert again.value("rows_already_learnt_total") == 3 * 16
    assert again.progress.clicks_learnt == 5 * 16 and again.progress.learnt == {0: 8 * 16}

    # The same as if the clicks between had never been.
    straight = Trainer(tmp_path / "b", BATCHES[:3])
    straight.run()
    straight = Trainer(tmp_path / "b", [*BATCHES[:3], *BATCHES[6:]])
    straight.run()
    assert_same_model(straight, again)


def test_a_good_stream_trips_nothing(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, click_stream(150))
    trainer.guard = Guard(trainer.metrics, window_clicks=300)
    trainer.run()
    assert trainer.guard.tripped is None
    assert trainer.guard._gradient.num_norms == trainer.guard._weight.num_norms == 150
    assert trainer.guard._recalls
