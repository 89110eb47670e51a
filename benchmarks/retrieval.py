"""What publishing and answering cost, by number of items; how much of the exact answer is found, and what others take.

A model with the trainer's default settings (64 dimensions) gets items in clusters of 200, within each of Zipf
popularity, and clicks of sessions within a cluster, so that its co-visitation lists are full. The trainer's own
publisher publishes it into the local endpoint; the retriever runs as its own process, without Kafka. Callers ask for
100 candidates for users with histories of 20 items, each over a connection of its own; all processes share the machine.

Beside it, in the same run, one thread: numpy over everything (exact), and faiss for the dense vector (HNSW, IVF) with
the co-visitation lists and the sum of both in numpy. All give the same whole score; recall is against numpy's.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from benchmarks.document import Row, parser, report
from benchmarks.whole_score import Exact, faiss_searchers, recall_of
from retriever.encode import Asked, Query, load_version
from streams.contract import hash_ids
from streamtower.dev.index.process import LocalIndex
from trainer.contract import collection_name
from trainer.index import Index, joined_vectors, new_client
from trainer.metrics import Metrics
from trainer.model import Model, new_model
from trainer.progress import Progress
from trainer.publish import Publisher
from trainer.rollout import PublishSettings, Rollout, Version
from trainer.settings import TrainerSettings
from trainer.versions import Versions

K = 100
ALIAS = "items"
CLUSTER = 200
HISTORY = 20
SESSIONS = 4
CALLERS = (1, 8, 32)
QUERIES = 400
COMPARED = 100
DELTA_ITEMS = 2_000
DELTAS = 5
CLICKS_PER_ITEM = 10
HNSW_FROM = 200_000


def main() -> None:
    """Measures and reports."""
    options = parser("retrieval", (__doc__ or "").splitlines()[0])
    options.add_argument("--items", default="10000,100000", help="numbers of items, with commas; 1000000 takes minutes")
    options.add_argument("--requests", type=int, default=1_000, help="of each number of callers, all together")
    options.add_argument("--without-faiss", action="store_true", help="its graph takes minutes to build at 1000000")
    given = options.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for num_items in map(int, given.items.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            rows += measure(num_items, given.requests, Path(directory), with_faiss=not given.without_faiss)
    report("retrieval", rows, given.json)


def measure(num_items: int, num_requests: int, directory: Path, *, with_faiss: bool) -> list[Row]:
    """All rows of one number of items."""
    rows: list[Row] = []

    def row(name: str, value: float, unit: str) -> None:
        rows.append(Row(f"retrieval.{num_items}.{name}", value, unit))

    random = np.random.default_rng(num_items)
    settings = TrainerSettings(max_items=2 * num_items)
    say(f"{num_items:,} items: counting clicks …")
    model, item_ids = model_of(settings, num_items, random)
    with LocalIndex(directory / "index") as index:
        metrics, progress = Metrics(), Progress(step=1)
        publisher = publisher_of(settings, index.url, directory / "models", model, progress, metrics)
        try:
            say("publishing …")
            row("publish_seconds", publish(publisher), "s")
            row("delta_items_per_second", deltas(publisher, model, progress, metrics, random), "items/s")
            publisher.close()
            assert publisher.live is not None
            rendered = rendered_items(model, publisher.live, settings)
            served = load_version(directory / "models", ALIAS, collection_name(ALIAS, publisher.live.number))
            histories = [history_of(random, num_items) for _ in range(QUERIES)]
            queries = served.encode(
                [Asked(None, hash_ids([item_ids[item] for item in history]), {}, 1.0) for history in histories]
            )
            exact = Exact(*rendered)
            bodies = [
                json.dumps({"history": [item_ids[item] for item in history], "k": K, "exclude_seen": False}).encode()
                for history in histories
            ]
            with serving(index.url, directory) as url:
                for callers in CALLERS:
                    say(f"{callers} callers …")
                    timed(lambda c=callers: ask_all(url, bodies, c, min(num_requests, 200)))  # warm
                    measured(row, url, bodies, callers, num_requests)
                answers = ask_all(url, bodies[:COMPARED], 1, COMPARED)[1]
            row("recall_at_100", recall_over_http(exact, item_ids, queries[:COMPARED], answers), "ratio")
            compare(row, exact, queries, with_faiss=with_faiss)
        finally:
            publisher.close()
    return rows


def model_of(settings: TrainerSettings, num_items: int, random: np.random.Generator) -> tuple[Model, list[str]]:
    """A model with these items, each with a handful of clicks, none of which the towers have learnt."""
    model = new_model(settings)
    item_ids = [f"item-{number}" for number in range(num_items)]
    hashes = hash_ids(item_ids)
    assert np.array_equal(model.catalogue.admit(hashes, item_ids, 1), np.arange(num_items))
    assert model.covisit is not None
    model.covisit.extend(num_items)
    for _ in range(max(1, CLICKS_PER_ITEM * num_items // 100_000)):
        clicked = np.concatenate([cluster_items(random, num_items, 10) for _ in range(10_000)])
        model.catalogue.count(clicked)
        lengths = np.tile(np.arange(10), 10_000)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        starts = np.repeat(np.arange(10_000) * 10, 10)
        history = clicked[np.repeat(starts, lengths) + np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)]
        model.covisit.count(clicked, history, offsets)
    model.catalogue.embed(np.arange(num_items), model.learner.embed_items)  # as a version is published
    return model, item_ids


def cluster_items(random: np.random.Generator, num_items: int, num: int) -> np.ndarray:
    """Items of one session: of one cluster, the first of it the most often; distinct."""
    cluster = random.integers(max(1, num_items // CLUSTER))
    ranks = np.unique((CLUSTER ** random.random(4 * num)).astype(np.int64) - 1)
    picked = random.permutation(ranks)[:num]
    rest = random.permutation(np.setdiff1d(np.arange(CLUSTER), picked))[: num - len(picked)]
    return cluster * CLUSTER + np.concatenate([picked, rest])


def history_of(random: np.random.Generator, num_items: int) -> np.ndarray:
    """HISTORY items of SESSIONS sessions."""
    return np.concatenate([cluster_items(random, num_items, HISTORY // SESSIONS) for _ in range(SESSIONS)])


def publisher_of(
    settings: TrainerSettings, url: str, model_dir: Path, model: Model, progress: Progress, metrics: Metrics
) -> Publisher:
    """The trainer's, with its settings but for the time between versions: there is to be one."""
    stopping = threading.Event()
    index = Index(new_client(url, None, 60), ALIAS, stopping=stopping)
    names = PublishSettings.__dataclass_fields__.keys() & TrainerSettings.model_fields.keys()
    publish_settings = PublishSettings(
        **{name: getattr(settings, name) for name in names}
        | {"first_publish_interval_seconds": 1e6, "full_publish_interval_seconds": 1e6, "publish_interval_seconds": 0.1}
    )
    rollout = Rollout(index, Versions(model_dir), publish_settings)
    return Publisher(rollout, model, progress, metrics, stopping=stopping)


