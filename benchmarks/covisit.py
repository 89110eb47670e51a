"""How many clicks a second co-visitation counts, on one core.

1,000,000 clicks of 20,000 users on 50,000 items, in micro-batches of 256: items by Zipf's law (exponent 1.0), half of
the clicks among the items of the user's taste (one of 500). Histories are the user's last 20 items, the window and the
partners the trainer's defaults. Finding an item's row is not in it: the catalogue does that for all its users.

Rows: covisit.clicks_per_second, covisit.scores_per_second (histories scored against all items).
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.document import Row, parser, report
from streamtower.evaluate.replay import histories_before
from trainer.covisit import Covisit

NUM_CLICKS, NUM_USERS, NUM_ITEMS, NUM_TASTES, BATCH = 1_000_000, 20_000, 50_000, 500, 256


def main() -> None:
    """Measures and reports."""
    given = parser("covisit", "Speed of the co-visitation counts.").parse_args()
    random = np.random.default_rng(0)
    share = np.cumsum(1.0 / np.arange(1, NUM_ITEMS + 1))
    popular = np.searchsorted(share, random.random(NUM_CLICKS) * share[-1])
    user = random.integers(NUM_USERS, size=NUM_CLICKS).astype(np.uint64)
    of_taste = popular // NUM_TASTES * NUM_TASTES + user.astype(np.int64) % NUM_TASTES
    item = np.where(random.random(NUM_CLICKS) < 0.5, of_taste, popular)
    row = random.permutation(NUM_ITEMS)[item]
    values, offsets = histories_before(user, row.astype(np.uint64), 20)
    histories = values.astype(np.int64)

    covisit = Covisit()
    covisit.extend(NUM_ITEMS)
    covisit.count(row[:0], histories[:0], offsets[:1])  # compiles
    started = time.process_time()
    for start in range(0, NUM_CLICKS, BATCH):
        stop = min(start + BATCH, NUM_CLICKS)
        covisit.count(row[start:stop], histories, offsets[start : stop + 1])
    seconds = time.process_time() - started

    some = offsets[-65:] - offsets[-65]
    covisit.scores(histories[offsets[-65] :], some, NUM_ITEMS)
    started = time.process_time()
    for _ in range(10):
        covisit.scores(histories[offsets[-65] :], some, NUM_ITEMS)
    scoring = time.process_time() - started
    rows = [
        Row("covisit.clicks_per_second", NUM_CLICKS / seconds, "clicks/s"),
        Row("covisit.scores_per_second", 640 / scoring, "histories/s"),
    ]
    report("covisit", rows, given.json)


if __name__ == "__main__":
    main()
