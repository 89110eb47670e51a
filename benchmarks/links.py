"""The paper's Wikipedia task in small: which page does a page link to? Plain against corrected softmax.

The pages of a small Wikipedia and the links between them (`--data`: a directory with items.csv.gz, columns item,
category, text, and links.csv.gz, columns src, dst). A page is its id, n-grams of its title, its categories, and the
words that set its text apart; a link is a click of the source page on the target page. Nine tenths of the links, in
random order, are learnt in one pass, with the share of each target estimated on the way as `streams` does; then each
link of the last tenth is looked up: the rank of its target among *all* pages, those that the source is known to link to
among them. The same towers and the same pass for every loss; what differs is the correction and the temperature.
`plain_with_log_q` is the plain model served as this system does by default: its logit plus log q of the target.

Settings other than loss and temperature were chosen on the split of seed 7, which is not among those reported.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.document import Row, parser, report
from streams.contract import UInt64Array, hash_ids
from streams.frequency import GapEstimator
from trainer.step import Clicks, Learner
from trainer.towers import Feature, ItemFeatures, TowerConfig, encode_item_features, query_inputs
from trainer.training import Correction, TrainingConfig

LOSSES: dict[str, Correction] = {"plain": "none", "corrected": "logq", "refined": "refined"}
WITH_LOG_Q = "plain_with_log_q"
TEMPERATURES = (0.05, 0.07, 0.14, 0.2)
TOP = (10, 50, 100)
BATCH = 512
HELD_OUT = 0.1
UNIFORM_RATIO = 0.02
"""Share of the links taken as spread over all pages, so that none is without a log q; the trainer's default."""
WORDS = 50
"""Words of a text that count: those of the highest tf-idf."""

_WORD = re.compile(r"[^\W_]+")
_FEATURES = (Feature("title", "multi"), Feature("category", "multi"), Feature("text", "multi"))
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pages:
    """All pages with their features, and the links between them."""

    ids: list[str]
    features: list[dict[str, list[str]]]
    """By page: title, category, text."""
    links: Int64Array
    """[l, 2] source and target, as numbers of pages."""


def main() -> None:
    """Learns and ranks with each loss, temperature and seed."""
    options = parser("links", (__doc__ or "").splitlines()[0])
    options.add_argument("--data", type=Path, required=True, help="directory of items.csv.gz and links.csv.gz")
    options.add_argument("--seeds", type=int, default=3, help="how many splits of the links (default 3)")
    given = options.parse_args()
    torch.set_num_threads(1)
    pages = read_pages(given.data)
    recalls: dict[tuple[str, float], list[list[float]]] = {}
    for loss in LOSSES:
        for temperature in TEMPERATURES:
            for seed in range(given.seeds):
                began = time.monotonic()
                for served, recall in run(pages, loss, temperature, seed).items():
                    recalls.setdefault((served, temperature), []).append(recall)
                    print(
                        f"{served:16} tau {temperature:<5} seed {seed}: "
                        + ", ".join(f"R@{k} {value:.3f}" for k, value in zip(TOP, recall, strict=True))
                        + f" in {time.monotonic() - began:.0f} s",
                        file=sys.stderr,
                    )
    report("links", rows_of_recalls(recalls), given.json)


def rows_of_recalls(recalls: Mapping[tuple[str, float], Sequence[Sequence[float]]]) -> list[Row]:
    """Mean and standard deviation over the seeds; and what the correction gains, both losses at their best."""
    rows, best = [], dict.fromkeys([*LOSSES, WITH_LOG_Q], 0.0)
    for (loss, temperature), by_seed in recalls.items():
        mean, std = np.mean(by_seed, axis=0), np.std(by_seed, axis=0)
        best[loss] = max(best[loss], float(mean[0]))
        for place, k in enumerate(TOP):
            name = f"links.{loss}.tau{temperature:g}.recall_at_{k}"
            rows += [Row(name, float(mean[place]), "ratio"), Row(f"{name}.std", float(std[place]), "ratio")]
    gains = [
        Row(f"links.{loss}.gain_over_plain_at_10", best[loss] / best["plain"] - 1, "ratio")
        for loss in best
        if loss != "plain" and best[loss]
    ]
    return rows + gains


