"""What must be true after any chaos, recomputed one click after the other.

It shares nothing with the product but the contract: the micro-batch's codec, the hash of ids, and names.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from streams.contract import MicroBatch, Topics, hash_id

HISTORY_LENGTH = 20
ALPHA = 0.01


@dataclass
class Ledger:
    """What stands of the ledger of the trainer: see ledgered_trainer. Reads on where it was with each `read`."""

    path: Path
    learnt: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(step, partition, offsets), what was restored over taken out."""
    num_restores: int = 0
    _position: int = 0
    _rest: bytes = b""

    def read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line)
        if self._take(self._rest):
            self._rest = b""

    def _take(self, text: bytes) -> bool:
        try:
            line = json.loads(text)
        except ValueError:
            return False
        if "restored" in line:
            self.num_restores += 1
            self.learnt = [entry for entry in self.learnt if entry[0] <= line["restored"]]
        else:
            self.learnt.append((line["step"], line["partition"], line["offsets"]))
        return True

    def ends(self, num_partitions: int) -> list[int]:
        """The next offset after the last learnt one, by partition."""
        found = [0] * num_partitions
        for _, partition, offsets in self.learnt:
            found[partition] = max(found[partition], offsets[-1] + 1)
        return found


@dataclass
class Verdict:
    """What was found. `problems` is empty if all is well."""

    num_clicks: int = 0
    """Valid clicks in the topic."""
    num_rejected: int = 0
    lost: int = 0
    learnt_twice: int = 0
    problems: list[str] = field(default_factory=list)

    def say(self, problem: str) -> None:
        if len(self.problems) < 50:
            self.problems.append(problem)


def read_partition(kafka: str, topic: str, partition: int) -> list[Message]:
    """All records of a partition as of now."""
    consumer = Consumer(
        {"bootstrap.servers": kafka, "group.id": "verifier", "enable.auto.commit": False, "enable.partition.eof": True}
    )
    found: list[Message] = []
    try:
        consumer.assign([TopicPartition(topic, partition, 0)])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for message in consumer.consume(5_000, 0.2):
                if error := message.error():
                    if error.code() == KafkaError._PARTITION_EOF:
                        return found
                else:
                    found.append(message)
    finally:
        consumer.close()
    raise AssertionError(f"{topic} {partition} has no end")


def click_of(value: bytes | None) -> tuple[str, str] | None:
    """(user, item) of a valid click."""
    try:
        click = json.loads(value or b"")
        return click["user_id"], click["item_id"]
    except (ValueError, KeyError):
        return None


class Gaps:
    """How often each item is clicked: mean gaps between its clicks, in clicks; its first 1/alpha gaps weigh alike."""

    def __init__(self) -> None:
        self.step = 0
        self._last: dict[str, int] = {}
        self._mean: dict[str, float] = {}
        self._num: dict[str, int] = {}

    def hit(self, item: str) -> None:
        self.step += 1
        if item in self._last:
            gap, number = self.step - self._last[item], self._num.get(item, 0) + 1
            rate = max(ALPHA, 1 / number)
            self._mean[item] = (1 - rate) * self._mean.get(item, 0.0) + rate * gap
            self._num[item] = number
        self._last[item] = self.step

    def share(self, item: str) -> float:
        return 1 / max(1.0, self._mean.get(item, float(self.step)))


class Record(Protocol):
    """A Kafka message, as far as it is read."""

    def offset(self) -> int: ...

    def key(self) -> bytes: ...

    def value(self) -> bytes | None: ...

    def headers(self) -> list[tuple[str, bytes]]: ...


@dataclass(frozen=True)
class Left:
    """What one partition holds at the end."""

    clicks: Sequence[Record]
    dead_letters: Sequence[Record]
    micro_batches: Sequence[Record]


def read_left(kafka: str, topics: Topics, num_partitions: int) -> list[Left]:
    """Everything in the topics."""
    names = (topics.clicks, topics.dead_letters, topics.micro_batches)
    return [Left(*(read_partition(kafka, name, number) for name in names)) for number in range(num_partitions)]


