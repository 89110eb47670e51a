"""Whether new items are candidates for those whom they fit, before and shortly after their first click.

The stream of opam (packages and what they depend on, with real texts). Each package is announced on the topic `items`
when it is first published, with its synopsis, description and tags; the clicks come in between, as the trainer gets
both. Every click of the second half is foreseen before it is learnt. Counted are clicks by how many their item had
before: the share whose item was among the 100 best of all known items, by the served score at several settings of the
popularity knob, by live popularity, and by chance; of those without an earlier click also the share among the 100 best
of all such items alone, as for a place on the page that is kept for new ones.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.document import Row, parser, report
from benchmarks.quality import IDS_ALONE, open_sets, settings_of
from streams.contract import MicroBatch, hash_id
from streams.settings import StreamsSettings
from streamtower.datasets.clicks import Dataset
from streamtower.evaluate.contest import evaluated_model, item_changes
from streamtower.evaluate.measures import mean_and_std
from streamtower.evaluate.replay import read_clicks, stream
from trainer.item_events import ItemChange
from trainer.model import Model
from trainer.settings import TrainerSettings

K = 100
FEW = 5
KNOBS = (1.0, 0.5, 0.0, -0.5, -1.0)
AMONG_NEW = "among_new"
"""Stem of the measures that rank items without clicks alone."""
VARIANTS = {"with_texts": "default", "ids_alone": IDS_ALONE}


def main() -> None:
    """Measures and reports."""
    options = parser("cold_items", (__doc__ or "").splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="directory with opam/")
    options.add_argument("--seeds", type=int, default=3, help="runs with other random choices (default 3)")
    given = options.parse_args()
    torch.set_num_threads(1)
    published = publishing_times(given.data / "opam" / "items.csv.gz")
    found: dict[str, list[float]] = {}
    with open_sets(given.data, ["opam"]) as sets:
        for seed in range(given.seeds):
            dataset = sets["opam"](seed)
            for name, variant in VARIANTS.items():
                print(f"{name}, seed {seed} …", file=sys.stderr, flush=True)
                settings = settings_of(dataset, variant).model_copy(update={"seed": seed})
                for measure, value in recalls(dataset, settings, published).items():
                    found.setdefault(f"{name}.{measure}", []).append(value)
    rows = [
        Row(f"cold_items.opam.{measure}.{statistic}", value, "clicks" if measure.endswith(".clicks") else "ratio")
        for measure, values in found.items()
        for statistic, value in mean_and_std(values).items()
    ]
    report("cold_items", rows, given.json)


def publishing_times(path: Path) -> dict[int, float]:
    """Hash of each item → when it was published, seconds since the epoch."""
    with gzip.open(path, "rt", newline="") as file:
        return {hash_id(row["item"]): float(row["first_published"]) for row in csv.DictReader(file)}


def recalls(dataset: Dataset, settings: TrainerSettings, published: dict[int, float]) -> dict[str, float]:
    """Name of each measure → its value over the second half."""
    streams = StreamsSettings()
    clicks = stream(read_clicks(dataset, streams)[0], streams.state_config())
    changes = item_changes(dataset)
    waiting = sorted(((published[key], key) for key in changes if key in published), reverse=True)
    model, earlier = evaluated_model(settings), Counter[int]()
    ranks: dict[str, list[np.ndarray]] = {}
    num_earlier: list[int] = []
    done = 0
    for number, batch in enumerate(clicks.batches):
        model.take(list(_announced(waiting, float(batch.event_time.min()), changes)), 2 * number)
        if done >= clicks.num_clicks // 2:
            _foresee(model, batch, ranks)
            _foresee_among_new(model, batch, ranks, earlier)
            num_earlier += _earlier(batch, earlier)
        earlier.update(batch.item_hash.tolist())
        model.learn(batch, 2 * number + 1)
        done += len(batch)
    had = np.array(num_earlier)
    result = {}
    groups = {
        "no_earlier_click": had == 0,
        f"1_to_{FEW - 1}_earlier_clicks": (had > 0) & (had < FEW),
        f"fewer_than_{FEW}_earlier_clicks": had < FEW,
        f"{FEW}_or_more_earlier_clicks": had >= FEW,
    }
    for group, of in groups.items():
        result[f"{group}.clicks"] = float(np.count_nonzero(of))
        for name, parts in ranks.items():
            if name.startswith(AMONG_NEW) and group != "no_earlier_click":
                continue
            hits = np.concatenate(parts)[of]
            result[f"{group}.{name}.recall_at_{K}"] = float(hits.mean())
    return result


def _announced(waiting: list[tuple[float, int]], until: float, changes: dict[int, ItemChange]) -> Iterator[ItemChange]:
    """Items published before a moment that were not announced yet."""
    while waiting and waiting[-1][0] < until:
        yield changes[waiting.pop()[1]]


def _earlier(batch: MicroBatch, earlier: Counter[int]) -> list[int]:
    """Clicks of each row's item before it, those of the same micro-batch included."""
    inside = Counter[int]()
    counts = []
    for item in batch.item_hash.tolist():
        counts.append(earlier[item] + inside[item])
        inside[item] += 1
    return counts


def _foresee(model: Model, batch: MicroBatch, ranks: dict[str, list[np.ndarray]]) -> None:
    """Whether each row's item was among the best, by each way of ranking; what is learnt does not depend on it."""
    for knob in KNOBS:
        tested = model.test(batch, popularity=knob)
        assert tested is not None
        ranks.setdefault(f"popularity_knob_{knob:g}", []).append(tested.rank <= K)
    known = np.maximum(model.catalogue.num_items - np.diff(batch.history_offsets), 1)
    found = model.catalogue.find(batch.item_hash) >= 0
    ranks.setdefault("popularity", []).append(tested.popularity_rank <= K)
    ranks.setdefault("random", []).append(np.minimum(1.0, K / known) * found)
    ranks.setdefault("ceiling", []).append(found.astype(np.float64))


def _foresee_among_new(
    model: Model, batch: MicroBatch, ranks: dict[str, list[np.ndarray]], earlier: Counter[int]
) -> None:
    """The same where all items that were clicked before are taken for gone. The knob is of no account: all that are
    left have the same popularity."""
    catalogue = model.catalogue
    deleted, num_deleted = catalogue.deleted.copy(), catalogue.num_deleted
    new = np.array([earlier[item] == 0 for item in catalogue.item_hash[: len(catalogue)].tolist()])
    catalogue.deleted[~new] = True
    catalogue.num_deleted = int(catalogue.deleted.sum())
    tested = model.test(batch)
    assert tested is not None
    ranks.setdefault(AMONG_NEW, []).append(tested.rank <= K)
    found = catalogue.find(batch.item_hash) >= 0
    ranks.setdefault(f"{AMONG_NEW}_random", []).append(found * min(1.0, K / max(1, catalogue.num_items)))
    catalogue.deleted[:], catalogue.num_deleted = deleted, num_deleted


if __name__ == "__main__":
    main()
