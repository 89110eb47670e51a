"""The demo's summary and its views: every field by value, unknown ones as null and as a dash."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console

from streamtower.asking import lines_for
from streamtower.dashboard import Dashboard, View
from streamtower.figures import Figures
from streamtower.summary import document, show

UNKNOWN = Figures(**{field.name: math.nan for field in fields(Figures)})
SEEN = replace(
    UNKNOWN,
    clicks_learnt=900.0,
    clicks_dead_lettered=40.0,
    micro_batches=7.0,
    steps=28.0,
    loss_first=5.5,
    loss=4.25,
    recall_at_10=0.1,
    recall_at_100=0.25,
    popularity_recall_at_10=0.05,
    popularity_recall_at_100=0.125,
    frequency_drift=0.0625,
    items_published=1234.0,
    index_version=3.0,
    click_to_servable_p50_seconds=1.5,
    click_to_servable_p95_seconds=2.5,
)
EXAMPLE = {
    "user_id": "anna",
    "history": [{"item_id": "1", "name": "TEA"}, {"item_id": "2", "name": "CUP"}],
    "candidates": [{"item_id": "3", "name": "POT", "score": 1.0}],
    "most_popular": [{"item_id": "4"}],
}


def test_the_document_adds_up_and_holds_json_alone() -> None:
    written = json.loads(json.dumps(document(SEEN, 1_000, EXAMPLE, seed=7), allow_nan=False))
    assert written.pop("candidates_example") == EXAMPLE
    assert written == {
        "schema": "streamtower.demo/1",
        "clicks_produced": 1_000,
        "clicks_learnt": 900,
        "clicks_dead_lettered": 40,
        "clicks_in_flight": 60,
        "micro_batches": 7,
        "steps": 28,
        "loss_first": 5.5,
        "loss_last": 4.25,
        "recall_at_10": 0.1,
        "recall_at_100": 0.25,
        "popularity_recall_at_10": 0.05,
        "popularity_recall_at_100": 0.125,
        "frequency_drift": 0.0625,
        "items_known": None,
        "items_published": 1234,
        "index_version": 3,
        "click_to_servable_p50_seconds": 1.5,
        "click_to_servable_p95_seconds": 2.5,
        "seed": 7,
    }


def test_a_summary_of_nothing_is_still_one() -> None:
    written = document(UNKNOWN, 5, None)
    assert (written["clicks_in_flight"], written["loss_last"], written["candidates_example"]) == (5, None, None)
    show(written, Console(file=io.StringIO()))


def test_people_see_the_sum_and_the_names() -> None:
    shown = io.StringIO()
    show(document(SEEN, 1_000, EXAMPLE), Console(file=shown, width=120))
    text = shown.getvalue()
    assert "1,000 produced = 900 learnt + 40 dead-lettered + 60 in flight" in text
    assert "5.500 → 4.250" in text
    assert "recall@100" in text and "0.250, popularity 0.125" in text
    assert text.index("2 CUP") < text.index("1 TEA")  # the newest first


LINES = lines_for("http://127.0.0.1:8080", "http://127.0.0.1:6333", "items", "anna", "tea")


def view(seconds: float, figures: Figures = SEEN) -> View:
    return View(seconds, figures, clicks_produced=1_000, produced_rate=200.0, learnt_rate=150.0)


def test_without_a_terminal_there_is_a_line_every_five_seconds() -> None:
    shown = io.StringIO()
    with Dashboard(Console(file=shown, width=80), LINES) as dashboard:
        for tenths in range(0, 125, 5):
            dashboard.show(view(tenths / 10), can_ask=tenths >= 60)
    lines = shown.getvalue().splitlines()
    numbers = [line for line in lines if " s  in " in line]
    assert [line.split()[0] for line in numbers] == ["0", "5", "10"]
    assert "in 200/s  learnt 150/s  lag –+–  loss 4.250  drift 0.062  recall@10 0.100 (0.050)" in numbers[0]
    # How to ask is said once, unbroken, when asking works.
    assert lines.count(LINES["curl"]) == 1
    assert lines.index(LINES["curl"]) == 2


def test_on_a_terminal_there_is_one_table_and_how_to_ask_below() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=160, height=60, color_system=None)
    with Dashboard(console, LINES) as dashboard:
        dashboard.show(view(1.0, UNKNOWN), can_ask=False)
        assert "curl" not in shown.getvalue()
        dashboard.show(view(2.0), can_ask=True)
    text = shown.getvalue()
    for part in ("clicks in", "frequency drift", "0.062", "recall@100", "click to servable", "2.5 s", LINES["curl"]):
        assert part in text


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "http://127.0.0.1:4321"])
def test_the_line_for_the_command_names_the_url_only_where_it_must(url: str) -> None:
    line = lines_for(url, "http://q", "items", "anna", "tea")["streamtower"]
    assert line.endswith("streamtower query anna -k 5" + ("" if url.endswith("8080") else f" --url {url}"))


def test_the_command_is_named_as_the_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "streamtower").write_text("#!/bin/sh\n")
    (scripts / "streamtower").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))

    def first_word() -> str:
        return lines_for("http://r", "http://q", "items", "anna", "tea")["streamtower"].split()[0]

    monkeypatch.setenv("PATH", "/nowhere")
    assert first_word() == str(scripts / "streamtower")
    monkeypatch.chdir(tmp_path)
    assert first_word() == ".venv/bin/streamtower"
    monkeypatch.setenv("PATH", str(scripts))
    assert first_word() == "streamtower"
