"""Everything that reads bytes from outside: what is fed to it, and what it must not do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import clicks, items, micro_batches, snapshots
from tests.fuzz.checkpoints import WORDS as CHECKPOINT_WORDS
from tests.fuzz.checkpoints import checkpoint_files
from tests.fuzz.configuration import CORPUS as CONFIGURATIONS
from tests.fuzz.configuration import WORDS as CONFIGURATION_WORDS
from tests.fuzz.configuration import environment
from tests.fuzz.http_bodies import CORPUS as BODIES
from tests.fuzz.http_bodies import WORDS as BODY_WORDS
from tests.fuzz.http_bodies import application
from tests.fuzz.mutator import Mutator

SHARES = {
    "clicks": 0.30,
    "items": 0.25,
    "micro_batches": 0.20,
    "http_bodies": 0.04,
    "checkpoints": 0.05,
    "snapshots": 0.14,
    "configuration": 0.02,
}
"""Of all inputs; what is slow gets fewer."""


@dataclass(frozen=True)
class Target:
    """One reader of bytes."""

    corpus: tuple[bytes, ...]
    """Good inputs: each is accepted."""
    words: tuple[bytes, ...]
    check: Callable[[bytes], bool]
    """Whether an input is accepted; raises on a fault, of whatever kind."""


@dataclass(frozen=True)
class Outcome:
    """What came of many inputs."""

    num_inputs: int
    num_accepted: int
    failures: list[tuple[bytes, BaseException]]


@contextmanager
def target(name: str, folder: Path) -> Iterator[Target]:
    """The reader of this name, with what it needs in `folder`, until the end of the context."""
    if name == "clicks":
        yield Target(clicks.CORPUS, clicks.WORDS, clicks.check)
    elif name == "items":
        yield Target(items.CORPUS, items.WORDS, items.check)
    elif name == "micro_batches":
        yield Target(micro_batches.CORPUS, micro_batches.WORDS, micro_batches.check)
    elif name == "snapshots":
        yield Target(snapshots.CORPUS, snapshots.WORDS, snapshots.check)
    elif name == "http_bodies":
        with application() as made:
            yield Target(BODIES, BODY_WORDS, made.check)
    elif name == "checkpoints":
        with checkpoint_files(folder) as files:
            yield Target(files.corpus, CHECKPOINT_WORDS, files.check)
    elif name == "configuration":
        with environment() as variables:
            yield Target(CONFIGURATIONS, CONFIGURATION_WORDS, variables.check)
    else:
        raise ValueError(f"no target {name!r}; there are {', '.join(SHARES)}")


def fuzz(target: Target, num_inputs: int, seed: int) -> Outcome:
    """Feeds it so many damaged inputs; a fault does not end it."""
    mutator = Mutator(target.corpus, target.words, seed)
    num_accepted = 0
    failures: list[tuple[bytes, BaseException]] = []
    for _ in range(num_inputs):
        data = mutator.mutated()
        try:
            num_accepted += target.check(data)
        except Exception as error:
            failures.append((data, error))
    return Outcome(num_inputs, num_accepted, failures)
