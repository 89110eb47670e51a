"""Feeds damaged inputs to everything that reads bytes from outside, and counts what fails on them or is misread.

The readers, the damage and the strict readings that answers are held against are the test suite's (tests/fuzz); this is
its longer form. Every failing input is told, shortened; the same seed makes the same inputs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.document import Row, parser, report
from tests.fuzz.targets import SHARES, Outcome, fuzz, target

_MOST_TOLD = 10


def main() -> None:
    """Runs it, tells failing inputs, and ends with 1 if there was one."""
    options = parser("fuzz", (__doc__ or "").splitlines()[0])
    options.add_argument("--inputs", type=int, default=1_000_000, help="over all readers, ≥ 100 (default 1000000)")
    options.add_argument("--seed", type=int, default=1, help="of all damage (default 1)")
    given = options.parse_args()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, share in SHARES.items():
            started = time.monotonic()
            with target(name, Path(folder)) as reader:
                outcomes[name] = fuzz(reader, round(given.inputs * share), given.seed)
            told = outcomes[name]
            print(
                f"{name}: {told.num_inputs:,} inputs, {told.num_accepted:,} accepted, {len(told.failures)} failures, "
                f"{time.monotonic() - started:.0f} s",
                file=sys.stderr,
            )
            for data, error in told.failures[:_MOST_TOLD]:
                print(f"  {error!r}: {data[:500]!r}", file=sys.stderr)
    report("fuzz", rows(outcomes), given.json)
    sys.exit(1 if any(outcome.failures for outcome in outcomes.values()) else 0)


def rows(outcomes: Mapping[str, Outcome]) -> list[Row]:
    """The figures of one run."""
    made = []
    for name, outcome in outcomes.items():
        made.append(Row(f"fuzz.{name}.inputs", outcome.num_inputs, "inputs"))
        made.append(Row(f"fuzz.{name}.accepted", outcome.num_accepted, "inputs"))
        made.append(Row(f"fuzz.{name}.failures", len(outcome.failures), "inputs"))
    made.append(Row("fuzz.inputs", sum(outcome.num_inputs for outcome in outcomes.values()), "inputs"))
    made.append(Row("fuzz.failures", sum(len(outcome.failures) for outcome in outcomes.values()), "inputs"))
    return made


if __name__ == "__main__":
    main()
