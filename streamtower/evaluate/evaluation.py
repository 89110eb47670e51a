"""The whole evaluation: every contestant, every seed, and what came out as plain data.

Station: between the command (or a benchmark) and replay, contest and measures. It reads no option and writes no file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streams.service import load_settings
from streams.settings import StreamsSettings
from streamtower.datasets.clicks import Dataset
from streamtower.evaluate.baselines import ALS, Popularity
from streamtower.evaluate.contest import Contestant, Run, TowersContestant, best_of, item_changes, run
from streamtower.evaluate.knn import ItemKNN
from streamtower.evaluate.measures import (
    NAMES,
    Measures,
    mean_and_std,
    measures,
    over_time,
    second_half,
)
from streamtower.evaluate.replay import (
    REFRESH_CLICKS,
    Block,
    Stream,
    has_ties,
    read_clicks,
    stream,
    with_strict_histories,
)
from trainer.item_events import ItemChange
from trainer.settings import TrainerSettings

Items = Mapping[int, ItemChange]
BASELINES = ("popularity", "item_knn", "item_knn_plain", "als")
HALF_LIVES = (200.0, 1_000.0, 5_000.0, 25_000.0, math.inf)
"""Of live popularity, in clicks; the best of them, in hindsight, is the baseline."""
STRICT = "_strict"
"""Behind the name of a model whose histories hold clicks of earlier moments only."""
NUM_PARTS = 40
"""Stretches of the stream for which recall and drift are told."""


@dataclass
class Contest:
    """What came out for one contestant, one entry a seed."""

    measures: list[Measures] = field(default_factory=list)
    recall_over_time: list[list[float]] = field(default_factory=list)
    """Recall at 10 over NUM_PARTS stretches of the whole stream."""
    seconds: list[float] = field(default_factory=list)
    """Processor time."""
    note: str = ""

    def add(self, stream: Stream, run: Run) -> None:
        """One more seed's run."""
        self.measures.append(measures(stream, run.seen, second_half(stream.num_clicks)))
        self.recall_over_time.append(over_time(run.seen.rank <= 10, NUM_PARTS).tolist())
        self.seconds.append(run.seconds)

    def summary(self, name: str) -> dict[str, float]:
        """Mean and standard deviation of a measure over the seeds."""
        return mean_and_std([getattr(one, name) for one in self.measures])


