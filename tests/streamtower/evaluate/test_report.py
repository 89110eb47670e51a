"""The report by value: what its plots and its page show is what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamtower.evaluate.measures import NAMES
from streamtower.evaluate.report import COLUMNS, PAGE, PLOT, contest_figure, days_figure, write_report

pytest.importorskip("matplotlib")


def contestant(first: float, recalls: list[float], note: str = "") -> dict[str, Any]:
    measures = {name: {"mean": first + place / 100, "std": 0.0} for place, name in enumerate(NAMES)}
    measures["recall_at_10"]["std"] = 0.013
    return {"measures": measures, "recall_at_10_over_time": recalls, "processor_seconds": 1.0, "note": note}


CONTEST: dict[str, Any] = {
    "protocol": "prequential",
    "dataset": "planted",
    "clicks": 1_000,
    "items": 50,
    "users": 20,
    "seeds": [0, 1],
    "drift_over_time": [0.0, 0.125, 0.25, 0.5, 0.375],
    "contestants": {
        "default": contestant(0.2, [0.1, 0.2, 0.3, 0.4]),
        "popularity": contestant(0.1, [0.05, 0.1, 0.0, 0.2], "half-life 200 clicks"),
    },
}
DAYS: dict[str, Any] = {
    "protocol": "sequential",
    "dataset": "planted",
    "clicks": 1_000,
    "items": 50,
    "users": 20,
    "seeds": [0],
    "ks": [10, 50],
    "first_day": 3,
    "held_out_ratio": 0.1,
    "days": [
        {"day": 3, "num_tested": 7, "live": {"10": 0.2, "50": 0.5}, "frozen": {"10": 0.1, "50": 0.4}},
        {"day": 5, "num_tested": 9, "live": {"10": 0.3, "50": 0.75}, "frozen": {"10": 0.0, "50": 0.25}},
    ],
    "means": {
        "live": {"10": {"mean": 0.25, "std": 0.0}, "50": {"mean": 0.625, "std": 0.0}},
        "frozen": {"10": {"mean": 0.05, "std": 0.0}, "50": {"mean": 0.325, "std": 0.0}},
    },
}


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Label → x and y of each line of a plot."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_the_plot_shows_each_contestants_recall_and_the_drift_over_the_clicks() -> None:
    above, below = contest_figure(CONTEST).axes
    drawn = lines(above)
    assert drawn["default"] == ([125.0, 375.0, 625.0, 875.0], [0.1, 0.2, 0.3, 0.4])
    assert drawn["popularity"] == ([125.0, 375.0, 625.0, 875.0], [0.05, 0.1, 0.0, 0.2])
    (middle,) = [x for label, (x, _) in drawn.items() if label not in CONTEST["contestants"]]
    assert middle == [500.0, 500.0]
    (drift,) = lines(below).values()
    assert drift == ([200.0, 400.0, 600.0, 800.0, 1_000.0], CONTEST["drift_over_time"])


def test_the_plot_by_day_shows_both_models_and_how_much_was_tested() -> None:
    above, below = days_figure(DAYS).axes
    assert lines(above) == {"live": ([3, 5], [0.5, 0.75]), "frozen": ([3, 5], [0.4, 0.25])}
    assert [(bar.get_center()[0], bar.get_height()) for bar in below.patches] == [(3.0, 7.0), (5.0, 9.0)]


def test_the_page_has_every_measure_of_every_contestant_and_names_the_plot(tmp_path: Path) -> None:
    write_report(CONTEST, tmp_path / "report")
    page = (tmp_path / "report" / PAGE).read_text().splitlines()
    assert page[0] == "# planted: 1,000 clicks, 50 items, 20 users, 2 seeds"
    assert page[2] == "| " + " | ".join(["", *COLUMNS.values()]) + " |"
    for row, first, name in ((page[4], 0.2, "default"), (page[5], 0.1, "popularity")):
        means = {measure: f"{first + place / 100:.3f}" for place, measure in enumerate(NAMES)}
        means["recall_at_10"] += " ±0.013"
        assert row == "| " + " | ".join([name, *(means[measure] for measure in COLUMNS)]) + " |"
    assert f"![recall over time]({PLOT})" in page
    assert "- popularity: half-life 200 clicks" in page
    assert (tmp_path / "report" / PLOT).read_bytes().startswith(b"\x89PNG")
