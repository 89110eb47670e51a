"""Child processes that never outlive the one that started them, with their output in a file.

Station: under the demo, which runs the services as processes of their own. It knows no service.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from streamtower.dev.broker import die_with_parent

TAIL_LINES = 25


class ProcessError(RuntimeError):
    """A process ended by itself or did not get ready: says which, how, and the end of what it wrote."""


class ChildProcess:
    """One running command in a session of its own, its output appended to `log`.

    Ctrl-C on a terminal does not reach it: whoever started it ends it, in the order that loses nothing. Linux kills it
    when its starter is killed.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Starts it.

        Args:
            name: what people call it.
            command: an absolute path first.
            environment: added to this process's own.
        """
        self.name = name
        self.log = log
        with open(log, "ab") as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                die_with_parent(list(command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(environment),
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative number of the signal that ended it."""
        return self._process.poll()

    def check(self) -> None:
        """
        Raises:
            ProcessError: it has ended.
        """
        if (code := self._process.poll()) is not None:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise ProcessError(f"{self.name} {how}; the end of {self.log}:\n{self.tail()}")

    def has_said(self, event: str) -> bool:
        """Whether its log has a line of structured log with this event."""
        with open(self.log, "rb") as log:
            log.seek(self._start)
            return f'"event": "{event}"'.encode() in log.read()

    def tail(self) -> str:
        """The last lines that it wrote."""
        with open(self.log, "rb") as log:
            log.seek(self._start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL_LINES:])

    def ask_to_end(self) -> None:
        """SIGTERM; does not wait."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self, deadline: float) -> int:
        """Waits until `deadline` (of time.monotonic) for it to end, then kills it and what is left of its session.

        Returns:
            Its exit code; −9 if it had to be killed.
        """
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # grandchildren, if any
        return code


def end_all(children: Sequence[ChildProcess], timeout_seconds: float) -> dict[str, int]:
    """Asks all of them to end at once, and returns their exit codes by name; none is left after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    for child in children:
        child.ask_to_end()
    return {child.name: child.end(deadline) for child in children}


def python_module(module: str) -> list[str]:
    """The command that runs a module with this very Python."""
    return [sys.executable, "-m", module]
