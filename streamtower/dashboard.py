"""The demo's one live table, or a line every few seconds where nobody sits at a terminal.

Station: beside the data's way; it shows figures and computes none but rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from streamtower.figures import Figures

LINE_SECONDS = 5.0
"""Between two lines where there is no terminal."""


@dataclass(frozen=True)
class View:
    """What is shown at one moment."""

    seconds: float
    """Since the first click was sent."""
    figures: Figures
    clicks_produced: int
    produced_rate: float
    learnt_rate: float
    note: str = ""


class Dashboard:
    """Shows views until it is closed; `with` does so."""

    def __init__(self, console: Console, lines: Mapping[str, str]) -> None:
        """
        Args:
            console: on stderr; whether it is a terminal decides the form.
            lines: how to ask, as `streamtower.asking.lines_for` gives them.
        """
        self._console = console
        self._lines = lines
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._next_line = 0.0
        self._told_lines = False

    def __enter__(self) -> Dashboard:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, view: View, *, can_ask: bool) -> None:
        """Shows the view; the lines for asking once asking works."""
        if self._live:
            parts = [_table(view)]
            if can_ask:
                parts += [_how_to_ask(self._lines)]
            self._live.update(Group(*parts), refresh=True)
            return
        if can_ask and not self._told_lines:
            self._told_lines = True
            for line in self._lines.values():
                print(line, file=self._console.file)
        if view.seconds >= self._next_line:
            self._next_line = view.seconds + LINE_SECONDS
            print(_line(view), file=self._console.file, flush=True)


def _number(value: float, form: str = ",.0f") -> str:
    return "–" if math.isnan(value) else format(value, form)


def _table(view: View) -> RenderableType:
    f = view.figures
    table = Table(title=f"Streamtower, {view.seconds:.0f} s {view.note}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", min_width=12)
    table.add_column(style="dim")

    def row(name: str, value: str, meaning: str) -> None:
        table.add_row(name, value, meaning)

    row("clicks in", f"{_number(view.produced_rate)}/s", f"{view.clicks_produced:,} so far, into topic clicks")
    row("clicks learnt", f"{_number(view.learnt_rate)}/s", f"{_number(f.clicks_learnt)} so far")
    row("dead letters", _number(f.clicks_dead_lettered), "clicks that were refused, kept with the reason")
    row(
        "lag",
        _number(f.lag_clicks),
        f"clicks wait for streams, {_number(f.lag_micro_batches)} micro-batches for the trainer",
    )
    row("loss", _number(f.loss, ".3f"), f"{_number(f.loss_first, '.3f')} at first; over the last 100 micro-batches")
    row("frequency drift", _number(f.frequency_drift, ".3f"), "how far the items' shares of clicks have moved, 0–1")
    row("recall@10", _number(f.recall_at_10, ".3f"), f"live popularity {_number(f.popularity_recall_at_10, '.3f')}; "
        "tested before learnt")  # fmt: skip
    row("recall@100", _number(f.recall_at_100, ".3f"), f"live popularity {_number(f.popularity_recall_at_100, '.3f')}")
    row("items published", _number(f.items_published), f"{_number(f.items_known)} items are known")
    row("index version", _number(f.index_version), "the collection that the alias names now")
    row("click to servable", f"{_number(f.click_to_servable_p95_seconds, '.1f')} s", "p95, from Kafka to the index")
    return table


def _how_to_ask(lines: Mapping[str, str]) -> RenderableType:
    shell = "\n".join(line for name, line in lines.items() if name != "python")
    return Group(
        Text("\nAsk it, from another terminal:", style="bold"),
        Syntax(shell, "bash", word_wrap=True, background_color="default"),
        Syntax(lines["python"], "python", word_wrap=True, background_color="default"),
    )


def _line(view: View) -> str:
    f = view.figures
    return (
        f"{view.seconds:5.0f} s  in {_number(view.produced_rate)}/s  learnt {_number(view.learnt_rate)}/s  "
        f"lag {_number(f.lag_clicks)}+{_number(f.lag_micro_batches)}  loss {_number(f.loss, '.3f')}  "
        f"drift {_number(f.frequency_drift, '.3f')}  "
        f"recall@10 {_number(f.recall_at_10, '.3f')} ({_number(f.popularity_recall_at_10, '.3f')})  "
        f"@100 {_number(f.recall_at_100, '.3f')} ({_number(f.popularity_recall_at_100, '.3f')})  "
        f"published {_number(f.items_published)}  version {_number(f.index_version)}  "
        f"servable p95 {_number(f.click_to_servable_p95_seconds, '.1f')} s{'  ' + view.note if view.note else ''}"
    )
