"""The paper's own offline evaluation: train in time order up to day d0; of every later day hold out a part for testing.

Station: beside the contest, which tests on every click. Every click that is held out is tested with the state from
before its micro-batch and never learnt: no history, count or frequency holds it. Beside it stands the same model
frozen at the start of day d0 (towers, embeddings, popularity, known items), with the users' histories going on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streams.contract import Float64Array, Int64Array, MicroBatch
from streams.settings import StreamsSettings
from streamtower.datasets.clicks import Dataset, DatasetError
from streamtower.evaluate.contest import Feed, evaluated_model
from streamtower.evaluate.measures import mean_and_std, recall
from streamtower.evaluate.replay import BoolArray, hold_out, read_clicks
from trainer.item_events import ItemChange
from trainer.model import Model
from trainer.settings import TrainerSettings

DAY_SECONDS = 86_400.0
HELD_OUT_RATIO = 0.1
KS = (10, 50, 100)


@dataclass(frozen=True)
class Day:
    """Recalls of one day's held-out clicks."""

    day: int
    """From 0, the day of the stream's first click (UTC)."""
    num_tested: int
    live: dict[int, float]
    """K → recall of the model that goes on learning."""
    frozen: dict[int, float]
    """K → recall of the model as it was at the start of day d0."""


@dataclass(frozen=True)
class Sequential:
    """What came out."""

    days: list[Day]
    num_clicks: int
    num_items: int
    num_users: int
    seconds: float
    """Processor time."""

    def mean(self, which: str, k: int) -> float:
        """Mean of the days' recalls, each day weighing the same, as in the paper; `which`: "live" or "frozen"."""
        return float(np.mean([getattr(day, which)[k] for day in self.days]))


def evaluate_by_day(
    dataset: Dataset,
    streams: StreamsSettings,
    trainer: TrainerSettings,
    items: Mapping[int, ItemChange],
    *,
    first_day: int = 15,
    held_out_ratio: float = HELD_OUT_RATIO,
    seed: int = 0,
    progress: Callable[[int], object] = lambda clicks: None,
) -> Sequential:
    """Trains and tests day by day.

    Args:
        dataset: the clicks.
        streams, trainer: settings of the services.
        items: what is known of items, by hash.
        first_day: d0, the first day of which clicks are held out, ≥ 1.
        held_out_ratio: of each of those days' clicks, in (0, 1).
        seed: of the choice.
        progress: told how many clicks of each micro-batch are done.

    Raises:
        DatasetError: no click is held out: the data end before d0.
    """
    started = time.process_time()
    cuts, _ = read_clicks(dataset, streams)
    day = days_of(np.concatenate([cut.clicks.event_time for cut in cuts]))
    is_held_out = chosen(day, first_day, held_out_ratio, seed)
    if not is_held_out.any():
        raise DatasetError(
            f"{dataset.name} has no clicks after day {first_day} to hold out; its last day is {int(day.max())}"
        )
    model = evaluated_model(trainer)
    feed = Feed(model, items)
    frozen: Model | None = None
    ranks: dict[str, list[Float64Array]] = {"live": [], "frozen": []}
    begins = np.cumsum([0, *(len(cut.clicks) for cut in cuts)])
    for number, (train, test) in enumerate(hold_out(cuts, is_held_out, streams.state_config())):
        if frozen is None and begins[number + 1] > begins[number] and day[begins[number + 1] - 1] >= first_day:
            frozen = copy.deepcopy(model)
        if test is not None:
            assert frozen is not None
            ranks["live"].append(_ranks(model, test))
            ranks["frozen"].append(_ranks(frozen, test))
        if train is not None:
            feed.learn(train)
        progress(int(begins[number + 1] - begins[number]))
    tested = day[is_held_out]
    return Sequential(
        [
            Day(
                int(number),
                int((tested == number).sum()),
                *({k: recall(np.concatenate(ranks[which])[tested == number], k) for k in KS} for which in ranks),
            )
            for number in np.unique(tested)
        ],
        num_clicks=len(day),
        num_items=len(np.unique(np.concatenate([cut.clicks.item_hash for cut in cuts]))),
        num_users=len(np.unique(np.concatenate([cut.clicks.user_hash for cut in cuts]))),
        seconds=time.process_time() - started,
    )


def summary(results: Sequence[Sequential], first_day: int) -> dict[str, Any]:
    """Plain data for JSON, of the runs of seeds 0, 1, …; days are means over them."""
    last = results[-1]

    def daily(which: str, number: int) -> dict[str, float]:
        return {str(k): float(np.mean([getattr(run.days[number], which)[k] for run in results])) for k in KS}

    return {
        "protocol": "sequential",
        "clicks": last.num_clicks,
        "items": last.num_items,
        "users": last.num_users,
        "seeds": list(range(len(results))),
        "first_day": first_day,
        "held_out_ratio": HELD_OUT_RATIO,
        "ks": list(KS),
        "means": {
            which: {str(k): mean_and_std([run.mean(which, k) for run in results]) for k in KS}
            for which in ("live", "frozen")
        },
        "days": [
            {
                "day": day.day,
                "num_tested": day.num_tested,
                "live": daily("live", number),
                "frozen": daily("frozen", number),
            }
            for number, day in enumerate(last.days)
        ],
        "processor_seconds": sum(run.seconds for run in results) / len(results),
    }


def days_of(event_time: Float64Array) -> Int64Array:
    """int64 [n] days since that of the first click, in UTC."""
    day: Int64Array = np.floor(event_time / DAY_SECONDS).astype(np.int64)
    day -= day.min()
    return day


def chosen(day: Int64Array, first_day: int, held_out_ratio: float, seed: int) -> BoolArray:
    """bool [n] the clicks that are held out: of each day from `first_day` on, the given share, rounded."""
    random = np.random.default_rng(seed)
    held_out = np.zeros(len(day), bool)
    for number in np.unique(day[day >= first_day]):
        rows = np.flatnonzero(day == number)
        held_out[random.permutation(rows)[: round(held_out_ratio * len(rows))]] = True
    return held_out


def _ranks(model: Model, batch: MicroBatch) -> Float64Array:
    ranks = model.test(batch)
    return np.full(len(batch), np.inf) if ranks is None else ranks.rank
