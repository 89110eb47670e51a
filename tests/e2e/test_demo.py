"""The demo as a user starts it: what it writes, and that nothing of it is left, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from streams.contract import Topics

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]
pytest.importorskip("qdrant_edge", reason="the embedded stack is not installed")

FIELDS = {
    "clicks_produced", "clicks_learnt", "clicks_dead_lettered", "clicks_in_flight", "micro_batches", "steps",
    "loss_first", "loss_last", "recall_at_10", "recall_at_100", "popularity_recall_at_10", "popularity_recall_at_100",
    "frequency_drift", "items_published", "index_version", "click_to_servable_p50_seconds",
    "click_to_servable_p95_seconds", "candidates_example",
}  # fmt: skip
END_SECONDS = 10.0


class RunningDemo:
    """A demo and what it has said so far."""

    def __init__(self, arguments: list[str], state: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamtower", "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XDG_STATE_HOME": str(state)},
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def wait_said(self, text: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self.said):
            assert self.process.poll() is None, "".join(self.said)
            assert time.monotonic() < deadline, f"{text!r} was not said: {''.join(self.said)}"
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """The demo and all that it has started."""
        demo = psutil.Process(self.process.pid)
        return [demo, *demo.children(recursive=True)]

    def close(self) -> None:
        """After its end: nothing that it could still say is waited for."""
        self._reader.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def end(self) -> str:
        """Waits for its end; what it wrote on stdout."""
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        self.process.wait(120)
        self._reader.join(10)
        return out


@contextmanager
def demo(arguments: list[str], state: Path) -> Iterator[RunningDemo]:
    running = RunningDemo(arguments, state)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
        running.close()


def no_process_is_left(family: list[psutil.Process], seconds: float) -> None:
    """A process that has ended and only waits for its parent to take notice is none."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


def test_a_demo_ends_by_itself_and_its_figures_add_up(tmp_path: Path) -> None:
    written = tmp_path / "out.json"
    arguments = ["--data", "synthetic", "--seconds", "15", "--rate", "500", "--json", str(written)]
    with demo(arguments, tmp_path / "state") as running:
        running.wait_said("first candidates after")
        family = running.family()
        assert len(family) == 6  # demo, broker, index, three services
        out = running.end()
    assert running.process.returncode == 0, "".join(running.said)
    no_process_is_left(family, 0.5)
    summary = json.loads(written.read_text())
    assert set(summary) >= FIELDS
    assert summary["clicks_produced"] == pytest.approx(7_500, rel=0.1)
    assert summary["clicks_produced"] == (
        summary["clicks_learnt"] + summary["clicks_dead_lettered"] + summary["clicks_in_flight"]
    )
    assert summary["clicks_dead_lettered"] == 0
    assert 0 <= summary["clicks_in_flight"] < 7_500
    assert summary["steps"] >= summary["micro_batches"] > 0
    assert summary["items_published"] >= 4_000
    assert summary["index_version"] >= 1
    assert 0 < summary["click_to_servable_p50_seconds"] <= summary["click_to_servable_p95_seconds"]
    example = summary["candidates_example"]
    assert len(example["candidates"]) == 10
    assert example["history"]
    assert not {item["item_id"] for item in example["history"]} & {item["item_id"] for item in example["candidates"]}
    assert f"{summary['clicks_produced']:,} produced" in out
    # The logs stay, what is bulky does not.
    [run] = (tmp_path / "state" / "streamtower" / "demo").iterdir()
    assert {path.name for path in run.iterdir()} == {"lock", "streams.log", "trainer.log", "retriever.log"}


def test_ctrl_c_ends_everything_within_ten_seconds_with_a_summary(tmp_path: Path) -> None:
    written = tmp_path / "out.json"
    with demo(["--data", "synthetic", "--rate", "300", "--json", str(written)], tmp_path / "state") as running:
        running.wait_said("first candidates after")
        family = running.family()
        started = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        running.end()
        assert time.monotonic() - started < END_SECONDS
    no_process_is_left(family, 0.5)
    assert running.process.returncode == 130
    assert json.loads(written.read_text())["clicks_produced"] > 0


def test_a_signal_during_the_start_ends_everything_too(tmp_path: Path) -> None:
    with demo(["--data", "synthetic"], tmp_path / "state") as running:
        running.wait_said("logs:")
        deadline = time.monotonic() + 60
        while len(family := running.family()) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        running.process.send_signal(signal.SIGTERM)
        running.end()
    no_process_is_left(family, 0.5)
    assert running.process.returncode == 130


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_demo_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    with demo(["--data", "synthetic", "--rate", "300"], tmp_path / "state") as running:
        running.wait_said("first candidates after")
        family = running.family()
        running.process.kill()
        running.end()
    no_process_is_left(family, 5.0)
    # What it left on the disk is removed by the next one's start; the lock is not held any more.
    [run] = (tmp_path / "state" / "streamtower" / "demo").iterdir()
    assert (run / "checkpoints").exists()
    with demo(["--data", "synthetic", "--seconds", "1", "--rate", "100"], tmp_path / "state") as following:
        following.wait_said("logs:")
        following.process.send_signal(signal.SIGTERM)
        following.end()
    assert {path.name for path in run.iterdir()} == {"lock", "streams.log", "trainer.log", "retriever.log"}


def test_a_service_that_dies_ends_the_demo_with_the_end_of_its_log(tmp_path: Path) -> None:
    with demo(["--data", "synthetic", "--rate", "300"], tmp_path / "state") as running:
        running.wait_said("first candidates after")
        family = running.family()
        [trainer] = [process for process in family if process.cmdline()[-1] == "trainer"]
        trainer.kill()
        running.end()
    no_process_is_left(family, 0.5)
    assert running.process.returncode == 1
    said = "".join(running.said)
    assert "trainer was ended by SIGKILL" in said
    assert '"event": "ready"' in said


@pytest.mark.broker
@pytest.mark.index
def test_a_demo_on_servers_that_run_already_keeps_to_its_names(
    kafka: str, topics: Topics, qdrant_url: str, alias: str, tmp_path: Path
) -> None:
    servers = ["--kafka", kafka, "--qdrant", qdrant_url, "--topic-prefix", topics.prefix, "--alias", alias]
    small = ["--data", "synthetic", "--seconds", "5", "--rate", "200"]
    with demo([*servers, *small, "--dir", str(tmp_path / "run")], tmp_path / "state") as running:
        running.end()
    assert running.process.returncode == 0, "".join(running.said)
    assert (tmp_path / "run" / "models").exists()
    # A second one would mix its clicks with those of the first: it refuses.
    with demo([*servers, *small], tmp_path / "state") as second:
        second.end()
    assert second.process.returncode == 1
    assert "--topic-prefix" in "".join(second.said)


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with demo(["--dir", str(tmp_path / "run")], tmp_path / "state") as running:
        running.end()
    assert running.process.returncode == 2
    assert "not empty" in "".join(running.said)


def test_a_broker_that_is_away_is_a_dependency_that_is_away(tmp_path: Path) -> None:
    with demo(["--data", "synthetic", "--kafka", "127.0.0.1:1"], tmp_path / "state") as running:
        running.end()
    assert running.process.returncode == 69
    assert "no Kafka broker answers at 127.0.0.1:1" in "".join(running.said)
