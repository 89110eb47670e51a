"""An app for the tests of chunks, run by `faust -A tests.streams.chunk_worker worker`: journals what it gets.

STREAMTOWER_TEST_CHUNKS, a JSON object, says what it reads and how it acks. Each entry of the journal is one pickle
written in one call, so that a killed process leaves whole entries.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
from typing import Any

from streams.chunks import Chunk, ChunkApp

config = json.loads(os.environ["STREAMTOWER_TEST_CHUNKS"])
journal = os.open(config["journal"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
app = ChunkApp(
    config["group"],
    broker="kafka://" + config["bootstrap"],
    chunk_transport=config["transport"],
    broker_commit_interval=0.2,
    **config["options"],
)


def write(kind: str, **entry: Any) -> None:
    os.write(journal, pickle.dumps({"kind": kind, **entry}))


def note(chunk: Chunk) -> None:
    write(
        "chunk",
        partition=chunk.partition,
        first_offset=chunk.first_offset,
        next_offset=chunk.next_offset,
        offsets=chunk.offsets.tolist(),
        keys=chunk.keys,
        values=chunk.values,
        timestamps=chunk.timestamps.tolist(),
        in_flight=app.consumer.in_flight.num_records,
        fetch_wait_ms=app.consumer._thread._consumer._fetcher._fetch_max_wait_ms,
    )


def ack(event: Any) -> None:
    chunk = event.value
    write("ack", partition=chunk.partition, first_offset=chunk.first_offset, next_offset=chunk.next_offset)
    event.ack()


@app.agent(app.chunk_topic(config["topic"]))
async def read(stream: Any) -> None:
    held: list[Any] = []

    async def ack_late() -> None:
        """Every tenth of a second acks what had come a tenth of a second ago, newest first."""
        seen = 0
        while True:
            ripe, held[:] = held[:seen], held[seen:]
            for event in reversed(ripe):
                ack(event)
            seen = len(held)
            await asyncio.sleep(0.1)

    late = asyncio.create_task(ack_late()) if config["acks"] == "late" else None
    seconds = config["seconds_per_chunk"]
    async for event in stream.noack().events():
        note(event.value)
        if seconds:
            await asyncio.sleep(seconds)
        match config["acks"]:
            case "at once":
                ack(event)
            case "late":
                held.append(event)
            case "never":
                held.append(event)
            case "all but one":
                held_offset = config["held_offset"] if event.value.partition == 0 else -1
                if event.value.first_offset <= held_offset < event.value.next_offset:
                    held.append(event)
                else:
                    ack(event)
    if late:
        late.cancel()


if config["loses"]:

    @app.on_partitions_assigned.connect
    async def lose_fetches(sender: Any, assigned: Any, **options: Any) -> None:
        """Loses what some fetches bring, as Faust may do in a rebalance."""
        thread = app.consumer._thread
        getmany = thread.getmany
        left = list(config["loses"])

        async def losing(*args: Any, **options: Any) -> Any:
            fetched = await getmany(*args, **options)
            if fetched and left and left.pop(0):
                write("lost", partitions=sorted(tp.partition for tp in fetched))
                return {}
            return fetched

        thread.getmany = losing


@app.on_worker_init.connect
def started(sender: Any, **options: Any) -> None:
    write("started", transport=app.chunk_transport)
