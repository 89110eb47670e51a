"""An evaluation as a table for people, and as a page with plots.

Station: at the end of an evaluation. matplotlib, of the extra `evaluate`, is loaded by the plots alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from streamtower.evaluate.evaluation import NUM_PARTS

PAGE, PLOT = "report.md", "recall_over_time.png"
COLUMNS = {
    "recall_at_10": "R@10",
    "recall_at_50": "R@50",
    "recall_at_100": "R@100",
    "ndcg_at_10": "NDCG@10",
    "mrr": "MRR",
    "coverage_at_10": "coverage",
    "tail_ratio_at_10": "long tail",
    "cold_recall_at_10": "cold R@10",
    "cold_recall_at_100": "cold R@100",
    "ceiling": "ceiling",
}
SHORT = ("recall_at_10", "recall_at_100", "ndcg_at_10", "cold_recall_at_100")
"""What fits a terminal."""
LEGEND = f"""\
- **R@K**: share of the clicks of the second half whose item was among the K best candidates, ranked before the click
  was learnt. Candidates are all items clicked before the click's block, except those of the user's history; equal
  scores count by their expected rank.
- **ceiling**: share of those clicks whose item was a candidate: no ranking can hit more.
- **coverage**, **long tail**: share of all items that were among the 10 best of any click; share of items outside the
  most clicked fifth among the 10 best.
- **cold**: clicks on items with fewer than 5 clicks before the block, never-seen items (always a miss) included.
- Names that end in `_strict`: histories hold clicks of earlier moments only.
- The plot shows means over {NUM_PARTS} stretches of the stream, first half included.
"""


def show(document: Mapping[str, Any], console: Console) -> None:
    """The table for people."""
    if document["protocol"] == "sequential":
        rows = _daily_rows(document)
        table = Table("", *(f"R@{k}" for k in document["ks"]), title=_headline(document), title_justify="left")
    else:
        rows = _contest_rows(document, SHORT)
        table = Table("", *(COLUMNS[name] for name in SHORT), title=_headline(document), title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_report(document: Mapping[str, Any], directory: Path) -> None:
    """Writes the page and its plot into a directory, which is made where it is missing."""
    directory.mkdir(parents=True, exist_ok=True)
    if document["protocol"] == "sequential":
        header, rows = ["", *(f"R@{k}" for k in document["ks"])], _daily_rows(document)
        legend = (
            f"Trained in time order; from day {document['first_day']} on, {document['held_out_ratio']:.0%} of each "
            "day's clicks are held out, tested before their micro-batch, and never learnt. `frozen`: the model as it "
            "was when that day began. Means over days.\n"
        )
        figure = days_figure(document)
    else:
        header, rows, legend = ["", *COLUMNS.values()], _contest_rows(document), LEGEND
        figure = contest_figure(document)
    figure.savefig(directory / PLOT, dpi=120)
    lines = [f"# {_headline(document)}", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    lines += [_line(row) for row in rows]
    notes = [f"- {name}: {one['note']}" for name, one in document.get("contestants", {}).items() if one["note"]]
    lines += ["", f"![recall over time]({PLOT})", "", legend.rstrip(), *notes, ""]
    (directory / PAGE).write_text("\n".join(lines))


def _headline(document: Mapping[str, Any]) -> str:
    seeds = len(document["seeds"])
    return (
        f"{document['dataset']}: {document['clicks']:,} clicks, {document['items']:,} items, "
        f"{document['users']:,} users, {seeds} seed{'s' if seeds > 1 else ''}"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _contest_rows(document: Mapping[str, Any], columns: Iterable[str] = COLUMNS) -> list[list[str]]:
    return [
        [name, *(_cell(one["measures"][measure]) for measure in columns)]
        for name, one in document["contestants"].items()
    ]


def _daily_rows(document: Mapping[str, Any]) -> list[list[str]]:
    return [[which, *(_cell(document["means"][which][str(k)]) for k in document["ks"])] for which in document["means"]]


def _cell(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f}" + (f" ±{value['std']:.3f}" if value["std"] else "")


def contest_figure(document: Mapping[str, Any]) -> Any:
    """matplotlib's figure: each contestant's recall at 10 at the middles of the stretches, and drift at their ends."""
    figure, (above, below) = _figure()
    for name, one in document["contestants"].items():
        values = one["recall_at_10_over_time"]
        parts = [(part + 0.5) / len(values) * document["clicks"] for part in range(len(values))]
        above.plot(parts, values, label=name)
    above.axvline(document["clicks"] / 2, color="0.6", linestyle=":", linewidth=1)
    above.set_ylabel("recall at 10")
    above.set_ylim(bottom=0)
    above.legend(fontsize="small", ncols=2, frameon=False)
    drift = document["drift_over_time"]
    below.plot([(part + 1) / len(drift) * document["clicks"] for part in range(len(drift))], drift, color="0.3")
    below.set_ylabel("frequency drift")
    below.set_xlabel("clicks")
    below.set_ylim(bottom=0)
    return figure


def days_figure(document: Mapping[str, Any]) -> Any:
    """matplotlib's figure: recall of both models by day, and how many clicks each day's is of."""
    figure, (above, below) = _figure()
    days = [day["day"] for day in document["days"]]
    k = str(document["ks"][-1])
    for which in ("live", "frozen"):
        above.plot(days, [day[which][k] for day in document["days"]], label=which)
    above.set_ylabel(f"recall at {k}")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    below.bar(days, [day["num_tested"] for day in document["days"]], color="0.5")
    below.set_ylabel("tested clicks")
    below.set_xlabel("day")
    return figure


def _figure() -> Any:
    """Two plots above each other, made without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
