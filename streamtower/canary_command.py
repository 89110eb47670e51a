"""`streamtower canary`: the options and what is printed.

Station: between the command line and `canary`, which does the work.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import Annotated

import typer

from streams.contract import Topics
from streamtower.connection import EXIT_FAILURE, Kafka, Prefix, connection, exit_codes
from streamtower.versions_command import URL, Alias, AsJson, Key, Qdrant, qdrant_client


def canary(
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two probes.")] = 10.0,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many; default: never.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which a probe is given up.")] = 60.0,
    kafka: Kafka = None,
    topic_prefix: Prefix = None,
    qdrant: Qdrant = URL,
    api_key: Key = None,
    alias: Alias = "items",
    as_json: AsJson = False,
) -> None:
    """Measure from outside how long a click takes until the index shows it; exit code 1 if one was not seen in time.

    With --json one document for each probe. The clicks are learnt nowhere, and no search finds what tells of them.
    """
    from streamtower.canary import probes

    missed = 0
    with exit_codes(), qdrant_client(qdrant, api_key) as client:
        settings = connection(kafka, topic_prefix)
        topics = Topics(settings.topic_prefix)
        sent = probes(settings.confluent_config(), topics, client, alias, every=every, timeout=timeout)
        for probe in islice(sent, count):
            missed += probe.seconds is None
            if as_json:
                seconds = probe.seconds and round(probe.seconds, 3)
                document = {"schema": "streamtower.canary/1", "partition": probe.partition, "seconds": seconds}
                print(json.dumps(document), flush=True)
            else:
                said = f"not seen within {timeout:g} s" if probe.seconds is None else f"{probe.seconds:.2f} s"
                print(f"partition {probe.partition}: {said}", flush=True)
    if missed:
        raise typer.Exit(EXIT_FAILURE)
