"""Options of the command line that several commands have.

Station: beside the command line; it reads nothing and loads nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

Data = Annotated[
    Path | None, typer.Option(help="File with a column for the item's id; its other columns are features.")
]
UserColumn = Annotated[str | None, typer.Option(help="Column of the user's id.")]
ItemColumn = Annotated[str | None, typer.Option(help="Column of the item's id.")]
TimeColumn = Annotated[str | None, typer.Option(help="Column of the time.")]
RewardColumn = Annotated[str | None, typer.Option(help="Column of the reward, ≥ 0.")]
ContextColumns = Annotated[
    list[str] | None, typer.Option(help="Column that is a feature of the query; may be repeated.")
]
Kinds = Annotated[
    list[str] | None,
    typer.Option(help="NAME=KIND of a context column or item feature: categorical, multi, text, number or item."),
]
Seed = Annotated[int, typer.Option(help="Of the order of one user's clicks at one moment, and of invented clicks.")]


def columns(user: str | None, item: str | None, time: str | None, reward: str | None, context: list[str] | None) -> Any:
    """`datasets.files.Columns`, or None where no option was given."""
    from streamtower.datasets.files import Columns

    given = Columns(user, item, time, reward, tuple(context or ()))
    return None if given == Columns() else given


def name_and_value(pair: str, option: str) -> tuple[str, str]:
    """Both sides of NAME=VALUE.

    Raises:
        typer.BadParameter: it is none.
    """
    name, equals, value = pair.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"{option} takes NAME=VALUE, not {pair!r}")
    return name, value


def fail(message: str, code: int) -> NoReturn:
    """A line on stderr, and the process ends with this code."""
    print(f"streamtower: {message}", file=sys.stderr)
    raise typer.Exit(code)
