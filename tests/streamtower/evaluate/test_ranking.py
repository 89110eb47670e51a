"""Ranks of the baselines against a slow reference, and against the trainer's own."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtower.evaluate.ranking import NUM_BEST, Seen, ranked
from trainer.evaluate import expected_ranks


def block(target: list[int], histories: list[list[int]]) -> Any:
    return SimpleNamespace(
        target=np.array(target, np.int64),
        history_values=np.array([item for history in histories for item in history], np.int64),
        history_offsets=np.cumsum([0, *map(len, histories)]),
        __len__=None,
    )


class Block(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.target)


small = st.integers(-2, 2)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_ranks_and_best_items_are_those_of_the_slow_reference(data: st.DataObject) -> None:
    num_items, num_rows = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 4))
    item = st.integers(0, num_items + 2)  # two are not known yet
    target = data.draw(st.lists(item, min_size=num_rows, max_size=num_rows))
    histories = data.draw(st.lists(st.lists(item, max_size=6), min_size=num_rows, max_size=num_rows))
    scores = data.draw(st.lists(st.lists(small, min_size=num_items, max_size=num_items), min_size=num_rows,
                                max_size=num_rows))  # fmt: skip
    popularity = data.draw(st.lists(small, min_size=num_items, max_size=num_items))
    given_block = Block(**vars(block(target, histories)))
    seen = ranked(given_block, np.array(scores, np.float32), np.array(popularity, np.float64))
    for row in range(num_rows):
        key = [(scores[row][i], popularity[i]) for i in range(num_items)]
        candidates = [i for i in range(num_items) if i not in histories[row]]
        best = sorted(candidates, key=lambda i: (-key[i][0], -key[i][1], i))[:NUM_BEST]
        assert seen.best[row].tolist() == best + [-1] * (NUM_BEST - len(best))
        if target[row] not in candidates:
            assert seen.rank[row] == math.inf
        else:
            others = [key[i] for i in candidates if i != target[row]]
            own = key[target[row]]
            assert seen.rank[row] == 1 + sum(o > own for o in others) + sum(o == own for o in others) / 2


def test_the_rules_are_those_of_the_trainer() -> None:
    random = np.random.default_rng(0)
    queries, items = random.normal(size=(30, 4)).astype(np.float32), random.normal(size=(50, 4)).astype(np.float32)
    target, history = random.integers(50, size=30), random.integers(50, size=(30, 3))
    excluded = np.unique(np.stack([np.repeat(np.arange(30), 3), history.ravel()], axis=1), axis=0)
    scores = queries @ items.T
    scores[excluded[:, 0], excluded[:, 1]] = -np.inf
    expected = expected_ranks(scores, target)
    given_block = Block(**vars(block(target.tolist(), history.tolist())))
    assert ranked(given_block, queries @ items.T, np.zeros(50)).rank.tolist() == expected.tolist()


def test_where_nothing_was_known_every_click_is_a_miss() -> None:
    seen = Seen.nothing(3)
    assert seen.rank.tolist() == [math.inf] * 3
    assert seen.best.tolist() == [[-1] * NUM_BEST] * 3
