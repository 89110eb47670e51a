"""How many clicks a second the whole chain takes on this machine, and how soon they count in the index.

Everything runs as in the demo: embedded broker and index, three services, one replay. The rate rises step by step; one
is sustained if, over its last two thirds, as many clicks were learnt as were produced, and at its end no more than
two seconds' worth of clicks were under way. The first rate that is not ends the climb. The freshness is that of the
clicks at the highest sustained rate.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.document import Row, parser, report
from streamtower.datasets.clicks import Clicks, Dataset
from streamtower.datasets.sources import open_dataset
from streamtower.demo import send_items
from streamtower.figures import SERVABLE, figures
from streamtower.producer import ClickProducer
from streamtower.replay import Replay
from streamtower.stack import Servers, Stack
from streamtower.watch import Watch, rate

LEARNT = "streamtower_trainer_clicks_learnt_total"
KEPT_UP = 0.95
"""Least clicks learnt for each produced: the rest is the measuring's own noise."""
UNDER_WAY_SECONDS = 2.0


@dataclass(frozen=True)
class Step:
    """What was seen at one rate."""

    rate: float
    learnt_per_second: float
    under_way: float
    freshness_p95_seconds: float

    @property
    def sustained(self) -> bool:
        return self.learnt_per_second >= KEPT_UP * self.rate and self.under_way <= UNDER_WAY_SECONDS * self.rate


def main() -> None:
    """Measures and reports."""
    options = parser("chain", (__doc__ or "").splitlines()[0])
    options.add_argument("--data", default="completejourney", help="as for the demo (default completejourney)")
    options.add_argument("--from", dest="lowest", type=float, default=1_000.0, help="first rate, clicks a second")
    options.add_argument("--to", dest="highest", type=float, default=math.inf, help="last rate, clicks a second")
    options.add_argument("--factor", type=float, default=1.25, help="between one rate and the next, > 1")
    options.add_argument("--seconds", type=float, default=30.0, help="at each rate")
    given = options.parse_args()
    dataset = open_dataset(given.data)
    with (
        tempfile.TemporaryDirectory() as directory,
        Stack(Servers(), Path(directory), dataset, lambda line: print(line, file=sys.stderr)) as stack,
    ):
        best = climb(stack, dataset, given.lowest, given.highest, given.factor, given.seconds)
    if best is None:
        sys.exit(f"not even {given.lowest:g} clicks a second are sustained here: start lower with --from")
    rows = [
        Row("chain.sustained_clicks_per_second", best.rate, "clicks/s"),
        Row("chain.freshness_p95_seconds", best.freshness_p95_seconds, "s"),
    ]
    report("chain", rows, given.json)


def climb(stack: Stack, dataset: Dataset, lowest: float, highest: float, factor: float, seconds: float) -> Step | None:
    """The highest rate that was sustained, None if the first was not."""
    producer = ClickProducer({"bootstrap.servers": stack.kafka}, stack.topics)
    send_items(dataset, producer)
    stack.wait_listening()
    stack.wait_ready("trainer")
    stack.wait_ready("streams")
    if dataset.num_items:
        stack.wait_ready("retriever")
    watch, pieces, best, sent, clicks_per_second = Watch(stack.metrics_urls()), endless(dataset), None, 0, lowest
    while clicks_per_second <= highest:
        replay = Replay(pieces, producer, clicks_per_second)
        replay.start()
        time.sleep(seconds / 3)
        before = watch.read()
        time.sleep(seconds * 2 / 3)
        after = watch.read()
        stack.check()
        learnt, under_way = rate(before, after, LEARNT), sent + replay.num_sent - figures(after).clicks_learnt
        replay.stop()
        if replay.error is not None:
            raise replay.error
        sent += replay.num_sent
        step = Step(clicks_per_second, learnt, under_way, after.quantile(SERVABLE, 0.95, since=before))
        print(
            f"{step.rate:9,.0f} clicks/s: learnt {step.learnt_per_second:,.0f}/s, {step.under_way:,.0f} under way, "
            f"servable p95 {step.freshness_p95_seconds:.1f} s: {'sustained' if step.sustained else 'too fast'}",
            file=sys.stderr,
        )
        if not step.sustained:
            break
        best, clicks_per_second = step, clicks_per_second * factor
    watch.close()
    return best


def endless(dataset: Dataset) -> Iterator[Clicks]:
    """The clicks again and again."""
    while True:
        yield from dataset.clicks()


if __name__ == "__main__":
    main()
