"""The quality and freshness benchmarks, on small data of the same form."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.freshness import EVERY, NEVER, serve
from benchmarks.quality import IDS_ALONE, ML_100K, SETS, VARIANTS, evaluate_set, open_sets, rows_of, settings_of
from streamtower.evaluate.contest import TowersContestant, run
from streamtower.evaluate.evaluation import STRICT
from streamtower.evaluate.measures import NAMES
from tests.streamtower.evaluate.clicks_at_hand import TRAINER, random_dataset, random_stream


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files in the form of the public sets, and a wheel."""
    [piece] = random_dataset(300).clicks()
    rows = list(zip(piece.user_id.to_pylist(), piece.item_id.to_pylist(), piece.event_time.tolist(), strict=True))
    lines = "".join(f"{user},{item},{time:.0f}\n" for user, item, time in rows)
    items = "".join(f"i{number},word of i{number}\n" for number in range(40))
    for folder, clicks, feature in (("opam", "first_links", "tags"), ("movietweetings", "events", "title")):
        (tmp_path / folder).mkdir()
        kinds = {"tags": "synopsis,description,tags", "title": "title,category"}[feature]
        extra = "," * kinds.count(",")
        for name, text in (
            (clicks, "user,item,ts\n" + lines),
            ("items", f"item,{kinds}\n" + items.replace(",word", f"{extra},word")),
        ):
            (tmp_path / folder / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    tabbed = "".join(f"{user}\t{item}\t5\t{time:.0f}\n" for user, item, time in rows)
    with zipfile.ZipFile(tmp_path / "recbole.whl", "w") as wheel:
        header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        wheel.writestr(ML_100K + "inter", header + tabbed)
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        wheel.writestr(ML_100K + "item", header + "".join(f"i{i}\tToy\t1995\tAnimation\n" for i in range(40)))
    return tmp_path


def test_every_set_is_read_whole_and_its_files_are_gone_afterwards(data: Path) -> None:
    with open_sets(data, SETS, data / "recbole.whl") as sets:
        assert list(sets) == list(SETS)
        for open_seed in sets.values():
            dataset = open_seed(0)
            assert (dataset.num_clicks, dataset.num_items, dataset.num_skipped) == (300, 40, 0)
            orders = [[e.item_id for piece in open_seed(seed).clicks() for e in piece.events()] for seed in (0, 0, 1)]
            assert orders[0] == orders[1] != orders[2], "ties are shuffled by the seed"
    with pytest.raises(Exception, match="cannot be read"):
        sets["ml-100k"](0)


def test_rows_name_set_contestant_measure_and_statistic(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMTOWER_TRAINER_ITEM_ROWS", "1024")
    with open_sets(data, ["opam"]) as sets:
        result = evaluate_set(sets["opam"], ["default", IDS_ALONE], ["popularity"], [0, 1])
    rows = {row.name: row.value for row in rows_of("opam", result)}
    assert {name.split(".")[2] for name in rows} == {"default", "default" + STRICT, IDS_ALONE, "popularity"}
    assert len(rows) == 4 * (2 * len(NAMES) + 1)
    both = [m.recall_at_100 for m in result.contests["default"].measures]
    assert rows["quality.opam.default.recall_at_100.mean"] == np.mean(both)
    assert rows["quality.opam.default.recall_at_100.std"] == np.std(both, ddof=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_differs_from_the_default(data: Path, variant: str) -> None:
    with open_sets(data, ["opam"]) as sets:
        dataset = sets["opam"](0)
    default, other = settings_of(dataset, "default"), settings_of(dataset, variant)
    assert (other == default) == (variant == "default")
    assert bool(other.features) == (variant != IDS_ALONE)


def test_what_serves_is_as_good_as_it_is_fresh() -> None:
    clicks = random_stream(800)
    ranks = serve(clicks, TRAINER.model_copy(update={"refresh_clicks": 16}), [1, 100], {})
    settings = TRAINER.model_copy(update={"refresh_clicks": 16})  # so that the contest renews by micro-batch, too
    second_half = run(TowersContestant(clicks, settings, {}), clicks.batches).seen.rank[400:]
    assert ranks[EVERY].tolist() == ranks["every_1_clicks"].tolist() == second_half.tolist()
    # Until the first renewal after the middle, all copies are the model as it was there.
    first = slice(0, 96)
    assert ranks["every_100_clicks"][first].tolist() == ranks[NEVER][first].tolist()
    assert ranks["every_100_clicks"][first].tolist() != ranks[EVERY][first].tolist()
    assert ranks["every_100_clicks"].tolist() != ranks[NEVER].tolist()
    assert {len(found) for found in ranks.values()} == {400}
