"""Child processes: ended in order, killed at the deadline, and never left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from streamtower.processes import ChildProcess, ProcessError, end_all

READY = 'print(\'{"event": "ready"}\', flush=True); '


def child(tmp_path: Path, code: str, name: str = "child", **environment: str) -> ChildProcess:
    return ChildProcess(name, [sys.executable, "-c", code], tmp_path / f"{name}.log", environment)


def wait_said(process: ChildProcess, event: str) -> None:
    deadline = time.monotonic() + 20
    while not process.has_said(event):
        assert time.monotonic() < deadline, process.tail()
        time.sleep(0.01)


def test_its_output_and_environment_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "child.log").write_text('{"event": "ready"}\n')  # of an earlier one
    process = child(tmp_path, "import os; print(os.environ['COLOUR'], os.getsid(0) == os.getpid())", COLOUR="red")
    assert process.end(time.monotonic() + 20) == 0
    assert process.tail() == "red True"
    assert not process.has_said("ready")


def test_one_that_ended_by_itself_is_told_with_its_last_words(tmp_path: Path) -> None:
    process = child(tmp_path, "print('out of tea'); raise SystemExit(78)")
    while process.exit_code is None:
        time.sleep(0.01)
    with pytest.raises(ProcessError, match=r"child ended with exit code 78; the end of .*child\.log:\nout of tea"):
        process.check()


def test_a_signal_is_told_by_its_name(tmp_path: Path) -> None:
    process = child(tmp_path, READY + "import time; time.sleep(100)")
    wait_said(process, "ready")
    process.check()
    os.kill(process.pid, signal.SIGKILL)
    assert process.end(time.monotonic() + 20) == -signal.SIGKILL
    with pytest.raises(ProcessError, match="child was ended by SIGKILL"):
        process.check()


def test_all_are_asked_at_once_and_who_does_not_listen_is_killed(tmp_path: Path) -> None:
    polite = child(tmp_path, READY + "import time; time.sleep(100)", "polite")
    deaf = child(
        tmp_path,
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + "time.sleep(100)",
        "deaf",
    )
    for process in (polite, deaf):
        wait_said(process, "ready")
    assert end_all([deaf, polite], 0.5) == {"deaf": -signal.SIGKILL, "polite": -signal.SIGTERM}
    assert not psutil.pid_exists(polite.pid)
    assert not psutil.pid_exists(deaf.pid)


def test_its_own_children_end_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
        "print(p.pid, flush=True); " + READY + "time.sleep(100)"
    )
    process = child(tmp_path, code)
    wait_said(process, "ready")
    grandchild = psutil.Process(int(process.tail().splitlines()[0]))
    process.ask_to_end()
    process.end(time.monotonic() + 20)
    deadline = time.monotonic() + 20
    while grandchild.is_running() and grandchild.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
