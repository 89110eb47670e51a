"""The local endpoint as a child process: ready when the call returns, never outliving its parent.

Station: how the demo and the tests get an index. Its log goes to `index.log` in its directory.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from streamtower.dev.broker import die_with_parent

HOST = "127.0.0.1"
STOP_SECONDS = 5.0
"""SIGKILL comes this long after SIGTERM; what was acknowledged is safe either way."""


class LocalIndexError(RuntimeError):
    """The endpoint did not start: says what was tried and the end of what the endpoint itself said."""


class LocalIndex:
    """A running local endpoint, from `start()` or `with` on; ready for clients when that returns.

    It has a session of its own, so that Ctrl-C on a terminal reaches it only through its starter. Linux kills it when
    the thread that started it ends: start it from one that lasts.
    """

    url: str
    """http://HOST:PORT for clients."""
    port: int
    """The wished port, or another one if that was taken. After the start it is the one in use."""
    pid: int

    def __init__(
        self, directory: Path, port: int = 0, *, api_key: str | None = None, ready_seconds: float = 30.0
    ) -> None:
        """
        Args:
            directory: where collections are kept, also after the end; made if missing.
            port: the wished one, 1–65535; 0: any free one.
            api_key: what clients must send; None: nothing.
            ready_seconds: how long it may take to answer, > 0. A directory of 100,000 points takes 1–2 s.
        """
        self.log = directory / "index.log"
        self._directory = directory
        self._wished = port
        self._api_key = api_key
        self._ready_seconds = ready_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the endpoint and waits until it answers.

        Raises:
            LocalIndexError: it ended by itself, or did not answer in time. No process is left.
        """
        if self._process is not None and self._process.poll() is None:
            raise LocalIndexError("this index runs already")
        self._directory.mkdir(parents=True, exist_ok=True)
        # Listening starts here and the child inherits the socket, so nobody can take the port in between.
        with _listen(self._wished) as listener, open(self.log, "ab") as output:
            self.port = listener.getsockname()[1]
            self.url = f"http://{HOST}:{self.port}"
            self._log_start = output.tell()
            key = [] if self._api_key is None else [f"--api-key={self._api_key}"]
            self._process = subprocess.Popen(
                die_with_parent(
                    [
                        sys.executable, "-m", "streamtower.dev.index",
                        "--dir", str(self._directory.resolve()),
                        "--fd", str(listener.fileno()),
                        *key,
                    ]
                ),
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        deadline = time.monotonic() + self._ready_seconds
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() >= deadline:
                self.stop()
                raise LocalIndexError(
                    f"the local index did not answer on {self.url} within {self._ready_seconds:g} s; "
                    f"the end of {self.log}:\n{self._said()}"
                )

    def stop(self) -> None:
        """Ends the endpoint: SIGTERM, and SIGKILL if it is still there five seconds later. Harmless if it has ended."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def exit_code(self) -> int | None:
        """None while it runs; −N if signal N ended it."""
        return None if self._process is None else self._process.poll()

    def __enter__(self) -> LocalIndex:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _ready(self) -> bool:
        """Whether it answers. The connection itself succeeds at once and waits for the child to take it."""
        try:
            with urllib.request.urlopen(f"{self.url}/readyz", timeout=0.2):  # noqa: S310 - a constant scheme
                return True
        except (OSError, urllib.error.URLError):
            return False

    def _said(self) -> str:
        with open(self.log, "rb") as log:
            log.seek(self._log_start)
            return log.read()[-2000:].decode(errors="replace")


def _listen(wished: int) -> socket.socket:
    """A listening socket on the wished port, or on a free one if that is taken."""
    try:
        return socket.create_server((HOST, wished), backlog=1024)
    except OSError:
        return socket.create_server((HOST, 0), backlog=1024)
