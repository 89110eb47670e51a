"""`streamtower evaluate`: options in, table, JSON and report out.

Station: the command line's part of the evaluation. Everything that loads much is imported when the command runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from streams.service import EXIT_CONFIGURATION, ConfigurationError
from streamtower.evaluate.extra import MissingExtraError, require
from streamtower.options import (
    ContextColumns,
    Data,
    ItemColumn,
    Kinds,
    RewardColumn,
    TimeColumn,
    UserColumn,
    columns,
    fail,
    name_and_value,
)

if TYPE_CHECKING:
    from streams.settings import StreamsSettings
    from streamtower.datasets.clicks import Dataset

SCHEMA = "streamtower.evaluate/1"
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
Begin = Callable[[str, int], Callable[[int], object]]


def evaluate(
    clicks: Annotated[
        str, typer.Argument(help=".csv[.gz], .tsv[.gz], .parquet or .jsonl[.gz]; or completejourney or synthetic.")
    ],
    items: Data = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help="Preset of trainer and streams: default or paper; may be repeated. Their variables count too."
        ),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="With commas: popularity, item_knn, item_knn_plain, als; or none. Default: all there are."),
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Also with histories of earlier moments only, where times are coarse.")
    ] = True,
    protocol: Annotated[
        Literal["prequential", "sequential"],
        typer.Option(help="Test on every click, or by day as the paper does, beside a frozen model."),
    ] = "prequential",
    first_day: Annotated[
        int, typer.Option(min=1, help="sequential: the first day, from 0, of which clicks are held out.")
    ] = 15,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs with other random choices.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many clicks alone.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write what came out to this file.", metavar="FILE")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page with plots into this directory.", metavar="DIR")
    ] = None,
    user: UserColumn = None,
    item: ItemColumn = None,
    time: TimeColumn = None,
    reward: RewardColumn = None,
    context: ContextColumns = None,
    kind: Kinds = None,
) -> None:
    """Replay a file's clicks through the code of the services, and say how well each click was foreseen."""
    from streamtower.datasets.clicks import DatasetError
    from streamtower.datasets.sources import open_dataset

    kinds = dict(name_and_value(pair, "--kind") for pair in kind or [])

    def open_seed(seed: int) -> Dataset:
        dataset = open_dataset(
            clicks, items=items, columns=columns(user, item, time, reward, context), kinds=kinds,
            num_clicks=limit, seed=seed,
        )  # fmt: skip
        return dataset.first(limit) if limit else dataset

    try:
        if report is not None:
            require("the report's plot", "matplotlib")
        chosen = _chosen_baselines(baselines) if protocol == "prequential" else []
        document = _run(open_seed, preset or [], chosen, strict, protocol, first_day, seeds)
    except DatasetError as error:
        fail(str(error), EXIT_USAGE)
    except ConfigurationError as error:
        fail("; ".join(error.problems), EXIT_CONFIGURATION)
    except MissingExtraError as error:
        fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    if report is not None:
        from streamtower.evaluate.report import write_report

        write_report(document, report)
    from rich.console import Console

    from streamtower.evaluate.report import show

    show(document, Console())


def _chosen_baselines(wished: str | None) -> list[str]:
    from streamtower.evaluate.evaluation import BASELINES

    if wished is None:
        try:
            require("the baseline als", "implicit")
        except MissingExtraError as error:
            typer.echo(f"streamtower: als is left out: {error}", err=True)
            return [name for name in BASELINES if name != "als"]
        return list(BASELINES)
    names = [name for name in wished.split(",") if name and name != "none"]
    if unknown := [name for name in names if name not in BASELINES]:
        raise typer.BadParameter(f"--baselines: {', '.join(unknown)} is none of {', '.join(BASELINES)}")
    if "als" in names:
        require("the baseline als", "implicit")
    return names


def _run(
    open_seed: Callable[[int], Dataset],
    presets: list[str],
    baselines: list[str],
    strict: bool,
    protocol: str,
    first_day: int,
    seeds: int,
) -> dict[str, Any]:
    from streams.service import load_settings
    from streams.settings import StreamsSettings
    from streamtower.evaluate.evaluation import evaluate_contest, streams_beside, trainer_settings

    first = open_seed(0)
    models = {preset: trainer_settings(first, preset=preset) for preset in presets}
    if not models:
        settings = trainer_settings(first)
        models, presets = {settings.preset: settings}, [settings.preset]
    streams = load_settings(StreamsSettings)
    _set_threads(next(iter(models.values())).num_threads)
    with _shown() as begin:
        if protocol == "sequential":
            settings = models[presets[0]]
            document = _run_by_day(open_seed, streams_beside(settings, streams), settings, first_day, seeds, begin)
        else:
            result = evaluate_contest(
                open_seed,
                streams,
                models,
                baselines=baselines,
                seeds=range(seeds),
                strict=presets[:1] if strict else (),
                begin=begin,
            )
            document = result.to_dict()
    return {"schema": SCHEMA, "dataset": first.name, "skipped": first.num_skipped, "presets": presets} | document


def _run_by_day(
    open_seed: Callable[[int], Dataset],
    streams: StreamsSettings,
    settings: Any,
    first_day: int,
    seeds: int,
    begin: Begin,
) -> dict[str, Any]:
    from streamtower.evaluate.contest import item_changes
    from streamtower.evaluate.sequential import evaluate_by_day, summary

    results = []
    for seed in range(seeds):
        dataset = open_seed(seed)
        results.append(
            evaluate_by_day(
                dataset,
                streams,
                settings.model_copy(update={"seed": seed}),
                item_changes(dataset),
                first_day=first_day,
                seed=seed,
                progress=begin("by day", dataset.num_clicks),
            )
        )
    return summary(results, first_day)


def _set_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)


@contextmanager
def _shown() -> Iterator[Begin]:
    """A progress bar for each contestant, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:

        def begin(name: str, num_clicks: int) -> Callable[[int], object]:
            task = bar.add_task(name, total=num_clicks)
            return lambda done: bar.advance(task, done)

        yield begin