@dataclass
class Evaluation:
    """What came out."""

    num_clicks: int = 0
    num_items: int = 0
    num_users: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Clicks that streams does not accept, by reason; of the last seed."""
    has_ties: bool = False
    """Whether some user has several clicks of one moment, which each seed shuffles anew."""
    seeds: list[int] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    """Frequency drift at the ends of NUM_PARTS stretches; of the last seed."""
    contests: dict[str, Contest] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "protocol": "prequential",
            "clicks": self.num_clicks,
            "items": self.num_items,
            "users": self.num_users,
            "rejected": self.rejected,
            "has_ties": self.has_ties,
            "seeds": self.seeds,
            "evaluated": "second half",
            "drift_over_time": self.drift,
            "contestants": {
                name: {
                    "measures": {measure: contest.summary(measure) for measure in NAMES},
                    "recall_at_10_over_time": np.mean(contest.recall_over_time, axis=0).tolist(),
                    "processor_seconds": sum(contest.seconds) / len(contest.seconds),
                    "note": contest.note,
                }
                for name, contest in self.contests.items()
            },
        }


def evaluate_contest(
    open_seed: Callable[[int], Dataset],
    streams: StreamsSettings,
    models: Mapping[str, TrainerSettings],
    *,
    baselines: Sequence[str] = BASELINES,
    seeds: Sequence[int] = (0, 1, 2),
    strict: Sequence[str] = (),
    begin: Callable[[str, int], Callable[[int], object]] = lambda name, clicks: lambda done: None,
) -> Evaluation:
    """Replays a data set for every seed and every contestant.

    Args:
        open_seed: the data set with the ties of its clicks shuffled by a seed.
        streams: settings of streams.
        models: name → settings of the trainer; the seed is set by the evaluation. A model of preset "paper" gets the
            preset "paper" of streams: see `streams_beside`.
        baselines: of BASELINES.
        seeds: at least one.
        strict: names of models that also run with strict histories, where the data have ties.
        begin: told name and clicks of each run; gives back what is told how many clicks of each block are done.
    """
    result = Evaluation(seeds=list(seeds))
    for seed in seeds:
        dataset = open_seed(seed)
        cuts, rejected = read_clicks(dataset, streams)
        refresh_clicks = next((settings.refresh_clicks for settings in models.values()), REFRESH_CLICKS)
        clicks = stream(cuts, streams.state_config(), refresh_clicks)
        items = item_changes(dataset)
        result.num_clicks, result.num_items = clicks.num_clicks, len(clicks.item_hash)
        result.num_users = len(np.unique(np.concatenate([batch.user_hash for batch in clicks.batches])))
        result.rejected, result.has_ties = dict(rejected), has_ties(clicks)
        result.drift = [float(part[-1]) for part in np.array_split(clicks.drift, min(NUM_PARTS, len(clicks.drift)))]

        def show_model(name: str, settings: TrainerSettings, over: Stream, items: Items = items) -> None:
            model = TowersContestant(over, settings, items)
            _contest(result, name).add(over, run(model, over.batches, begin(name, over.num_clicks)))

        for name, settings in models.items():
            seeded = settings.model_copy(update={"seed": seed})
            config = streams_beside(settings, streams).state_config()
            own = clicks if config == streams.state_config() else stream(cuts, config, refresh_clicks)
            show_model(name, seeded, own)
            if name in strict and result.has_ties:
                show_model(name + STRICT, seeded, with_strict_histories(own, streams.history_length))
        for name in baselines:
            told = begin(name, clicks.num_clicks)
            if name == "popularity":
                _contest(result, name).note = _popularity(_contest(result, name), clicks, told)
            else:
                _contest(result, name).add(clicks, run(_baseline(name, clicks, seed), clicks.blocks, told))
    return result


def streams_beside(trainer: TrainerSettings, streams: StreamsSettings) -> StreamsSettings:
    """Settings of streams for a model: the paper's frequency estimate beside the paper's preset, where none is set."""
    return streams.with_preset("paper") if trainer.preset == "paper" else streams


def _contest(result: Evaluation, name: str) -> Contest:
    return result.contests.setdefault(name, Contest())


def _baseline(name: str, clicks: Stream, seed: int) -> Contestant[Block]:
    if name == "item_knn":
        return ItemKNN(clicks)
    if name == "item_knn_plain":
        return ItemKNN(clicks, window=20, decay=1.0, shrink=0.0)
    return ALS(clicks, seed=seed)


def _popularity(contest: Contest, clicks: Stream, told: Callable[[int], object]) -> str:
    """Adds the half-life that is best, in hindsight, over the clicks that are evaluated, and says which."""
    evaluated = second_half(clicks.num_clicks)
    runs = [(f"{half_life:g}", run(Popularity(clicks, half_life), clicks.blocks)) for half_life in HALF_LIVES]
    half_life, best = best_of(runs, lambda run: measures(clicks, run.seen, evaluated).recall_at_10)
    contest.add(clicks, best)
    told(clicks.num_clicks)
    return f"half-life {half_life} clicks"


def trainer_settings(dataset: Dataset, **values: object) -> TrainerSettings:
    """The trainer's settings for a data set: environment variables, the set's own features, and `values`, which win.

    Raises:
        ConfigurationError: every problem at once.
    """
    features = {
        side: [{"name": name, "kind": kind} for name, kind in kinds.items()]
        for side, kinds in (("context", dataset.context_features), ("item", dataset.item_features))
    }
    prefix = str(TrainerSettings.model_config["env_prefix"])
    suggested: dict[str, object] = {
        name: _plain(value) for name, value in dataset.trainer.items() if prefix + name.upper() not in os.environ
    }
    given = suggested | {"features": json.dumps(features)} | values
    return load_settings(TrainerSettings, None, **given)


def _plain(value: str) -> object:
    """What an environment variable's text stands for."""
    try:
        return json.loads(value)
    except ValueError:
        return value
