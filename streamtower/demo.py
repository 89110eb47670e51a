"""The demo: starts everything on this machine, replays clicks through it, shows what happens, and ends everything.

Station: the whole way of the data at once. It only puts the other modules of this package in order.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console

from streamtower.asking import lines_for
from streamtower.dashboard import Dashboard, View
from streamtower.datasets.clicks import Dataset
from streamtower.figures import Figures, figures
from streamtower.machine import machine, versions
from streamtower.processes import ProcessError
from streamtower.producer import ClickProducer
from streamtower.replay import Replay
from streamtower.stack import Servers, Stack, state_directory
from streamtower.summary import candidates_example, document
from streamtower.watch import Reading, Watch, rate

REFRESH_SECONDS = 0.5
RATE_SECONDS = 5.0
"""Rates are taken over this long."""
DRAIN_SECONDS = 10.0
"""At the end, for the clicks that are under way."""
BULKY = ("checkpoints", "models", "index", "snapshots")
"""What a run leaves in its directory that nobody needs afterwards; the logs stay."""


@dataclass(frozen=True)
class Options:
    """How to run."""

    rate: float = 2_000.0
    """Clicks a second, > 0."""
    seconds: float | None = None
    """From the first click to the end; None: until Ctrl-C."""
    servers: Servers = field(default_factory=Servers)
    directory: Path | None = None
    """For logs, checkpoints and models, which then stay; None: logs in the state directory."""
    seed: int = 0


def run_demo(dataset: Dataset, options: Options, console: Console) -> tuple[dict[str, Any], bool]:
    """Runs until the time is up or somebody interrupts.

    Args:
        console: on stderr, for what happens meanwhile.

    Returns:
        The summary, and whether the demo was interrupted.

    Raises:
        ProcessError, and what `Stack.start` raises: after everything that was started has ended.
    """
    started = time.monotonic()
    with ExitStack() as exits:
        exits.callback(_take_signals())
        directory = options.directory or exits.enter_context(_RunDirectory())
        directory.mkdir(parents=True, exist_ok=True)
        console.print(f"logs: {directory}", highlight=False, soft_wrap=True)
        stack = exits.enter_context(Stack(options.servers, directory, dataset, lambda line: console.print(line)))
        producer = ClickProducer({"bootstrap.servers": stack.kafka}, stack.topics)
        names = send_items(dataset, producer)
        stack.wait_listening()
        stack.wait_ready("streams")
        stack.wait_ready("trainer")
        if dataset.num_items:  # then there is something to publish before the first click
            console.print("publishing the items", highlight=False)
            stack.wait_ready("retriever")
        return _Run(dataset, options, console, stack, producer, names, started).go()


class _Run:
    """From the first click to the summary."""

    def __init__(
        self,
        dataset: Dataset,
        options: Options,
        console: Console,
        stack: Stack,
        producer: ClickProducer,
        names: dict[str, str],
        started: float,
    ) -> None:
        self._dataset, self._options, self._console, self._stack = dataset, options, console, stack
        self._names, self._demo_started = names, started
        self._num_items_sent = producer.num_sent
        self._replay = Replay(dataset.clicks(), producer, options.rate)
        self._watch = Watch(stack.metrics_urls())
        self._readings: list[tuple[Reading, int]] = []
        self._first_candidates_seconds: float | None = None
        # Somebody who clicks much and soon: asking for them works, and shows a history.
        piece = next(dataset.clicks())
        users = piece.user_id.to_pylist()
        self._user_id = max(dict.fromkeys(users), key=users.count)
        item_id = piece.item_id[users.index(self._user_id)].as_py()
        self._lines = lines_for(stack.retriever, stack.qdrant, options.servers.alias, self._user_id, item_id)

    def go(self) -> tuple[dict[str, Any], bool]:
        interrupted = False
        self._replay.start()
        self._started = time.monotonic()
        try:
            with Dashboard(self._console, self._lines) as dashboard:
                end = None if self._options.seconds is None else self._started + self._options.seconds
                while end is None or time.monotonic() < end:
                    self._look(dashboard, "(end of the data: still serving)" if self._replay.at_end else "")
                    time.sleep(REFRESH_SECONDS)
                self._replay.stop()
                self._drain(dashboard)
        except KeyboardInterrupt:
            _ignore_signals()  # the end has begun, and it is bounded
            interrupted = True
            self._replay.stop(1.0)
            self._read()
        summary = self._summary(5.0 if not interrupted else 1.0)
        self._watch.close()
        return summary, interrupted

    def _look(self, dashboard: Dashboard, note: str) -> Figures:
        self._stack.check()
        if self._replay.error is not None:
            raise ProcessError(f"the replay ended: {self._replay.error}") from self._replay.error
        now, then = self._read(), self._readings[0]
        if self._first_candidates_seconds is None and self._can_ask():
            self._first_candidates_seconds = time.monotonic() - self._demo_started
            self._console.print(f"first candidates after {self._first_candidates_seconds:.0f} s")
        seconds = now.time - then[0].time
        seen = figures(now)
        dashboard.show(
            View(
                seconds=now.time - self._started,
                figures=seen,
                clicks_produced=self._replay.num_sent,
                produced_rate=(self._replay.num_sent - then[1]) / seconds if seconds > 0 else 0.0,
                learnt_rate=rate(then[0], now, "streamtower_trainer_clicks_learnt_total"),
                note=note,
            ),
            can_ask=self._first_candidates_seconds is not None,
        )
        return seen

    def _read(self) -> Reading:
        reading = self._watch.read()
        self._readings = [old for old in self._readings if reading.time - old[0].time < RATE_SECONDS]
        self._readings.append((reading, self._replay.num_sent))
        return reading

    def _can_ask(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self._stack.retriever}/readyz", timeout=1.0, trust_env=False).status_code == 200
        return False

    def _drain(self, dashboard: Dashboard) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline:
            seen = self._look(dashboard, "(taking in what is under way)")
            if seen.clicks_learnt + seen.clicks_dead_lettered >= self._replay.num_sent:
                return
            time.sleep(0.1)

    def _summary(self, timeout_seconds: float) -> dict[str, Any]:
        popular = [item_id for item_id, _ in self._replay.item_counts.most_common(50)]
        example = candidates_example(
            self._stack.retriever, self._user_id, popular, self._names, timeout_seconds=timeout_seconds
        )
        return document(
            figures(self._readings[-1][0]),
            self._replay.num_sent,
            example,
            data=self._dataset.name,
            rate=self._options.rate,
            seed=self._options.seed,
            seconds=round(time.monotonic() - self._started, 1),
            seconds_to_first_candidates=self._first_candidates_seconds and round(self._first_candidates_seconds, 1),
            machine=machine(),
            versions=versions(),
        )


def send_items(dataset: Dataset, producer: ClickProducer) -> dict[str, str]:
    """Sends all items; returns what to call them."""
    names = {}
    for event in dataset.items():
        producer.produce_item(event)
        if dataset.item_name and isinstance(name := event.payload.get(dataset.item_name), str):
            names[event.item_id] = name
    producer.flush()
    return names


class _RunDirectory:
    """A directory for one run's logs, and for what is bulky only while it lasts."""

    def __enter__(self) -> Path:
        parent = state_directory() / "demo"
        stem = time.strftime("%Y%m%d-%H%M%S")
        for path in sorted(parent.glob("*/lock")):
            _tidy(path)
        number = 0
        while True:
            self.path = parent / (f"{stem}-{number}" if number else stem)
            try:
                self.path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        self._lock = open(self.path / "lock", "w")  # held as long as the run lasts
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self.path

    def __exit__(self, *_: object) -> None:
        for name in BULKY:
            shutil.rmtree(self.path / name, ignore_errors=True)
        self._lock.close()


def _tidy(lock: Path) -> None:
    """Removes what a run that was killed has left, unless it still runs."""
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for name in BULKY:
            shutil.rmtree(lock.parent / name, ignore_errors=True)


def _take_signals() -> Any:
    """SIGTERM interrupts as Ctrl-C does. Returns what puts the old handlers back."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    old = {number: signal.signal(number, interrupt) for number in numbers}

    def put_back() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    return put_back


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """The summary as one JSON document, there whole or not at all."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    aside.replace(path)
