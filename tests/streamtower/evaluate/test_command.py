"""`streamtower evaluate` from the command line to JSON and report."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from streams.contract import hash_ids
from streams.drift import DriftTracker, frequency_drift
from streamtower.__main__ import app
from streamtower.datasets.sources import open_dataset
from tests.streamtower.evaluate.clicks_at_hand import random_dataset

WINDOWS = {"fast_clicks": 100, "slow_clicks": 500}
SMALL = {"COLUMNS": "200", "STREAMTOWER_TRAINER_ITEM_ROWS": "1024", "STREAMTOWER_TRAINER_MAX_ITEMS": "1000"} | {
    f"STREAMTOWER_STREAMS_DRIFT_{name.upper()}": str(clicks) for name, clicks in WINDOWS.items()
}


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", *arguments], env=SMALL)


def take_away(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    path = tmp_path / "clicks.csv"
    [piece] = random_dataset(900, num_items=150, seconds_a_click=1_000).clicks()
    items = [item if n < 600 else f"i{int(item[1:]) % 75}" for n, item in enumerate(piece.item_id.to_pylist())]  # drift
    columns = zip(piece.user_id.to_pylist(), items, piece.event_time.tolist(), strict=True)
    path.write_text("user_id,item_id,event_time\n" + "".join(f"{u},{i},{t:.0f}\n" for u, i, t in columns))
    return path


def drifts(path: Path, seed: int, ends: list[int]) -> list[float]:
    """The drift after so many clicks of the file, its ties shuffled by the seed."""
    [piece] = open_dataset(str(path), seed=seed).clicks()
    item_hash, tracker, found = hash_ids(piece.item_id.to_pylist()), DriftTracker(**WINDOWS), []
    for start, end in itertools.pairwise([0, *ends]):
        tracker.update(item_hash[start:end])
        found.append(frequency_drift([tracker]).corrected)
    return found


def test_a_file_is_evaluated_against_every_baseline_with_json_and_report(clicks: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("implicit")
    items = tmp_path / "items.csv"
    items.write_text("item_id,brand\n" + "".join(f"i{number},b{number % 5}\n" for number in range(150)))
    target, report = tmp_path / "out.json", tmp_path / "report"
    done = evaluate(str(clicks), "--items", str(items), "--seeds", "2", "--json", str(target), "--report", str(report))
    assert done.exit_code == 0, done.stderr
    document = json.loads(target.read_text())
    assert document["schema"] == "streamtower.evaluate/1"
    assert (document["clicks"], document["seeds"], document["has_ties"]) == (900, [0, 1], True)
    moved = drifts(clicks, seed=1, ends=[256, 512, 768, 900])
    assert document["drift_over_time"] == pytest.approx(moved)
    assert moved[0] < 0.1 < moved[2], moved
    names = ["default", "default_strict", "popularity", "item_knn", "item_knn_plain", "als"]
    assert list(document["contestants"]) == names
    for name in names:
        measured = {k: v["mean"] for k, v in document["contestants"][name]["measures"].items()}
        assert 0 < measured["recall_at_10"] <= measured["recall_at_50"] <= measured["recall_at_100"]
        assert measured["recall_at_100"] <= measured["ceiling"] <= 1
        assert 0 < measured["ndcg_at_10"] <= measured["recall_at_10"]
        assert len(document["contestants"][name]["recall_at_10_over_time"]) == 40
        assert name in done.stdout
    page = (report / "report.md").read_text()
    assert f"| default | {document['contestants']['default']['measures']['recall_at_10']['mean']:.3f}" in page
    assert (report / "recall_over_time.png").read_bytes().startswith(b"\x89PNG")


def test_by_day_it_stands_beside_a_frozen_model(clicks: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "out.json"
    done = evaluate(
        str(clicks), "--protocol", "sequential", "--first-day", "3", "--seeds", "1", "--json", str(target), "--report",
        str(tmp_path),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    document = json.loads(target.read_text())
    assert document["protocol"] == "sequential"
    assert [day["day"] for day in document["days"]] == list(range(3, 11))
    assert set(document["means"]) == {"live", "frozen"}
    assert "frozen" in done.stdout
    assert (tmp_path / "recall_over_time.png").read_bytes().startswith(b"\x89PNG")


def test_by_day_too_the_papers_preset_brings_the_papers_frequency_estimate(
    clicks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMTOWER_TRAINER_HIDDEN", "[16]")
    means = []
    for settings in (
        {},
        {"PRESET": "paper"},
        {"ESTIMATOR_MODE": "click", "ESTIMATOR_INITIAL_GAP": "0", "NUM_HASHES": "4"},
    ):
        for name, value in settings.items():
            monkeypatch.setenv(f"STREAMTOWER_STREAMS_{name}", value)
        arguments = ["--preset", "paper", "--protocol", "sequential", "--first-day", "3", "--seeds", "1"]
        done = evaluate(str(clicks), *arguments, "--json", str(tmp_path / "out.json"))
        assert done.exit_code == 0, done.stderr
        means.append(json.loads((tmp_path / "out.json").read_text())["means"]["live"])
    assert means[0] == means[1] != means[2]


def test_a_limit_takes_the_first_clicks(clicks: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    done = evaluate(
        str(clicks), "--limit", "300", "--seeds", "1", "--baselines", "none", "--no-strict", "--json", str(target)
    )
    assert done.exit_code == 0, done.stderr
    document = json.loads(target.read_text())
    assert document["clicks"] == 300
    assert list(document["contestants"]) == ["default"]


def test_without_implicit_als_is_left_out_and_says_so(clicks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_away("implicit", monkeypatch)
    done = evaluate(str(clicks), "--limit", "64", "--seeds", "1")
    assert done.exit_code == 0, done.stderr
    said = "als is left out: the baseline als needs implicit: pip install 'streamtower[evaluate]'"
    assert said in done.stderr
    assert "item_knn" in done.stdout
    assert "als" not in done.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "without", "code", "said"),
    [
        (["--baselines", "als"], "implicit", 2, "the baseline als needs implicit: pip install"),
        (["--report", "r"], "matplotlib", 2, "the report's plot needs matplotlib: pip install"),
        (["--baselines", "oracle"], "", 2, "oracle is none of popularity"),
        (["--preset", "magic"], "", 78, "STREAMTOWER_TRAINER_PRESET"),
        (["--protocol", "sequential", "--first-day", "99"], "", 2, "no clicks after day 99"),
        (["--items", "nowhere.csv"], "", 2, "nowhere.csv cannot be read"),
    ],
)
def test_what_goes_wrong_is_an_exit_code_and_a_line_on_stderr(
    clicks: Path, arguments: list[str], without: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without:
        take_away(without, monkeypatch)
    done = evaluate(str(clicks), *arguments)
    assert done.exit_code == code
    assert said in done.stderr
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
