"""Real servers for the tests: the embedded ones, or the foreign ones that two variables of the environment name."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TypeVar

import pytest

pytest_plugins = ["tests.fixtures.kafka", "tests.fixtures.secured_kafka", "tests.fixtures.qdrant"]

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

ABSENT_IN_CI = "STREAMTOWER_KAFKA_HOME is unset"
"""Apache Kafka alone is not for CI to install: it is used where one is given. All else that is missing there fails."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return failed_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return failed_in_ci((yield))


def failed_in_ci(report: Report) -> Report:
    """In CI, a skip for anything but the declared reason as a failure."""
    if os.environ.get("CI") == "true" and report.outcome == "skipped" and ABSENT_IN_CI not in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped, which counts as a failure in CI: {report.longrepr}"
    return report
