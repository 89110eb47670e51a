"""The verifier finds what it is there to find: each fault, put into what a sound run leaves, is said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streams.contract import MicroBatch
from tests.e2e.chaos.verifier import Ledger, Left, Verdict, verify
from tests.streams.stand_ins import Event, chunk, random_clicks
from tests.streams.test_partition import Bench

VALUES: list[bytes | None] = random_clicks(256, 31)
VALUES[7], VALUES[70] = b"{", None


@dataclass(frozen=True)
class Written:
    """A record as it lies in a topic."""

    place: int
    text: bytes | None
    head: tuple[tuple[str, bytes], ...] = ()

    def offset(self) -> int:
        return self.place

    def key(self) -> bytes:
        return b"%d" % self.place

    def value(self) -> bytes | None:
        return self.text

    def headers(self) -> list[tuple[str, bytes]]:
        return list(self.head)


@dataclass
class Remains:
    """What a run of one partition leaves; a test changes it."""

    letters: list[Written]
    batches: list[MicroBatch]
    learnt: list[list[int]]
    num_learnt: int
    acknowledged: int = len(VALUES)

    def verdict(self, path: Path) -> Verdict:
        lines: list[dict[str, Any]] = [{"restored": 0, "clicks_learnt": 0}]
        lines += [{"step": n, "partition": 0, "offsets": offsets} for n, offsets in enumerate(self.learnt, 1)]
        path.write_text("".join("\n" + json.dumps(line) for line in lines))
        ledger = Ledger(path)
        ledger.read()
        left = Left(
            [Written(offset, value) for offset, value in enumerate(VALUES)],
            self.letters,
            [Written(n, batch.encode()) for n, batch in enumerate(self.batches)],
        )
        progress = {"learnt": {"0": len(VALUES)}, "clicks_learnt": self.num_learnt}
        verdict, histories = verify([left], [range(self.acknowledged)], ledger, progress)
        if not verdict.problems:
            assert sum(map(len, histories.values())) > 40
        return verdict


@pytest.fixture
def remains() -> Remains:
    bench = Bench(VALUES)
    asyncio.run(bench.work([Event(chunk(VALUES, 0))], until=lambda: bench.worker.position == len(VALUES)))
    letters = [Written(n, letter.value, tuple(letter.headers())) for n, letter in enumerate(bench.sender.letters)]
    learnt = [batch.offset.tolist() for batch in bench.batches]
    return Remains(letters, bench.batches, learnt, len(VALUES) - 2)


def test_what_a_sound_run_leaves_has_no_problem(remains: Remains, tmp_path: Path) -> None:
    verdict = remains.verdict(tmp_path / "ledger")
    assert verdict.problems == []
    assert (verdict.num_clicks, verdict.num_rejected, verdict.lost, verdict.learnt_twice) == (254, 2, 0, 0)


def test_what_comes_again_and_what_was_learnt_again_after_a_restore_is_no_problem(
    remains: Remains, tmp_path: Path
) -> None:
    remains.batches.insert(2, remains.batches[1])
    remains.batches.insert(3, remains.batches[0])
    remains.letters.append(remains.letters[0])
    assert remains.verdict(tmp_path / "ledger").problems == []
    path = tmp_path / "restored"
    lines = [
        {"restored": 0},
        {"step": 1, "partition": 0, "offsets": [0, 1]},
        {"step": 2, "partition": 0, "offsets": [2]},
        {"restored": 1},
        {"step": 2, "partition": 0, "offsets": [2, 3]},
    ]
    ledger = Ledger(path)
    for line in lines:  # read while it grows, with half a line at its end
        with path.open("a") as file:
            file.write("\n" + json.dumps(line) + '\n{"ste')
        ledger.read()
    assert ledger.learnt == [(1, 0, [0, 1]), (2, 0, [2, 3])]
    assert (ledger.num_restores, ledger.ends(2)) == (2, [4, 0])


def lose_a_click(remains: Remains) -> None:
    remains.learnt[1].pop()


def learn_twice(remains: Remains) -> None:
    remains.learnt[2].insert(0, remains.learnt[1][-1])


def learn_what_is_no_click(remains: Remains) -> None:
    remains.learnt[0].insert(7, 7)


def learn_out_of_order(remains: Remains) -> None:
    remains.learnt.reverse()


def forget_a_dead_letter(remains: Remains) -> None:
    remains.letters.pop()


def change_a_dead_letter(remains: Remains) -> None:
    remains.letters[0] = replace(remains.letters[0], text=b"another")


def change_a_history(remains: Remains) -> None:
    values = remains.batches[2].history_values.copy()
    values[-1] ^= np.uint64(1)
    remains.batches[2] = replace(remains.batches[2], history_values=values)


def change_a_frequency(remains: Remains) -> None:
    shares = remains.batches[3].sampling_probability.copy()
    shares[0] *= np.float32(0.999)
    remains.batches[3] = replace(remains.batches[3], sampling_probability=shares)


def lose_a_micro_batch(remains: Remains) -> None:
    del remains.batches[1]


def lose_the_last_micro_batch(remains: Remains) -> None:
    remains.batches.pop()


def lose_a_row(remains: Remains) -> None:
    batch = remains.batches[1]
    remains.batches[1] = replace(batch.rows(0, len(batch) - 1), next_offset=batch.next_offset)


def swap_two_users(remains: Remains) -> None:
    batch = remains.batches[0]
    remains.batches[0] = replace(batch, user_id=batch.user_id[::-1], user_hash=batch.user_hash[::-1])


def count_differently(remains: Remains) -> None:
    remains.num_learnt += 1


def lose_an_acknowledged_click_in_the_broker(remains: Remains) -> None:
    remains.acknowledged += 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lose_a_click, "1 clicks not learnt"),
        (learn_twice, "1 twice"),
        (learn_what_is_no_click, "1 learnt that are none"),
        (learn_out_of_order, "in order: False"),
        (forget_a_dead_letter, "dead letters of"),
        (change_a_dead_letter, "dead letters of"),
        (change_a_history, "other histories"),
        (change_a_frequency, "other frequencies"),
        (lose_a_micro_batch, "does not follow upon 64"),
        (lose_the_last_micro_batch, "end at 192, clicks at 256"),
        (lose_a_row, "other rows"),
        (swap_two_users, "other users or items"),
        (count_differently, "has learnt 255 clicks of 254"),
        (lose_an_acknowledged_click_in_the_broker, "other records than were acknowledged"),
    ],
)
def test_a_fault_is_said(remains: Remains, tmp_path: Path, fault: Callable[[Remains], None], said: str) -> None:
    fault(remains)
    assert any(said in problem for problem in remains.verdict(tmp_path / "ledger").problems)


def test_lost_and_doubled_clicks_are_counted(remains: Remains, tmp_path: Path) -> None:
    learn_twice(remains)
    remains.learnt[3] = remains.learnt[3][:-5]
    verdict = remains.verdict(tmp_path / "ledger")
    assert (verdict.lost, verdict.learnt_twice) == (5, 1)