def publish(publisher: Publisher) -> float:
    """Seconds from the copy to the alias."""
    started = time.perf_counter()
    while not publisher.idle:
        publisher.advance()
        time.sleep(0.005)
    return time.perf_counter() - started


def deltas(
    publisher: Publisher, model: Model, progress: Progress, metrics: Metrics, random: np.random.Generator
) -> float:
    """Items a second of deltas, of the time that their writing takes."""
    before = [metrics.registry.get_sample_value(name, {"kind": "delta"}) or 0.0 for name in DELTA_METRICS]
    num_items = len(model.catalogue)
    for _ in range(DELTAS):
        progress.step += 1
        rows = random.choice(num_items, min(DELTA_ITEMS, num_items), replace=False)
        model.catalogue.admit(
            model.catalogue.item_hash[rows], [model.catalogue.item_id(int(r)) for r in rows], progress.step
        )
        model.catalogue.count(rows)
        model.catalogue.embed(rows, model.learner.embed_items)
        publish(publisher)
    after = [metrics.registry.get_sample_value(name, {"kind": "delta"}) or 0.0 for name in DELTA_METRICS]
    items, seconds = (late - early for late, early in zip(after, before, strict=True))
    return items / seconds


DELTA_METRICS = ("streamtower_trainer_items_published_total", "streamtower_trainer_publish_seconds_sum")


def rendered_items(model: Model, version: Version, settings: TrainerSettings) -> tuple[Any, ...]:
    """What was published, as arrays: dense [n, D + H] or, with a graph, one more, and the sparse vectors."""
    rows = np.arange(len(model.catalogue))
    log_counts, scale = model.catalogue.log_counts(rows), settings.popularity_scale
    dense = joined_vectors(model.catalogue.embedding[rows], log_counts, version.landmark, scale, version.length)
    assert model.covisit is not None
    return dense, model.covisit.item_vectors(rows, model.catalogue.item_hash)