def run(pages: Pages, loss: str, temperature: float, seed: int) -> dict[str, list[float]]:
    """Recall at each of TOP of the links that are held out, after one pass over the others; by how it is served."""
    config = TowerConfig(
        item_rows=2**14,
        context=(Feature("page", "item"), *_FEATURES),
        item=_FEATURES,
        temperature=temperature,
    )
    training = TrainingConfig(
        correction=LOSSES[loss], rows_per_step=BATCH, recent_negatives=0, mask_history=False, seed=seed
    )
    store = ItemFeatures(config)
    store.append(len(pages.ids))
    for number, features in enumerate(pages.features):
        store.replace(number, encode_item_features(config, features))
    item_hash = hash_ids(pages.ids)
    number_of = {key: number for number, key in enumerate(item_hash.tolist())}

    def numbers(hashes: UInt64Array) -> Int64Array:
        return np.array([number_of[key] for key in hashes.tolist()])

    no_histories = np.zeros(0, np.uint64), np.zeros(len(pages.ids) + 1, np.int64)
    columns = {feature.name: [page[feature.name] for page in pages.features] for feature in _FEATURES}
    queries = query_inputs(config, None, *no_histories, {"page": pages.ids, **columns})  # type: ignore[dict-item]
    learner = Learner(config, training, lambda hashes: store.gather(hashes, numbers(hashes)))
    estimator = GapEstimator()
    learnt, held_out = split(pages.links, seed)
    for links in batches(learnt):
        target_hash = item_hash[links[:, 1]]
        estimator.update(target_hash)
        share = estimator.sampling_probability(target_hash, in_batch=True)
        learner.learn(
            Clicks(
                query=queries.take(links[:, 0]),
                item_hash=target_hash,
                reward=np.ones(len(links), np.float32),
                log_q=np.log(share),
                history_values=no_histories[0],
                history_offsets=np.zeros(len(links) + 1, np.int64),
            )
        )
    everything = store.gather(item_hash, np.arange(len(pages.ids)))
    logits = learner.embed_queries(queries) @ learner.embed_items(everything).T / temperature
    served: dict[str, npt.NDArray[Any]] = {loss: logits}
    if loss == "plain":
        page_share = np.bincount(learnt[:, 1], minlength=len(pages.ids)) / len(learnt)
        served[WITH_LOG_Q] = logits + np.log((1 - UNIFORM_RATIO) * page_share + UNIFORM_RATIO / len(pages.ids))
    ranks = {name: ranks_of(scores[held_out[:, 0]], held_out[:, 1]) for name, scores in served.items()}
    return {name: [float((ranks[name] < k).mean()) for k in TOP] for name in ranks}


def ranks_of(scores: npt.NDArray[Any], target: Int64Array) -> npt.NDArray[np.float64]:
    """Expected rank, from 0, of each row's target among all columns: float64 [n]; equal scores share their places."""
    own = np.take_along_axis(scores, target[:, None], axis=1)
    ranks: npt.NDArray[np.float64] = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return ranks


def split(links: Int64Array, seed: int) -> tuple[Int64Array, Int64Array]:
    """Links to learn, in random order, and links that are held out."""
    shuffled = np.random.default_rng(seed).permutation(links)
    place = round(len(links) * HELD_OUT)
    return shuffled[place:], shuffled[:place]


def batches(links: Int64Array) -> Iterator[Int64Array]:
    """Micro-batches of at most BATCH links."""
    for start in range(0, len(links), BATCH):
        yield links[start : start + BATCH]


def read_pages(directory: Path) -> Pages:
    """Pages and links from the files of the data set."""
    csv.field_size_limit(1 << 24)
    with gzip.open(directory / "items.csv.gz", "rt", newline="") as file:
        pages = list(csv.DictReader(file))
    with gzip.open(directory / "links.csv.gz", "rt", newline="") as file:
        links = [(row["src"], row["dst"]) for row in csv.DictReader(file)]
    words = [Counter(_WORD.findall(page["text"].lower())) for page in pages]
    number = {page["item"]: place for place, page in enumerate(pages)}
    return Pages(
        ids=list(number),
        features=[
            {"title": title_grams(page["item"]), "category": categories(page["category"]), "text": own_words}
            for page, own_words in zip(pages, telling_words(words), strict=True)
        ],
        links=np.array([(number[source], number[target]) for source, target in links]),
    )


def title_grams(item_id: str) -> list[str]:
    """Words, pairs of words, and all runs of four letters."""
    words = _WORD.findall(item_id.replace("_", " ").lower())
    spaced = f" {' '.join(words)} "
    pairs = [f"{one} {other}" for one, other in pairwise(words)]
    return [*words, *pairs, *(spaced[start : start + 4] for start in range(len(spaced) - 3))]


def categories(text: str) -> list[str]:
    """Each category with all that it is part of: subject.A.B is subject.A and subject.A.B."""
    paths = [path.split(".") for path in text.split("|")]
    return [".".join(path[:end]) for path in paths for end in range(2, len(path) + 1)]


def telling_words(pages: Sequence[Counter[str]]) -> list[list[str]]:
    """The WORDS words of each page that have the highest tf-idf; words of a single page tell nothing."""
    num_pages_of = Counter(word for page in pages for word in page)
    told = []
    for page in pages:
        weights = {
            word: (1 + math.log(times)) * math.log(len(pages) / num_pages_of[word])
            for word, times in page.items()
            if num_pages_of[word] > 1
        }
        told.append(sorted(weights, key=lambda word: (-weights[word], word))[:WORDS])
    return told


if __name__ == "__main__":
    main()