def verify(
    left: Sequence[Left], acknowledged: Sequence[Sequence[int]], ledger: Ledger, progress: dict[str, Any]
) -> tuple[Verdict, dict[str, list[str]]]:
    """Checks topics, ledger and the last checkpoint's progress; also gives every user's history, newest last.

    Args:
        left: the topics, by partition.
        acknowledged: keys of the clicks that the broker has acknowledged, by partition.
    """
    verdict = Verdict()
    final: dict[str, list[str]] = {}
    learnt: list[list[int]] = [[] for _ in acknowledged]
    for _, partition, offsets in ledger.learnt:
        learnt[partition] += offsets
    for partition, (there, numbers) in enumerate(zip(left, acknowledged, strict=True)):
        records = there.clicks
        if [int(record.key()) for record in records] != sorted(numbers):
            verdict.say(f"partition {partition} of clicks holds other records than were acknowledged")
        clicks = {record.offset(): click_of(record.value()) for record in records}
        valid = {offset: click for offset, click in clicks.items() if click}
        verdict.num_clicks += len(valid)
        verdict.num_rejected += len(clicks) - len(valid)

        rows = learnt[partition]
        lost, strange = set(valid) - set(rows), set(rows) - set(valid)
        verdict.lost += len(lost)
        verdict.learnt_twice += len(rows) - len(set(rows))
        if lost or strange or rows != sorted(set(rows)):
            verdict.say(
                f"partition {partition}: {len(lost)} clicks not learnt ({sorted(lost)[:5]} …), {len(strange)} learnt "
                f"that are none, {len(rows) - len(set(rows))} twice, in order: {rows == sorted(rows)}"
            )
        if progress["learnt"].get(str(partition)) != max(clicks) + 1:
            verdict.say(f"the checkpoint is at {progress['learnt']}, partition {partition} ends at {max(clicks) + 1}")
        _check_dead_letters(verdict, there.dead_letters, records, set(clicks) - set(valid))
        final |= _check_micro_batches(verdict, there.micro_batches, valid, partition, max(clicks) + 1)
    if progress["clicks_learnt"] != verdict.num_clicks:
        verdict.say(f"the checkpoint has learnt {progress['clicks_learnt']} clicks of {verdict.num_clicks}")
    return verdict, final


def _check_dead_letters(
    verdict: Verdict, letters: Sequence[Record], records: Sequence[Record], invalid: set[int]
) -> None:
    values = {record.offset(): record.value() for record in records}
    found = {}
    for letter in letters:
        headers = dict(letter.headers())
        found[int(headers["offset"])] = letter.value()
    if found != {offset: values[offset] for offset in invalid}:
        verdict.say(f"dead letters of {sorted(set(found) ^ invalid)[:5]} … are missing, wrong or too many")


def _check_micro_batches(
    verdict: Verdict, messages: Sequence[Record], valid: dict[int, tuple[str, str]], partition: int, end: int
) -> dict[str, list[str]]:
    """Reads them as one who drops what they have seen: rows, histories, shares. Gives the histories at the end."""
    histories: dict[str, deque[str]] = {}
    gaps, seen = Gaps(), 0
    for message in messages:
        batch = MicroBatch.decode(message.value() or b"")
        where = f"micro-batch {batch.first_offset} … {batch.next_offset} of partition {partition}"
        if batch.partition != partition or batch.first_offset > seen:
            verdict.say(f"{where} does not follow upon {seen}")
        new = batch.from_offset(seen)
        due = {offset: valid[offset] for offset in range(seen, batch.next_offset) if offset in valid}
        seen = max(seen, batch.next_offset)
        if (new.offset.tolist() if new else []) != list(due):
            verdict.say(f"{where} has other rows than there are clicks")
            continue
        expected = []
        for user, item in due.values():
            history = histories.setdefault(user, deque(maxlen=HISTORY_LENGTH))
            expected.append([hash_id(old) for old in history])
            history.append(item)
            gaps.hit(item)
        if not new:
            continue
        if list(zip(new.user_id.to_pylist(), new.item_id.to_pylist(), strict=True)) != list(due.values()):
            verdict.say(f"{where} names other users or items")
        if [new.history(row).tolist() for row in range(len(new))] != expected:
            verdict.say(f"{where} has other histories than a recomputation")
        shares = [gaps.share(item) for _, item in due.values()]
        if not np.allclose(new.sampling_probability, shares, rtol=1e-4):
            verdict.say(f"{where} has other frequencies than a recomputation")
    if seen != end:
        verdict.say(f"micro-batches of partition {partition} end at {seen}, clicks at {end}")
    return {user: list(history) for user, history in histories.items()}


