"""How long a checkpoint stops learning, how much it writes, and how long a restart reads, with large tables.

A trainer with 2^20 rows of items (others as by default, without the tests before learning) knows 1,000,000 items of one
feature. 20,000 clicks lie between two checkpoints, as in half a minute of 667 clicks a second: items by Zipf's law
(exponent 1.0), users uniform, histories as the micro-batches have them. The first checkpoint is full.

Rows: checkpoint.items, checkpoint.full_pause_seconds, checkpoint.pause_p50_seconds, checkpoint.pause_max_seconds,
checkpoint.full_bytes, checkpoint.bytes (mean of the others), checkpoint.write_p50_seconds,
checkpoint.write_max_seconds, checkpoint.load_seconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.document import Row, parser, report
from streams.contract import MicroBatch, hash_ids
from streamtower.evaluate.replay import histories_before
from trainer.checkpoint import Checkpoints
from trainer.item_events import ItemChange
from trainer.metrics import Metrics
from trainer.model import new_model
from trainer.progress import Progress
from trainer.settings import TrainerSettings

NUM_USERS, CLICKS, BATCH = 100_000, 20_000, 256


def main() -> None:
    """Measures and reports."""
    options = parser("checkpoint", (__doc__ or "").splitlines()[0])
    options.add_argument("--items", type=int, default=1_000_000, help="known items (default 1,000,000)")
    options.add_argument("--checkpoints", type=int, default=16, help="after the first, full one (default 16)")
    given = options.parse_args()
    torch.set_num_threads(1)
    features = '{"item": [{"name": "category", "kind": "categorical"}]}'
    settings = TrainerSettings(
        item_rows=2**20, features=features, evaluation_rows=0, adapt_weights=False, max_items=2 * given.items
    )
    model, progress, metrics = new_model(settings), Progress(), Metrics()
    for start in range(0, given.items, 100_000):
        numbers = range(start, min(start + 100_000, given.items))
        changes = [ItemChange(f"item-{n}", {"category": n % 1_000}, b'{"title":"Item"}') for n in numbers]
        model.catalogue.take(changes, 0)
    batches = clicks((1 + given.checkpoints) * (CLICKS + BATCH), given.items)
    pauses, seconds, sizes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), settings.identity(), metrics)
        for _ in range(1 + given.checkpoints):
            for _ in range(-(-CLICKS // BATCH)):
                progress.step += 1
                model.learn(next(batches), progress.step)
            started = time.perf_counter()
            checkpoints.save(progress, model)
            pauses.append(time.perf_counter() - started)
            if not checkpoints.collect(wait=True):
                raise SystemExit("a checkpoint could not be written")
            seconds.append(time.perf_counter() - started)
            newest = max(Path(folder).glob("c*"))
            sizes.append(sum(file.stat().st_size for file in newest.iterdir()))
            print(f"{newest.name:27} {pauses[-1]:8.3f} s {seconds[-1]:8.3f} s {sizes[-1]:14,} bytes")
        started = time.perf_counter()
        state = checkpoints.load()
        loading = time.perf_counter() - started
        checkpoints.close()
    assert state is not None and state.progress == progress
    rows = [
        Row("checkpoint.items", len(model.catalogue), "items"),
        Row("checkpoint.full_pause_seconds", pauses[0], "s"),
        Row("checkpoint.pause_p50_seconds", statistics.median(pauses[1:]), "s"),
        Row("checkpoint.pause_max_seconds", max(pauses[1:]), "s"),
        Row("checkpoint.full_bytes", sizes[0], "bytes"),
        Row("checkpoint.bytes", statistics.mean(sizes[1:]), "bytes"),
        Row("checkpoint.write_p50_seconds", statistics.median(seconds[1:]), "s"),
        Row("checkpoint.write_max_seconds", max(seconds[1:]), "s"),
        Row("checkpoint.load_seconds", loading, "s"),
    ]
    report("checkpoint", rows, given.json)


def clicks(num_clicks: int, num_items: int) -> Iterator[MicroBatch]:
    """Micro-batches of `BATCH` clicks."""
    random = np.random.default_rng(0)
    share = np.cumsum(1.0 / np.arange(1, num_items + 1))
    item = random.permutation(num_items)[np.searchsorted(share, random.random(num_clicks) * share[-1])]
    user = random.integers(NUM_USERS, size=num_clicks).astype(np.uint64)
    item_ids = [f"item-{n}" for n in item.tolist()]
    hashes = hash_ids(item_ids)
    values, offsets = histories_before(user, hashes, 20)
    for start in range(0, num_clicks, BATCH):
        stop = min(start + BATCH, num_clicks)
        times = np.arange(start, stop, dtype=np.float64)
        yield MicroBatch(
            partition=0,
            first_offset=start,
            next_offset=stop,
            offset=np.arange(start, stop),
            user_id=pa.array([f"user-{n}" for n in user[start:stop].tolist()], pa.string()),
            item_id=pa.array(item_ids[start:stop], pa.string()),
            user_hash=user[start:stop],
            item_hash=hashes[start:stop],
            history_values=values[offsets[start] : offsets[stop]],
            history_offsets=offsets[start : stop + 1] - offsets[start],
            reward=np.ones(stop - start, np.float32),
            event_time=times,
            ingest_time=times,
            sampling_probability=np.full(stop - start, 1e-4, np.float32),
            context={},
        )


if __name__ == "__main__":
    main()
