"""`streamtower dead-letters list | replay`: the options and what is printed.

Station: between the command line and `dead_letters`, which does the work.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streams.contract import Topics
from streams.validate import Reason
from streamtower.connection import Kafka, Prefix, connection, exit_codes

if TYPE_CHECKING:
    from streamtower.dead_letters import DeadLetters, Letter

app = typer.Typer(help="Look at clicks that were rejected, or send them again.", no_args_is_help=True)

Reasons = Annotated[list[Reason] | None, typer.Option("--reason", help="Only those of this reason; may be repeated.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the broker.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("list")
def list_letters(
    reason: Reasons = None,
    limit: Annotated[int, typer.Option(min=0, max=10_000, help="Show so many of the newest.")] = 20,
    excerpt: Annotated[int, typer.Option(min=0, max=65_536, help="Show so many bytes of each value.")] = 200,
    kafka: Kafka = None,
    topic_prefix: Prefix = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Show why, where and when clicks were rejected, and how each begins."""
    with exit_codes():
        listed = _dead_letters(kafka, topic_prefix, timeout).list_letters([r.value for r in reason or []], limit)
    if as_json:
        letters = [_plain(letter, excerpt) for letter in listed.newest]
        counts = {"reasons": dict(listed.reasons), "foreign": listed.num_foreign}
        print(json.dumps({"schema": "streamtower.dead-letters/1", **counts, "letters": letters}))
        return
    for letter in listed.newest:
        plain = _plain(letter, excerpt)
        print("{time}  {topic}[{partition}]@{offset}  {reason}  {excerpt}".format(**plain))
    for name, count in listed.reasons.most_common():
        print(f"{count:,} {name}")
    if not listed.reasons:
        print("none")
    if listed.num_foreign:
        print(f"{listed.num_foreign:,} records that streams has not written")


@app.command()
def replay(
    reason: Reasons = None,
    again: Annotated[bool, typer.Option("--again", help="Those too that were replayed before.")] = False,
    kafka: Kafka = None,
    topic_prefix: Prefix = None,
    timeout: Timeout = 30.0,
    as_json: AsJson = False,
) -> None:
    """Send rejected clicks to the topic of clicks again, byte for byte, each once over all replays of its reason."""
    with exit_codes():
        done = _dead_letters(kafka, topic_prefix, timeout).replay(reason or [], again=again)
    sent = sum(done.reasons.values())
    if as_json:
        rest = {"without_value": done.num_without_value, "foreign": done.num_foreign}
        print(json.dumps({"schema": "streamtower.replay/1", "sent": sent, "reasons": dict(done.reasons), **rest}))
        return
    print(f"{sent:,} sent" + "".join(f", {count:,} {name}" for name, count in done.reasons.most_common()))
    if done.num_without_value:
        print(f"{done.num_without_value:,} left out: their values were too long to be kept")
    if done.num_foreign:
        print(f"{done.num_foreign:,} left out: they are not from this topic of clicks")


def _dead_letters(kafka: str | None, topic_prefix: str | None, timeout: float) -> DeadLetters:
    from streamtower.dead_letters import DeadLetters

    settings = connection(kafka, topic_prefix)
    return DeadLetters(settings.confluent_config(), Topics(settings.topic_prefix), timeout_seconds=timeout)


def _plain(letter: Letter, excerpt_bytes: int) -> dict[str, Any]:
    known = not math.isnan(letter.time)
    return {
        "reason": letter.reason,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "time": datetime.fromtimestamp(letter.time, UTC).isoformat(timespec="milliseconds") if known else None,
        "value_bytes": letter.omitted_bytes or len(letter.value or b""),
        "excerpt": letter.excerpt(excerpt_bytes),
    }
