"""From the first click to the verdict: a chain under a producer that never stops and a killer that does not either."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from confluent_kafka import Producer
from safetensors import safe_open
from safetensors.numpy import load_file

from streams.contract import Topics
from tests.e2e.chaos.chain import Chain, Member, wait_until
from tests.e2e.chaos.killer import Killer
from tests.e2e.chaos.verifier import (
    Ledger,
    Verdict,
    check_histories_served,
    check_index,
    click_of,
    last_checkpoint,
    points_of,
    read_left,
    read_partition,
    verify,
)
from tests.e2e.chaos.writer import NUM_ITEMS, NUM_USERS, Writer

QUIET_SECONDS = 180.0
"""Longest time from the last disturbance to the last click learnt."""
NEVER_CLICKED = [f"quiet-{n}" for n in range(30)]
GONE = set(NEVER_CLICKED[:5])

Points = dict[str, tuple[int, list[float]]]
"""Item id → (step, vector)."""


@dataclass
class Outcome:
    """What one run gave."""

    verdict: Verdict
    num_kills: int
    num_broker_kills: int
    recoveries: list[float]
    points: Points
    """What the live collection holds at the end."""


def write_items(kafka: str, topics: Topics) -> None:
    """Items that will be clicked, items that never are, and some of these gone again."""
    producer = Producer({"bootstrap.servers": kafka})
    for item in [*(f"i{n}" for n in range(NUM_ITEMS)), *NEVER_CLICKED]:
        value = json.dumps({"item_id": item, "features": {}, "payload": {"name": item}}).encode()
        producer.produce(topics.items, value, item.encode())
    for item in sorted(GONE):
        producer.produce(topics.items, None, item.encode())
    assert producer.flush(30) == 0


def run(
    kafka: str,
    topics: Topics,
    directory: Path,
    *,
    num_partitions: int,
    done: Callable[[int, float], bool],
    mean_seconds: float,
    seed: int,
    clicks_per_second: float = 200.0,
    batch_age_seconds: float = 0.25,
    static_members: bool = False,
    brokers: Sequence[Member] = (),
    tell: Callable[[str], None] = print,
) -> Outcome:
    """Starts a chain, disturbs it until `done` (kills, seconds), lets it come to rest, and verifies.

    Args:
        kafka: a broker with the four topics.
        directory: for everything that the chain keeps; made here.
        mean_seconds: between two disturbances.
        brokers: killed too; they must keep their data.
    """
    write_items(kafka, topics)
    chain = Chain(kafka, topics, directory, batch_age_seconds=batch_age_seconds, static_members=static_members)
    writer = Writer(kafka, topics, num_partitions, clicks_per_second, seed)
    ledger = Ledger(chain.ledger)
    killer = Killer(chain, writer, ledger, seed, mean_seconds, list(brokers), only_groups_at_rest=not brokers)
    try:
        chain.start()
        writer.start()
        wait_until(lambda: ledger.read() or all(ledger.ends(num_partitions)), "something is learnt")
        tell("started")
        killer.run(done)
        tell(f"{killer.num_kills} kills; coming to rest")
        writer.finish(chain.batch_size)
        recovered = killer.watch_recovery(QUIET_SECONDS)
        ends = writer.written()
        wait_until(lambda: ledger.read() or ledger.ends(num_partitions) == ends, "every click is learnt", QUIET_SECONDS)
        for slow in sorted(killer.disturbances, key=lambda found: -(found.recovered or 0))[:5]:
            tell(f"{slow.member.name} {slow.signal}: recovered after {slow.recovered or -1:.1f} s")
        verdict = _rest_and_verify(kafka, chain, writer, ledger)
        if not recovered:
            verdict.say(f"not recovered: {[f for f in killer.disturbances if f.recovered is None]}")
        for surprise in killer.surprises:
            verdict.say(surprise)
        num_broker_kills = sum(found.member.kind == "broker" for found in killer.disturbances)
        return Outcome(
            verdict, killer.num_kills, num_broker_kills, killer.recoveries(), points_of(chain.qdrant, chain.alias)
        )
    finally:
        if writer.is_alive():
            writer._finished.set()
            writer.join()
        chain.close()


def _rest_and_verify(kafka: str, chain: Chain, writer: Writer, ledger: Ledger) -> Verdict:
    end_trainer(chain)
    progress = json.loads((last_checkpoint(chain.checkpoints) / "progress.json").read_bytes())
    ledger.read()
    left = read_left(kafka, chain.topics, len(writer.acknowledged))
    verdict, histories = verify(left, writer.acknowledged, ledger, progress)
    # From here on nothing is learnt any more: what is published is the whole model as the checkpoint has it.
    publish_at_rest(chain)
    clicked = {click[1] for there in left for record in there.clicks if (click := click_of(record.value()))}
    catalogue = (clicked | {f"i{n}" for n in range(NUM_ITEMS)} | set(NEVER_CLICKED)) - GONE
    check_index(verdict, chain.qdrant, chain.alias, chain.models, catalogue)
    wait_until(chain.retriever_answers, "the retriever answers")
    if len(histories) != NUM_USERS:
        verdict.say(f"{len(histories)} users have clicked, not {NUM_USERS}")
    check_histories_served(verdict, chain.retriever, histories)
    body = {"user_id": "u1", "k": 10}
    answer = httpx.post(f"{chain.retriever}/v1/candidates", json=body, timeout=10, trust_env=False)
    if answer.status_code != 200 or len(answer.json()["candidates"]) != 10:
        verdict.say(f"the retriever answers {answer.status_code}: {answer.text[:500]}")
    return verdict


def end_trainer(chain: Chain) -> None:
    code = chain.trainer.end()
    assert code == 0, f"the trainer ended with {code}: see {chain.directory}"


def publish_at_rest(chain: Chain) -> None:
    """Starts the trainer, which publishes everything anew, and ends it."""
    chain.trainer.start()
    process = chain.trainer.process
    assert process
    wait_until(lambda: process.has_said("published"), "a version is published")
    end_trainer(chain)


def run_and_compare(
    kafka: str,
    topics: Topics,
    peaceful: Topics,
    directory: Path,
    *,
    done: Callable[[int, float], bool],
    mean_seconds: float,
    seed: int,
    brokers: Sequence[Member] = (),
) -> tuple[Outcome, list[str]]:
    """With one partition: the outcome, and where model and index differ from a run in peace over the same clicks.

    Micro-batches close by size alone, so that both runs cut the clicks in the same places.
    """
    outcome = run(
        kafka,
        topics,
        directory / "disturbed",
        num_partitions=1,
        done=done,
        mean_seconds=mean_seconds,
        seed=seed,
        batch_age_seconds=60,
        static_members=bool(brokers),
        brokers=brokers,
    )
    write_items(kafka, peaceful)
    records = read_partition(kafka, topics.clicks, 0)
    chain = Chain(kafka, peaceful, directory / "peaceful", num_workers=1, batch_age_seconds=60)
    ledger = Ledger(chain.ledger)
    try:
        for member in (chain.index, chain.workers[0], chain.trainer):
            member.start()
        wait_until(lambda: chain.trainer.is_ready and chain.index.is_ready, "the trainer is ready")
        producer = Producer({"bootstrap.servers": kafka, "enable.idempotence": True})
        for record in records:
            producer.produce(peaceful.clicks, record.value(), record.key(), 0)
            producer.poll(0)
        assert producer.flush(60) == 0
        wait_until(lambda: ledger.read() or ledger.ends(1) == [len(records)], "every click is learnt", QUIET_SECONDS)
        end_trainer(chain)
        publish_at_rest(chain)
        points = points_of(chain.qdrant, chain.alias)
    finally:
        chain.close()
    return outcome, differences((directory / "disturbed", outcome.points), (directory / "peaceful", points))


def learnt(checkpoint: Path) -> dict[str, npt.NDArray[Any]]:
    """Every column of the model in a checkpoint: cNEW, or cNEW-FULL with some rows of its tables on top of cFULL's. All
    but the steps, which count polls."""
    layout, arrays = columns_of(checkpoint)
    if full := checkpoint.name.partition("-")[2]:
        _, below = columns_of(checkpoint.with_name(f"c{full}"))
        for name, table in layout["tables"].items():
            if (rows := arrays.get(f"rows/{table}")) is not None:
                num_rows = max(len(below[name]), int(rows.max(initial=-1)) + 1)
                whole = np.empty((num_rows, *below[name].shape[1:]), below[name].dtype)
                whole[: len(below[name])], whole[rows] = below[name], arrays[name]
                arrays[name] = whole
    steps = {"catalogue.added", "catalogue.touched"}
    return {name: arrays[name] for name in layout["kinds"] if name not in steps}


def columns_of(checkpoint: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Layout and columns of one file. Columns with rows of different lengths come as objects: the bytes of each row."""
    path = checkpoint / "columns.safetensors"
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        layout = json.loads(file.metadata()["layout"])
    for name, kind in layout["kinds"].items():
        if kind != "array":
            lengths, values = arrays.pop(f"{name}/lengths"), arrays.pop(f"{name}/values")
            ends = np.cumsum(lengths.sum(1))
            rows = [
                length.tobytes() + values[end - length.sum() : end].tobytes()
                for length, end in zip(lengths, ends, strict=True)
            ]
            arrays[name] = np.array(rows, object)
    return layout, arrays


def differences(first: tuple[Path, Points], second: tuple[Path, Points]) -> list[str]:
    """Where two chains' last models and live collections are not the same, bit for bit."""
    found = []
    models = [learnt(last_checkpoint(path / "checkpoints")) for path, _ in (first, second)]
    if models[0].keys() != models[1].keys():
        found.append(f"columns {models[0].keys() ^ models[1].keys()}")
    for name in models[0].keys() & models[1].keys():
        one, other = models[0][name], models[1][name]
        if one.shape != other.shape:
            found.append(f"column {name}: {one.shape} against {other.shape}")
        elif one.tolist() != other.tolist() if one.dtype == object else one.tobytes() != other.tobytes():
            found.append(f"column {name}: {np.sum(one != other)} values differ")
    vectors = [{item: vector for item, (_, vector) in points.items()} for _, points in (first, second)]
    if vectors[0].keys() != vectors[1].keys():
        found.append(f"points {sorted(vectors[0].keys() ^ vectors[1].keys())[:5]}")
    found += [
        f"vector of {item}" for item in vectors[0].keys() & vectors[1].keys() if vectors[0][item] != vectors[1][item]
    ]
    return found
