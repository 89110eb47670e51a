"""The trainer's model in the contest: fed as in the trainer's loop, its answers in the stream's codes."""

from __future__ import annotations

import numpy as np

from streams.contract import ItemEvent
from streams.settings import StreamsSettings
from streams.state import StateConfig
from streamtower.evaluate.contest import TowersContestant, evaluated_model, item_changes, run
from streamtower.evaluate.evaluation import evaluate_contest, streams_beside, trainer_settings
from streamtower.evaluate.measures import measures, second_half
from streamtower.evaluate.ranking import NUM_BEST
from streamtower.evaluate.replay import read_clicks, stream
from tests.streamtower.evaluate.clicks_at_hand import (
    STATE,
    STREAMS,
    TRAINER,
    dataset,
    random_dataset,
    random_stream,
)


def test_the_model_is_tested_on_every_click_before_it_learns_it() -> None:
    clicks = random_stream(200)
    seen = run(TowersContestant(clicks, TRAINER, {}), clicks.batches).seen
    model = evaluated_model(TRAINER)
    for number, batch in enumerate(clicks.batches):
        rows = slice(16 * number, 16 * number + len(batch))
        ranks = model.learn(batch, number + 1).ranks
        if ranks is None:
            assert np.isinf(seen.rank[rows]).all()
        else:
            assert seen.rank[rows].tolist() == ranks.rank.tolist()
    assert np.isfinite(seen.rank).tolist() == clicks.is_candidate.tolist()


def test_best_items_are_candidates_in_the_streams_codes() -> None:
    clicks = random_stream(200)
    contestant = TowersContestant(clicks, TRAINER, {})
    seen = run(contestant, clicks.batches).seen
    hits = start = 0
    for block in clicks.blocks:
        for row in range(len(block)):
            best, rank = seen.best[start + row], seen.rank[start + row]
            best = best[best >= 0].tolist()
            low, high = block.history_offsets[row : row + 2]
            assert (
                len(best)
                == len(set(best))
                == min(
                    NUM_BEST, block.num_known - len({h for h in block.history_values[low:high] if h < block.num_known})
                )
            )
            assert not set(best) & set(block.history_values[low:high].tolist())
            assert all(item < block.num_known for item in best)
            assert (block.target[row] in best) == (rank <= NUM_BEST)
            hits += block.target[row] in best
        start += len(block)
    assert hits


def test_an_items_features_are_told_after_its_first_click() -> None:
    events = [ItemEvent(item_id=f"i{number}", features={"brand": f"b{number}"}) for number in range(60)]
    plain = random_dataset(64)
    [piece] = plain.clicks()
    data = dataset(piece.user_id.to_pylist(), piece.item_id.to_pylist(), piece.event_time.tolist(), events)
    settings = trainer_settings(data, embedding_dim=8, row_dim=8, item_rows=512, feature_rows=64, max_items=1000)
    assert [feature.name for feature in evaluated_model(settings).learner.config.item] == ["brand"]
    clicks = stream(read_clicks(data, STREAMS)[0], STATE)
    contestant = TowersContestant(clicks, settings, item_changes(data))
    for batch in clicks.batches:
        contestant.observe(batch)
        catalogue = contestant.model.catalogue
        assert sorted(catalogue.item_hash.tolist()) == sorted(clicks.item_hash[: len(catalogue)].tolist())
        bags = catalogue.inputs_of_rows(np.arange(len(catalogue))).features
        assert len(bags.rows) == len(catalogue), "each item has its one brand"


def test_the_papers_preset_gets_the_papers_frequency_estimate() -> None:
    corrected = TRAINER.model_copy(update={"correction": "logq"})
    papers = corrected.model_copy(update={"preset": "paper"})
    streams = StreamsSettings(batch_size=16, num_buckets=1024, history_length=5, history_users=1000)
    assert streams_beside(corrected, streams) == streams
    assert streams_beside(papers, streams).state_config() == StateConfig(
        num_buckets=1024, num_hashes=1, mode="batch", initial_gap=100.0, max_users=1000, history_length=5
    )
    result = evaluate_contest(
        lambda seed: random_dataset(600, num_items=20),
        streams,
        {"default": corrected, "again": corrected, "paper": papers},
        baselines=[],
        seeds=[0],
    )
    found = {name: contest.measures[0] for name, contest in result.contests.items()}
    assert found["default"] == found["again"] != found["paper"]
    cuts, _ = read_clicks(random_dataset(600, num_items=20), streams)
    by_hand = stream(cuts, streams_beside(papers, streams).state_config())
    assert found["paper"] == measures(
        by_hand, run(TowersContestant(by_hand, papers, {}), by_hand.batches).seen, second_half(600)
    )


def test_seeds_shuffle_and_train_anew_and_all_are_summed_up() -> None:
    asked = []

    def open_seed(seed: int) -> object:
        asked.append(seed)
        return random_dataset(300, seed=0)

    result = evaluate_contest(
        open_seed,  # type: ignore[arg-type]
        STREAMS,
        {"default": TRAINER, "logq": TRAINER.model_copy(update={"correction": "logq"})},
        baselines=["popularity", "item_knn", "item_knn_plain"],
        seeds=[0, 7],
        strict=["default"],
    )
    assert asked == [0, 7]
    assert list(result.contests) == [
        "default", "default_strict", "logq", "popularity", "item_knn", "item_knn_plain",
    ]  # fmt: skip
    for name, contest in result.contests.items():
        assert len(contest.measures) == len(contest.seconds) == 2
        same = contest.measures[0] == contest.measures[1]
        assert same == (name in ("popularity", "item_knn", "item_knn_plain")), "the models' seeds differ"
    assert result.contests["popularity"].note.startswith("half-life ")
    plain = result.to_dict()
    one = [m.recall_at_10 for m in result.contests["default"].measures]
    assert plain["contestants"]["default"]["measures"]["recall_at_10"]["mean"] == np.mean(one)
    assert plain["clicks"] == 300
    assert len(plain["drift_over_time"]) == 19
