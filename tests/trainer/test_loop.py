"""The loop on a list of micro-batches: learns each click once, tests before it learns, and resumes bit for bit."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from streams.contract import MicroBatch, hash_ids
from tests.trainer.small_trainer import Trainer
from tests.trainer.streams_of_clicks import click_stream, micro_batch
from tests.trainer.test_columns import plain
from trainer.contract import PrequentialScore
from trainer.item_events import ItemChange
from trainer.manifests import manifest_of
from trainer.rollout import PublishSettings
from trainer.source import Poll

CHANGES = [ItemChange(f"item-{n}", {"brand": f"brand {n % 3}", "price": n}, b"{}") for n in range(0, 60, 2)]


def two_partitions(num_batches: int) -> list[MicroBatch]:
    pairs = zip(click_stream(num_batches), click_stream(num_batches, partition=1), strict=True)
    return [batch for pair in pairs for batch in pair]


def assert_same_model(one: Trainer, two: Trainer) -> None:
    """Value by value, all that is kept of them."""
    states = [plain(trainer.model.state_dict()) for trainer in (one, two)]
    assert states[0].keys() == states[1].keys()
    for name in states[0].keys() - {"catalogue.added", "catalogue.touched"}:  # steps, which count deliveries too
        np.testing.assert_equal(states[0][name], states[1][name], name)


def test_every_click_is_learnt_and_counted(tmp_path: Path) -> None:
    batches = two_partitions(5)
    trainer = Trainer(tmp_path, batches)
    trainer.run()
    assert trainer.value("clicks_learnt_total") == trainer.progress.clicks_learnt == 160
    assert trainer.value("micro_batches_total") == 10
    assert trainer.value("steps_total") == trainer.learner.num_steps == 20
    assert trainer.progress.learnt == {0: 80, 1: 80} and trainer.progress.positions.micro_batches == {0: 5, 1: 5}
    assert trainer.source.shown == {0: 5, 1: 5}
    items = [item for batch in batches for item in batch.item_id.to_pylist()]
    for item in set(items):
        row = trainer.catalogue.find(hash_ids([item]))
        assert trainer.catalogue.num_clicks[row].tolist() == [items.count(item)]


def test_clicks_delivered_again_are_not_learnt_again(tmp_path: Path) -> None:
    batches = click_stream(6)
    undisturbed = Trainer(tmp_path / "a", batches)
    undisturbed.run()
    disturbed = Trainer(tmp_path / "b", [*batches[:4], batches[2], batches[3], batches[0], *batches[4:], batches[5]])
    disturbed.run()
    assert_same_model(undisturbed, disturbed)
    assert disturbed.value("rows_already_learnt_total") == 64
    assert disturbed.value("clicks_learnt_total") == 96
    assert disturbed.value("source_gap_offsets_total") == 0


def test_of_a_micro_batch_cut_otherwise_only_the_new_rows_are_learnt(tmp_path: Path) -> None:
    trainer = Trainer(
        tmp_path,
        [micro_batch(["a", "b", "c"], first_offset=10), micro_batch(["b", "c", "d", "e"], first_offset=11)],
    )
    trainer.run()
    assert trainer.catalogue.num_clicks.tolist() == [1, 1, 1, 1, 1]
    assert trainer.progress.learnt == {0: 15}
    assert trainer.value("rows_already_learnt_total") == 2


def test_a_gap_in_the_source_offsets_is_counted_and_a_first_offset_above_zero_is_none(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [micro_batch(["a"], first_offset=100), micro_batch(["b"], first_offset=108)])
    trainer.run()
    assert trainer.value("source_gap_offsets_total") == 7
    assert trainer.progress.learnt == {0: 109}


def test_a_micro_batch_whose_clicks_were_all_rejected_moves_the_positions_on(tmp_path: Path) -> None:
    empty = micro_batch([], first_offset=2, next_offset=9)
    trainer = Trainer(tmp_path, [micro_batch(["a", "b"]), MicroBatch.decode(empty.encode())])
    trainer.run()
    assert trainer.progress.learnt == {0: 9} and trainer.progress.positions.micro_batches == {0: 2}
    assert trainer.value("clicks_learnt_total") == 2


@pytest.mark.parametrize("cut", [1, 4, 7])
@pytest.mark.parametrize("bounds", [{}, {"admit_clicks": 3, "expire_clicks": 64}, {"max_items": 32}], ids=str)
def test_a_trainer_that_stopped_and_resumed_has_the_model_of_one_that_did_not(
    tmp_path: Path, cut: int, bounds: dict[str, int]
) -> None:
    entries = [CHANGES[:20], *two_partitions(4), CHANGES[15:], *two_partitions(8)[8:]]
    undisturbed = Trainer(tmp_path / "a", entries, **bounds)  # type: ignore[arg-type]
    undisturbed.run()
    Trainer(tmp_path / "b", entries[:cut], **bounds).run()  # type: ignore[arg-type]
    resumed = Trainer(tmp_path / "b", entries, **bounds)  # type: ignore[arg-type]
    resumed.run()
    assert (resumed.value("items_expired") > 0) == ("expire_clicks" in bounds)
    assert_same_model(undisturbed, resumed)
    assert resumed.progress.clicks_learnt == undisturbed.progress.clicks_learnt == 256


def test_a_crash_falls_back_to_the_last_checkpoint_and_ends_with_the_same_model(tmp_path: Path) -> None:
    batches = two_partitions(6)
    undisturbed = Trainer(tmp_path / "a", batches)
    undisturbed.run()

    class Crash(Exception):
        pass

    crashing = Trainer(tmp_path / "b", batches, interval=0.0)
    give = crashing.source.poll

    def poll(timeout_seconds: float) -> Poll:
        crashing.checkpoints.collect(wait=True)
        if crashing.progress.clicks_learnt == 112:
            raise Crash
        return give(timeout_seconds)  # type: ignore[no-any-return]

    crashing.source.poll = poll
    with pytest.raises(Crash):
        crashing.run()
    crashing.checkpoints.close()
    resumed = Trainer(tmp_path / "b", batches)
    assert resumed.progress.clicks_learnt == 112
    resumed.run()
    assert_same_model(undisturbed, resumed)


def test_stopping_saves_what_was_learnt(tmp_path: Path) -> None:
    stop = threading.Event()
    trainer = Trainer(tmp_path, click_stream(50))
    give = trainer.source.poll

    def poll(timeout_seconds: float) -> Poll:
        if trainer.progress.micro_batches == 3:
            stop.set()
        return give(timeout_seconds)  # type: ignore[no-any-return]

    trainer.source.poll = poll
    trainer.run(stop)
    assert Trainer(tmp_path).progress.clicks_learnt == trainer.progress.clicks_learnt == 64


def test_evaluation_ranks_before_learning_and_does_not_change_the_model(tmp_path: Path) -> None:
    batches = click_stream(8)
    watched, blind = Trainer(tmp_path / "a", batches), Trainer(tmp_path / "b", batches, evaluate=False)
    watched.run()
    blind.run()
    for name, tensor in watched.learner.state_dict().items():
        assert torch.equal(tensor, blind.learner.state_dict()[name]), name
    # Of each micro-batch eight clicks are tested; two of them are among the first five, that meet an empty catalogue:
    # they are misses.
    assert watched.value("clicks_evaluated_total") == 64
    assert 0 < watched.value("prequential_recall_at_k", k="10") <= watched.value("recall_ceiling_ratio") <= 1
    assert watched.value("popularity_recall_at_k", k="100") == watched.value("recall_ceiling_ratio")
    assert blind.value("clicks_evaluated_total") == 0


def prequential_of(trainer: Trainer) -> PrequentialScore | None:
    """As a version that is made now would tell it."""
    return manifest_of(trainer.model, trainer.progress, PublishSettings(), "items", 0.0).prequential


def test_a_version_that_is_made_right_after_a_restart_says_how_well_its_model_foresaw_the_clicks(
    tmp_path: Path,
) -> None:
    trainer = Trainer(tmp_path, click_stream(8))
    assert prequential_of(trainer) is None
    trainer.run()
    told = prequential_of(trainer)
    assert told is not None and told.clicks == 64 and told.recall_at_100 > 0
    again = Trainer(tmp_path, click_stream(9))
    assert prequential_of(again) == told
    again.run()
    assert again.value("clicks_evaluated_total") == 8
    told = prequential_of(again)
    assert told is not None and told.clicks == 72
    assert told.recall_at_10 == pytest.approx(again.value("prequential_recall_at_k", k="10"))


def test_clicks_that_meet_an_empty_catalogue_are_misses_of_the_first_version(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, [micro_batch(["a", "b", "c"])])
    trainer.run()
    assert prequential_of(trainer) == PrequentialScore(
        clicks=3, recall_at_10=0.0, recall_at_100=0.0, popularity_recall_at_10=0.0, popularity_recall_at_100=0.0
    )


def test_with_and_without_evaluation_a_checkpoint_goes_on_where_the_other_left(tmp_path: Path) -> None:
    batches = click_stream(6)
    for number, evaluate in enumerate((True, False, True), 1):
        trainer = Trainer(tmp_path, batches[: 2 * number], evaluate=evaluate)
        trainer.run()
        assert trainer.value("checkpoint_failures_total") == 0
        assert (prequential_of(trainer) is not None) == evaluate
        assert trainer.progress.clicks_learnt == 32 * number


def test_clicks_on_items_that_are_not_admitted_or_gone_are_not_counted_as_servable(tmp_path: Path) -> None:
    entries = [
        micro_batch(["once", "twice"]),
        micro_batch(["twice", "gone"], first_offset=2),
        [ItemChange("gone", gone=True)],
        micro_batch(["gone", "gone", "twice", "twice"], first_offset=4),
        micro_batch(["gone", "never"], first_offset=8),
    ]
    trainer = Trainer(tmp_path, entries, admit_clicks=2)
    trainer.run()
    assert trainer.progress.clicks_learnt == 10
    freshness = trainer.publisher.freshness
    freshness.acknowledge(trainer.progress.step, 1e10)
    assert trainer.value("click_to_servable_seconds_count") == 3
    assert {trainer.value("servable_stage_seconds_count", stage=s) for s in ("queue", "learn", "publish")} == {3.0}
    assert freshness.oldest == 0.0


def test_of_many_items_few_micro_batches_are_weighed_and_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path, click_stream(2))
    trainer.run()
    model, num_items = trainer.model, len(trainer.catalogue)

    def drawn(micro_batches: int) -> Counter[tuple[int, int]]:
        """(weighed, tested) of a micro-batch of 100 clicks → how many of these were so."""
        found: Counter[tuple[int, int]] = Counter()
        for _ in range(micro_batches):
            model.learner.num_steps += 1
            weighed, tested = model._drawn(100)
            found[int(weighed.sum()), int(tested.sum())] += 1
        return found

    model.tested_rows = 40
    assert drawn(50) == {(16, 40): 50}
    monkeypatch.setattr("trainer.model.MOST_SCORES", 20 * num_items)
    assert drawn(50) == {(16, 20): 50}
    monkeypatch.setattr("trainer.model.MOST_SCORES", num_items)
    assert drawn(50) == {(16, 16): 50}
    monkeypatch.setattr("trainer.model.MOST_ITEMS", num_items / 4)
    one_in_four = drawn(1_000)
    assert one_in_four.keys() == {(16, 16), (0, 0)}
    assert 200 < one_in_four[16, 16] < 300
    model.tested_rows = None
    assert drawn(1_000).keys() == {(16, 100), (0, 100)}


def test_the_loss_is_reported_and_falls_on_clicks_that_can_be_foreseen(tmp_path: Path) -> None:
    users = [f"u{n % 4}" for n in range(16)]
    items = [f"i{n % 4}" for n in range(16)]
    batches = [micro_batch(items, first_offset=16 * n, user_ids=users) for n in range(150)]
    trainer = Trainer(tmp_path, batches)
    trainer.run()
    assert trainer.value("loss") < 0.5 * trainer.value("loss_first")


def test_item_events_reach_the_towers_and_a_gone_item_is_no_candidate(tmp_path: Path) -> None:
    trainer = Trainer(
        tmp_path,
        [
            [ItemChange("a", {"brand": "x"}, b'{"title": "A"}'), ItemChange("b")],
            micro_batch(["a", "c"]),
            [ItemChange("c", gone=True)],
            micro_batch(["c", "a"], first_offset=2),
        ],
    )
    trainer.run()
    assert trainer.catalogue.num_items == 2 and trainer.value("items_deleted") == 1
    assert trainer.value("item_events_total") == 3
    norms = np.linalg.norm(trainer.catalogue.embedding, axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    assert trainer.progress.step == 4


def test_context_columns_reach_the_query_tower(tmp_path: Path) -> None:
    def run(name: str, device: pa.Array) -> Trainer:
        trainer = Trainer(tmp_path / name, [micro_batch(["a", "b"], context={"device": device, "other": device})])
        trainer.run()
        return trainer

    phone = run("1", pa.array(["phone", "phone"]))
    tv = run("2", pa.array(["tv", None]))
    changed = (phone.learner.state_dict()["tables.features"] != tv.learner.state_dict()["tables.features"]).any(dim=1)
    assert changed.sum() == 2


def test_a_full_catalogue_goes_on_learning(tmp_path: Path) -> None:
    batches = [micro_batch([f"i{16 * n + k}" for k in range(16)], first_offset=16 * n) for n in range(10)]
    trainer = Trainer(tmp_path, batches, max_items=64)
    trainer.run()
    assert trainer.progress.clicks_learnt == 160
    assert len(trainer.catalogue) <= 64 and trainer.value("items_dropped") >= 96
    resumed = Trainer(tmp_path, max_items=64)
    assert resumed.catalogue.num_dropped == trainer.catalogue.num_dropped


def test_publishing_waits_until_the_items_of_the_start_are_here(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    polls = [
        Poll(items=[ItemChange("a")], item_positions={0: 1}, loading=True),
        Poll(items=[ItemChange("b")], item_positions={0: 2}),
        Poll(ended=True),
    ]
    advances: list[int] = []

    def poll(timeout_seconds: float) -> Poll:
        advances.append(trainer.publisher.num_advances)
        return polls.pop(0)

    trainer.source.poll = poll
    trainer.run()
    assert advances == [0, 0, 1]