def check_histories_served(verdict: Verdict, retriever: str, final: dict[str, list[str]]) -> None:
    """The retriever has followed every user, through all its restarts."""
    with httpx.Client(trust_env=False, timeout=10) as client:
        for user, items in final.items():
            served = client.get(f"{retriever}/v1/users/{user}/history").json()["items"]
            if served[-HISTORY_LENGTH:] != items and served[:HISTORY_LENGTH] != items[::-1]:
                verdict.say(f"the retriever has another history of {user}: {served} instead of {items}")


def points_of(qdrant: str, collection: str) -> dict[str, tuple[int, list[float]]]:
    """Item id → (step, dense vector) of every point of a collection."""
    found: dict[str, tuple[int, list[float]]] = {}
    place: Any = None
    with httpx.Client(trust_env=False, timeout=30, base_url=qdrant) as client:
        while True:
            body = {"limit": 100, "with_payload": True, "with_vector": True, "offset": place}
            answer = client.post(f"/collections/{collection}/points/scroll", json=body)
            answer.raise_for_status()
            result = answer.json()["result"]
            for point in result["points"]:
                item, vector = point["payload"]["item_id"], point["vector"]["dense"]
                if point["id"] != hash_id(item) or item in found:
                    raise AssertionError(f"point {point['id']} of {item} is not the only one or has another's id")
                found[item] = point["payload"]["step"], vector
            place = result["next_page_offset"]
            if place is None:
                return found


def check_index(verdict: Verdict, qdrant: str, alias: str, model_dir: Path, catalogue: set[str]) -> None:
    """The live collection is that of the newest version, holds exactly these items, and all of one moment."""
    with httpx.Client(trust_env=False, timeout=30, base_url=qdrant) as client:
        aliases = {
            entry["alias_name"]: entry["collection_name"]
            for entry in client.get("/aliases").json()["result"]["aliases"]
        }
        collections = [entry["name"] for entry in client.get("/collections").json()["result"]["collections"]]
    newest = max(model_dir.glob("v[0-9]*"))
    manifest = json.loads(next(newest.glob("*.json")).read_text())
    if aliases.get(alias) != manifest["collection"]:
        verdict.say(f"the alias names {aliases.get(alias)}, the newest version is in {manifest['collection']}")
    ours = [name for name in collections if name.startswith(f"{alias}__")]
    if not 1 <= len(ours) <= 3:
        verdict.say(f"{len(ours)} collections are there: {ours}")
    points = points_of(qdrant, alias)
    if points.keys() != catalogue:
        verdict.say(
            f"the index lacks {sorted(catalogue - points.keys())[:5]} … and has {sorted(points.keys() - catalogue)[:5]}"
        )
    if len({step for step, _ in points.values()}) != 1:
        verdict.say(f"the index holds embeddings of steps {sorted({step for step, _ in points.values()})}")
    lengths = [float(np.linalg.norm(vector[: manifest["embedding_dim"]])) for _, vector in points.values()]
    if not np.allclose(lengths, 1, atol=1e-4):
        verdict.say("the index holds embeddings whose length is not 1")


def last_checkpoint(directory: Path) -> Path:
    """The newest one."""
    return max(directory.glob("c[0-9]*"))
