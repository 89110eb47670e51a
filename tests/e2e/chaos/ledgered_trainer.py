"""`python -m trainer` that also writes down what it learns: a line for each micro-batch and each restored checkpoint.

The trainer is the product's own; two methods of its loop are wrapped. The lines tell which offsets were handed to the
learner at which step; after a line `restored`, what was learnt at later steps than the checkpoint's is void.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from streams.contract import MicroBatch
from trainer import __main__ as trainer
from trainer.loop import Loop


def main() -> None:
    """Runs the trainer; the first argument is the ledger's path."""
    ledger = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(**line: object) -> None:
        # In one call, so that a SIGKILL cannot leave half a line behind; and if it did, the next one begins anew.
        os.write(ledger, b"\n" + json.dumps(line).encode())

    run, learn_rows = Loop.run, Loop._learn_rows

    def noted_run(self: Loop, stop: threading.Event) -> None:
        write(restored=self.progress.step, clicks_learnt=self.progress.clicks_learnt)
        run(self, stop)

    def noted_learn_rows(self: Loop, batch: MicroBatch) -> None:
        learn_rows(self, batch)
        write(step=self.progress.step, partition=batch.partition, offsets=batch.offset.tolist())

    Loop.run, Loop._learn_rows = noted_run, noted_learn_rows  # type: ignore[method-assign]
    trainer.main()


if __name__ == "__main__":
    main()
