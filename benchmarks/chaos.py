"""Kills, ends and freezes the chain's processes at random for minutes, and counts what was lost or learnt twice.

Streams with two workers, one that joins and leaves, trainer, retriever and index run as processes under a producer that
never stops. It is the chaos suite's own scenario (tests/e2e/chaos), on the embedded broker or, where
STREAMTOWER_KAFKA_HOME points to one, on Apache Kafka, which is killed as well. Recovery is measured from the signal
until the process is ready again and, where clicks go through it, every click before the signal is learnt.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.document import Row, parser, report
from streams.contract import Topics
from streamtower.dev.broker import LocalBroker
from streamtower.topics import create_topics
from tests.e2e.chaos.chain import ApacheNode, Member, wait_until
from tests.e2e.chaos.scenario import Outcome, run

NUM_PARTITIONS = 2


def main() -> None:
    """Runs it, says every problem, and ends with 1 if there was one."""
    options = parser("chaos", (__doc__ or "").splitlines()[0])
    options.add_argument("--minutes", type=float, default=3.0, help="of killing, > 0 (default 3)")
    options.add_argument("--mean-seconds", type=float, default=5.0, help="between two signals (default 5)")
    options.add_argument("--rate", type=float, default=200.0, help="clicks a second (default 200)")
    options.add_argument("--seed", type=int, default=1, help="of every random choice (default 1)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as exits:
        kafka, brokers = start_broker(Path(folder) / "broker", exits)
        topics = Topics("chaos-")
        create_topics({"bootstrap.servers": kafka}, topics, num_partitions=NUM_PARTITIONS)
        outcome = run(
            kafka,
            topics,
            Path(folder) / "chain",
            num_partitions=NUM_PARTITIONS,
            done=lambda kills, seconds: seconds >= 60 * given.minutes,
            mean_seconds=given.mean_seconds,
            seed=given.seed,
            clicks_per_second=given.rate,
            brokers=brokers,
            tell=lambda line: print(line, file=sys.stderr),
        )
    for problem in outcome.verdict.problems:
        print(problem, file=sys.stderr)
    report("chaos", rows(outcome), given.json)
    sys.exit(1 if outcome.verdict.problems else 0)


def start_broker(folder: Path, exits: ExitStack) -> tuple[str, list[Member]]:
    """Its address, and what of it may be killed: the embedded broker keeps nothing, so it is spared."""
    if home := os.environ.get("STREAMTOWER_KAFKA_HOME"):
        node = ApacheNode(Path(home), folder)
        exits.callback(node.kill)
        node.start()
        wait_until(lambda: node.is_ready, "Apache Kafka is ready")
        return node.bootstrap, [node]
    return exits.enter_context(LocalBroker(0)).bootstrap, []


def rows(outcome: Outcome) -> list[Row]:
    """The figures of one run."""
    verdict = outcome.verdict
    return [
        Row("chaos.kills", outcome.num_kills, "signals"),
        Row("chaos.clicks", verdict.num_clicks, "clicks"),
        Row("chaos.lost", verdict.lost, "clicks"),
        Row("chaos.learnt_twice", verdict.learnt_twice, "clicks"),
        Row("chaos.recovery_p50_seconds", statistics.median(outcome.recoveries), "s"),
        Row("chaos.recovery_max_seconds", max(outcome.recoveries), "s"),
    ]


if __name__ == "__main__":
    main()
