"""What the tests of ops/ share: the Compose file as Compose itself reads it, the metrics of the three services."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from ops import metrics_doc
from tests.fixtures.prometheus import prometheus, promtool

__all__ = ["prometheus", "promtool"]

ROOT = Path(__file__).parent.parent.parent
Compose = dict[str, Any]


def read_compose(**environment: str) -> Compose:
    """docker-compose.yml as Compose's binary reads it, with these variables and none of the caller's or of a .env."""
    binary = Path(sys.executable).with_name("docker-compose")
    done = subprocess.run(
        [
            binary,
            "--env-file",
            os.devnull,
            "-f",
            "docker-compose.yml",
            "config",
            "--no-env-resolution",
            "--format=json",
        ],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    parsed: Compose = json.loads(done.stdout)
    return parsed


@pytest.fixture(scope="session")
def compose() -> Compose:
    return read_compose()


@pytest.fixture
def compose_with() -> Callable[..., Compose]:
    """`read_compose`, for other environments than an empty one."""
    return read_compose


@pytest.fixture(scope="session")
def registries() -> dict[str, CollectorRegistry]:
    """Service → every metric that it has."""
    return metrics_doc.registries()