@contextmanager
def serving(qdrant: str, directory: Path) -> Iterator[str]:
    """A retriever process; its URL."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STREAMTOWER_")}
    told = {
        "QDRANT": qdrant, "ALIAS": ALIAS, "MODEL_DIR": str(directory / "models"), "PORT": "0", "KAFKA": "127.0.0.1:9",
        "HISTORY_WAIT_SECONDS": "0", "SEARCH_TIMEOUT_SECONDS": "30",
    }  # fmt: skip
    environment |= {f"STREAMTOWER_RETRIEVER_{name}": value for name, value in told.items()}
    with open(directory / "retriever.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "retriever"], env=environment, stderr=log, cwd=Path(__file__).parent.parent
        )
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r'"port": ?(\d+)', (directory / "retriever.log").read_text())):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((directory / "retriever.log").read_text()[-2_000:])
            time.sleep(0.05)
        url = f"http://127.0.0.1:{found[1]}"
        while b"model_version" not in _version(url):
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _version(url: str) -> bytes:
    try:
        with urllib.request.urlopen(f"{url}/v1/version", timeout=5) as answer:
            return bytes(answer.read())
    except OSError:
        return b""


def ask_all(url: str, bodies: list[bytes], callers: int, num_requests: int) -> tuple[list[float], list[Any]]:
    """Seconds of each request, and what was answered; the callers share the requests."""
    seconds: list[float] = []
    answers: dict[int, Any] = {}
    turn = iter(range(num_requests))
    lock = threading.Lock()

    def call() -> None:
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        while True:
            with lock:
                number = next(turn, None)
            if number is None:
                break
            started = time.perf_counter()
            connection.request(
                "POST", "/v1/candidates", bodies[number % len(bodies)], {"content-type": "application/json"}
            )
            response = connection.getresponse()
            body = response.read()
            seconds.append(time.perf_counter() - started)
            if response.status != 200:
                raise RuntimeError(body.decode())
            answers[number] = body
        connection.close()

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(answers) != num_requests:
        raise RuntimeError("a request failed")
    return seconds, [json.loads(answers[number]) for number in range(num_requests)] if callers == 1 else []


def measured(
    row: Callable[[str, float, str], None], url: str, bodies: list[bytes], callers: int, num_requests: int
) -> None:
    """Rows of one number of callers."""
    before = stages(url)
    started = time.perf_counter()
    seconds, _ = ask_all(url, bodies, callers, num_requests)
    elapsed = time.perf_counter() - started
    after = stages(url)
    name = f"c{callers}"
    for percent in (50, 95, 99):
        row(f"{name}.p{percent}_ms", 1e3 * float(np.percentile(seconds, percent)), "ms")
    row(f"{name}.requests_per_second", num_requests / elapsed, "1/s")
    means = {
        stage: 1e3 * (after[stage][0] - before[stage][0]) / (after[stage][1] - before[stage][1]) for stage in after
    }
    row(f"{name}.encode_mean_ms", means["encode"], "ms")
    row(f"{name}.search_mean_ms", means["search"], "ms")
    row(f"{name}.rest_mean_ms", 1e3 * float(np.mean(seconds)) - means["encode"] - means["search"], "ms")


def stages(url: str) -> dict[str, tuple[float, float]]:
    """The retriever's own sums of seconds and counts, by stage."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    stem = "streamtower_retriever_request_seconds"
    return {
        stage: (
            float(re.search(rf'{stem}_sum{{stage="{stage}"}} (\S+)', text)[1]),  # type: ignore[index]
            float(re.search(rf'{stem}_count{{stage="{stage}"}} (\S+)', text)[1]),  # type: ignore[index]
        )
        for stage in ("encode", "search")
    }


def recall_over_http(exact: Exact, item_ids: list[str], queries: list[Query], answers: list[Any]) -> float:
    """Mean share of the exact best K that the answers have, or others that are as good."""
    number = {item: place for place, item in enumerate(item_ids)}
    recalls = []
    for query, answer in zip(queries, answers, strict=True):
        found = np.array([number[candidate["item_id"]] for candidate in answer["candidates"]])
        recalls.append(recall_of(found, exact.scores(query), K))
    return float(np.mean(recalls))


def compare(row: Callable[[str, float, str], None], exact: Exact, queries: list[Query], *, with_faiss: bool) -> None:
    """Rows of numpy and faiss."""
    say("numpy …")
    seconds = [timed(lambda q=query: exact.best(q, K)) for query in queries[:COMPARED]]
    row("numpy_exact.p50_ms", 1e3 * float(np.percentile(seconds, 50)), "ms")
    row("numpy_exact.p99_ms", 1e3 * float(np.percentile(seconds, 99)), "ms")
    scores = [exact.scores(query) for query in queries[:COMPARED]]
    for name, build in faiss_searchers(exact) if with_faiss else ():
        say(f"{name} …")
        started = time.perf_counter()
        best = build()
        row(f"{name}.build_seconds", time.perf_counter() - started, "s")
        found = [best(query, K) for query in queries[:COMPARED]]
        seconds = [timed(lambda q=query, b=best: b(q, K)) for query in queries[:COMPARED]]
        row(f"{name}.p50_ms", 1e3 * float(np.percentile(seconds, 50)), "ms")
        row(f"{name}.p99_ms", 1e3 * float(np.percentile(seconds, 99)), "ms")
        pairs = zip(found, scores, strict=True)
        row(f"{name}.recall_at_100", float(np.mean([recall_of(places, of, K) for places, of in pairs])), "ratio")


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
