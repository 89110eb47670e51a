"""The services' log: one JSON document a line, whoever writes it."""

from __future__ import annotations

import json
import subprocess
import sys

_WRITERS = """
import logging, sys, threading
import structlog
from streams.service import set_up_logs

set_up_logs("streams")
sys.setswitchinterval(1e-6)  # threads take turns as often as can be

def own():
    for number in range(1000):
        structlog.get_logger().warning("own", number=number)

def library():
    for number in range(1000):
        logging.getLogger("library").warning("a library's %d", number)

threads = [threading.Thread(target=target) for target in (own, library) * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_lines_of_services_and_of_libraries_on_other_threads_are_never_torn() -> None:
    done = subprocess.run([sys.executable, "-c", _WRITERS], capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert len(lines) == 4000
    assert all(line["level"] == "warning" for line in lines)
