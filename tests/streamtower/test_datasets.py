"""Data sets: what a row of a file becomes, by value; what is invented, and what the public one holds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streams.contract import ClickEvent, ItemEvent
from streamtower.datasets.clicks import Clicks, Dataset, DatasetError, time_order
from streamtower.datasets.completejourney import completejourney_dataset
from streamtower.datasets.files import Columns, file_dataset
from streamtower.datasets.sources import open_dataset
from streamtower.datasets.synthetic import NUM_TASTES, synthetic_dataset


def events(dataset: Dataset) -> list[ClickEvent]:
    return [event for piece in dataset.clicks() for event in piece.events()]


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


CSV = "user_id,item_id,ts,device,price\nanna,tea,30,phone,1.5\nbert,007,10,,2\nanna,cup,20,desktop,\n"
EXPECTED = [("bert", "007", 10.0), ("anna", "cup", 20.0), ("anna", "tea", 30.0)]


def plain(clicks: list[ClickEvent]) -> list[tuple[str, str, float]]:
    return [(click.user_id, click.item_id, click.event_time) for click in clicks]


@pytest.mark.parametrize("name", ["clicks.csv", "clicks.csv.gz"])
def test_csv_comes_in_time_order_with_ids_as_written(tmp_path: Path, name: str) -> None:
    assert plain(events(file_dataset(write(tmp_path / name, CSV)))) == EXPECTED


def test_tab_separated_values_too(tmp_path: Path) -> None:
    assert plain(events(file_dataset(write(tmp_path / "clicks.tsv", CSV.replace(",", "\t"))))) == EXPECTED


def test_parquet_with_numbers_for_ids(tmp_path: Path) -> None:
    table = pa.table({"user": [1, 2], "item": pa.array([10.0, None]), "timestamp": pa.array([5, 6], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "clicks.parquet")
    dataset = file_dataset(tmp_path / "clicks.parquet")
    assert plain(events(dataset)) == [("1", "10", 5.0)]
    assert (dataset.num_clicks, dataset.num_skipped) == (1, 1)


@pytest.mark.parametrize("name", ["clicks.jsonl", "clicks.jsonl.gz"])
def test_json_lines_in_the_form_of_click_events(tmp_path: Path, name: str) -> None:
    rows = [
        {"user_id": "anna", "item_id": 7, "event_time": 2.5, "context": {"device": "phone"}, "reward": 2},
        {"user_id": "bert", "item_id": 8, "event_time": 1.5, "context": {"device": None}, "reward": 0.5},
    ]
    path = write(tmp_path / name, "".join(json.dumps(row) + "\n" for row in rows))
    dataset = file_dataset(path, Columns(context=("device",)))
    assert events(dataset) == [
        ClickEvent("bert", "8", 1.5, reward=0.5),
        ClickEvent("anna", "7", 2.5, reward=2.0, context={"device": "phone"}),
    ]


def test_columns_may_have_any_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "who,what,when,weight\n01,2,3,4\n")
    dataset = file_dataset(path, Columns(user="who", item="what", time="when", reward="weight"))
    assert events(dataset) == [ClickEvent("01", "2", 3.0, reward=4.0)]


def test_context_columns_become_features_of_the_query(tmp_path: Path) -> None:
    dataset = file_dataset(write(tmp_path / "c.csv", CSV), Columns(context=("device", "price")))
    assert [event.context for event in events(dataset)] == [
        {"price": 2.0},
        {"device": "desktop"},
        {"device": "phone", "price": 1.5},
    ]
    assert dataset.context_features == {"device": "categorical", "price": "number"}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1700000000", 1_700_000_000.0),
        ("1700000000.25", 1_700_000_000.25),
        ("1700000000250", 1_700_000_000.25),
        ("1700000000250000", 1_700_000_000.25),
        ("1700000000250000000", 1_700_000_000.25),
        ("2023-11-14T22:13:20Z", 1_700_000_000.0),
        ("2023-11-14T23:13:20.5+01:00", 1_700_000_000.5),
        ("2023-11-14 22:13:20", 1_700_000_000.0),
        ("2023-11-14", 1_699_920_000.0),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_time_may_be_written_in_many_ways(tmp_path: Path, written: str, seconds: float, ending: str) -> None:
    if ending == "csv":
        path = write(tmp_path / "t.csv", f"user,item,ts\na,b,{written}\n")
    else:
        value = json.loads(written) if written.replace(".", "").isdigit() else written
        path = write(tmp_path / "t.jsonl", json.dumps({"user": "a", "item": "b", "ts": value}) + "\n")
    assert events(file_dataset(path))[0].event_time == seconds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("who,item,ts\na,b,1\n", ["no column user_id or user for the user", "who, item, ts", "--user"]),
        ("user,what,ts\na,b,1\n", ["no column item_id or item for the item", "--item"]),
        ("user,item,when\na,b,1\n", ["no column event_time or ts or timestamp for the time", "--time"]),
        ("user,item,ts\na,b,yesterday\n", ["column ts holds no times"]),
        ("user,item,ts\na,,1\n", ["no row with user, item and time"]),
        ("user,item,ts,reward\na,b,1,-2\n", ["column reward", "negative"]),
        ("", ["cannot be read"]),
    ],
)
def test_an_unreadable_file_says_what_is_missing(tmp_path: Path, text: str, said: list[str]) -> None:
    with pytest.raises(DatasetError) as error:
        file_dataset(write(tmp_path / "bad.csv", text))
    for part in said:
        assert part in str(error.value)


def test_an_unknown_ending_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"\.parquet"):
        file_dataset(write(tmp_path / "clicks.xlsx", "x"))


def test_no_file_and_no_data_set_of_that_name() -> None:
    with pytest.raises(DatasetError, match="completejourney, synthetic"):
        open_dataset("nowhere.csv")


def test_options_for_files_are_refused_with_a_known_data_set() -> None:
    with pytest.raises(DatasetError, match="synthetic brings its items"):
        open_dataset("synthetic", columns=Columns(user="x"))


def test_users_of_one_moment_stay_in_the_files_order() -> None:
    user_id = pa.array(["b", "a", "c", "a", "b", "c"])
    order = time_order(user_id, np.array([2.0, 2.0, 1.0, 2.0, 2.0, 2.0]), np.random.default_rng(0))
    assert [user_id[int(row)].as_py() for row in order] == ["c", "b", "b", "a", "a", "c"]
    assert sorted(order[1:3].tolist()) == [0, 4]


def test_clicks_of_one_user_at_one_moment_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    rows = "".join(f"anna,{n:02},1\n" for n in range(20)) + "bert,first,0\nbert,last,2\n"
    path = write(tmp_path / "basket.csv", "user,item,ts\n" + rows)

    def order(seed: int) -> list[str]:
        return [event.item_id for event in events(file_dataset(path, seed=seed))]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert (order(0)[0], order(0)[-1]) == ("first", "last")
    assert sorted(order(0)[1:-1]) == [f"{n:02}" for n in range(20)] != order(0)[1:-1]


def test_items_bring_features_payload_and_kinds(tmp_path: Path) -> None:
    clicks = write(tmp_path / "c.csv", "user,item,ts\na,1,1\n")
    items = write(
        tmp_path / "i.jsonl",
        '{"item_id": 1, "title": "a pot of tea", "colour": "red", "price": 2.5, "tags": ["hot", "wet"]}\n'
        '{"item_id": 2, "title": "the second best cup", "colour": null, "price": null, "tags": []}\n',
    )
    dataset = file_dataset(clicks, items=items, kinds={"colour": "text"})
    known = {"title": "a pot of tea", "colour": "red", "price": 2.5, "tags": ["hot", "wet"]}
    assert list(dataset.items()) == [
        ItemEvent("1", known, known),
        ItemEvent("2", {"title": "the second best cup", "tags": []}, {"title": "the second best cup", "tags": []}),
    ]
    assert dataset.item_features == {"title": "text", "colour": "text", "price": "number", "tags": "multi"}
    assert (dataset.num_items, dataset.item_name) == (2, "title")


def test_items_may_be_written_as_item_events(tmp_path: Path) -> None:
    clicks = write(tmp_path / "c.csv", "user,item,ts\na,1,1\n")
    items = write(tmp_path / "i.jsonl", '{"item_id": "1", "features": {"colour": "red"}, "payload": {"stock": 3}}\n')
    dataset = file_dataset(clicks, items=items)
    assert list(dataset.items()) == [ItemEvent("1", {"colour": "red"}, {"stock": 3})]
    assert dataset.item_features == {"colour": "categorical"}


def test_a_kind_for_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="colour"):
        file_dataset(write(tmp_path / "c.csv", CSV), kinds={"colour": "text"})


def test_pieces_hold_all_rows_in_order() -> None:
    n = 20_000
    clicks = Clicks(pa.array(["u"] * n), pa.array([str(row) for row in range(n)]), np.arange(n, dtype=float))
    pieces = list(clicks.pieces())
    assert [len(piece) for piece in pieces] == [8192, 8192, 3616]
    assert [item for piece in pieces for item in piece.item_id.to_pylist()] == clicks.item_id.to_pylist()


def item_numbers(dataset: Dataset) -> np.ndarray:
    return np.array([int(item[5:]) for piece in dataset.clicks() for item in piece.item_id.to_pylist()])


def test_synthetic_clicks_are_the_same_for_the_same_seed() -> None:
    first, again, other = (
        events(synthetic_dataset(10_000, seed=seed, num_users=50, num_items=100)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert len(first) == 10_000


def test_synthetic_users_click_nine_in_ten_on_their_two_tastes() -> None:
    items = item_numbers(synthetic_dataset(100_000, num_users=1, num_items=4_000))
    shares = np.sort(np.bincount(items % NUM_TASTES, minlength=NUM_TASTES))[::-1] / 100_000
    # each taste of the user: .9 / 2 and its part of the strays, .1 / 40
    assert shares[:2] == pytest.approx([0.4525, 0.4525], abs=0.01)
    assert shares[2:].sum() == pytest.approx(0.1 * 38 / 40, abs=0.005)


def test_synthetic_popularity_falls_as_one_by_rank_and_is_dealt_anew_half_way() -> None:
    items = item_numbers(synthetic_dataset(200_000, num_users=1_000, num_items=400))
    halves = [np.bincount(half, minlength=400) for half in (items[:100_000], items[100_000:])]
    for counts in halves:
        by_rank = np.sort(counts.reshape(10, NUM_TASTES), axis=0)[::-1].sum(axis=1) / 100_000
        expected = (1 / np.arange(1, 11)) / (1 / np.arange(1, 11)).sum()
        assert by_rank == pytest.approx(expected, abs=0.01)
    favourites = [
        set(counts.reshape(10, NUM_TASTES).argmax(axis=0) * NUM_TASTES + range(NUM_TASTES)) for counts in halves
    ]
    # of 40 favourites dealt anew among 10 items a taste, 4 are expected to stay
    assert len(favourites[0] & favourites[1]) < 15


def test_synthetic_items_have_the_features_that_are_named() -> None:
    dataset = synthetic_dataset(10, num_users=5, num_items=80)
    items = list(dataset.items())
    assert [item.item_id for item in items] == [f"item-{n}" for n in range(80)]
    assert all(set(item.features) == set(dataset.item_features) for item in items)
    assert items[41].features["category"] == "category-1"


def test_completejourney_holds_all_purchases_and_is_read_from_the_cache_afterwards(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge", reason="the extra `embedded` brings the data")
    told: list[tuple[int, int]] = []
    dataset = completejourney_dataset(cache=tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    again = completejourney_dataset(cache=tmp_path, progress=lambda done, total: pytest.fail("written again"))
    assert dataset.num_clicks == again.num_clicks == 1_469_307
    first, same = next(dataset.clicks()), next(again.clicks())
    assert first.item_id.equals(same.item_id)
    assert len(first) == 8192
    context = {"store_id": "330", "hour": "11", "weekday": "Sun"}
    assert next(first.events()) == ClickEvent("900", "1095275", 1483271606.0, context=context)
    times = np.concatenate([piece.event_time for piece in dataset.clicks()])
    assert len(times) == dataset.num_clicks
    assert np.all(np.diff(times) >= 0)

    items = {item.item_id: item for item in dataset.items()}
    assert len(items) == dataset.num_items == 68_492
    texts = {
        "manufacturer": "2",
        "department": "GROCERY",
        "product_category": "FRZN ICE",
        "product_type": "ICE - CRUSHED/CUBED",
        "brand": "National",
        "package_size": "22 LB",
    }
    assert items["25671"] == ItemEvent("25671", texts, texts)
    assert set(texts) == set(dataset.item_features)
