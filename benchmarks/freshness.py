"""How much quality is lost when what is served is renewed less often (the question of Monolith, Liu et al. 2022).

One model learns every click. Beside it stand copies that serve: each is renewed (all that is learnt or counted, at
once) after so many clicks, and in between answers with what it had, while users' histories go on. "never" is the model
as it was at the middle of the stream. Recalls are over the second half.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from benchmarks.document import Row, parser, report
from benchmarks.quality import add_sets, open_sets, settings_of
from streams.contract import Float64Array, MicroBatch
from streams.settings import StreamsSettings
from streamtower.evaluate.contest import Feed, evaluated_model, item_changes
from streamtower.evaluate.measures import mean_and_std, recall
from streamtower.evaluate.replay import Stream, read_clicks, stream
from trainer.item_events import ItemChange
from trainer.model import Model
from trainer.settings import TrainerSettings

INTERVALS = (1_000, 10_000, 50_000)
EVERY, NEVER = "every_micro_batch", "never"
KS = (10, 50, 100)


def main() -> None:
    """Measures and reports."""
    options = parser("freshness", (__doc__ or "").splitlines()[0])
    add_sets(options)
    given = options.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with open_sets(given.data, given.sets.split(","), given.recbole) as sets:
        for name, open_seed in sets.items():
            recalls: dict[str, list[dict[int, float]]] = {}
            for seed in range(given.seeds):
                print(f"{name}, seed {seed} …", file=sys.stderr, flush=True)
                dataset, streams = open_seed(seed), StreamsSettings()
                clicks = stream(read_clicks(dataset, streams)[0], streams.state_config())
                settings = settings_of(dataset, "default").model_copy(update={"seed": seed})
                for served, ranks in serve(clicks, settings, INTERVALS, item_changes(dataset)).items():
                    recalls.setdefault(served, []).append({k: recall(ranks, k) for k in KS})
            rows += [
                Row(f"freshness.{name}.{served}.recall_at_{k}.{statistic}", value, "ratio")
                for served, found in recalls.items()
                for k in KS
                for statistic, value in mean_and_std([one[k] for one in found]).items()
            ]
    report("freshness", rows, given.json)


def serve(
    clicks: Stream, settings: TrainerSettings, intervals: Sequence[int], items: Mapping[int, ItemChange]
) -> dict[str, Float64Array]:
    """Ranks of the second half's clicks, by how often what serves is renewed; `items` are known by hash."""
    model = evaluated_model(settings)
    feed = Feed(model, items)
    copies: dict[str, Model] = {}
    renewed_at: dict[str, int] = {}
    ranks: dict[str, list[Float64Array]] = {}
    middle, done = clicks.num_clicks // 2, 0
    for batch in clicks.batches:
        if done >= middle:
            _test(model, batch, ranks, EVERY)
        for interval in (*intervals, None):
            name = NEVER if interval is None else f"every_{interval}_clicks"
            due = name not in copies or (interval is not None and done - renewed_at[name] >= interval)
            if done >= middle and due:
                copies[name], renewed_at[name] = copy.deepcopy(model), done
            if name in copies:
                _test(copies[name], batch, ranks, name)
        model.evaluation, evaluation = None, model.evaluation  # learning does not depend on it, and is faster without
        feed.learn(batch)
        model.evaluation = evaluation
        done += len(batch)
    return {name: np.concatenate(ranks[name]) for name in ranks}


def _test(model: Model, batch: MicroBatch, ranks: dict[str, list[Float64Array]], name: str) -> None:
    tested = model.test(batch)
    ranks.setdefault(name, []).append(np.full(len(batch), np.inf) if tested is None else tested.rank)


if __name__ == "__main__":
    main()
