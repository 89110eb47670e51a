"""What the service answers over HTTP: its metrics, and the movers of its partitions."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from streams.metrics import Metrics
from streams.movers import MAX_MOVERS, Mover, MoversReport
from streams.serve import serve
from streams.service import ConfigurationError
from streams.settings import StreamsSettings

MOVERS = tuple(Mover(f"item-{n}", 0.5 / (n + 1), 0.25 / (n + 1), 0.693, 0.01) for n in range(MAX_MOVERS))


class Latest:
    """The report that is told; a test may put another one in its place."""

    def __init__(self) -> None:
        self.report = MoversReport()


@pytest.fixture
def latest() -> Latest:
    return Latest()


@pytest.fixture
def http(latest: Latest) -> Iterator[httpx.Client]:
    server = serve(StreamsSettings(metrics_port=0), Metrics(), lambda: latest.report)
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", trust_env=False) as client:
        yield client
    server.shutdown()
    server.server_close()


def test_movers_are_told_with_their_time_and_partitions_as_many_as_are_wanted(
    http: httpx.Client, latest: Latest
) -> None:
    assert http.get("/movers").json() == {"time": None, "partitions": [], "movers": []}
    latest.report = MoversReport(1_700_000_000.5, (0, 3), MOVERS)
    answer = http.get("/movers", params={"count": 1})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {
        "time": 1_700_000_000.5,
        "partitions": [0, 3],
        "movers": [{"item_id": "item-0", "share": 0.5, "usual": 0.25, "log_ratio": 0.693, "noise": 0.01}],
    }
    for query, count in (("", 10), ("?count=7", 7), ("?count=100", 100)):
        told = http.get(f"/movers{query}").json()["movers"]
        assert [mover["item_id"] for mover in told] == [f"item-{n}" for n in range(count)]


@pytest.mark.parametrize("query", ["count=0", "count=101", "count=", "count=-1", "count=1&count=2", "count=٣", "k=3"])
def test_a_query_that_is_not_understood_is_a_problem(http: httpx.Client, query: str) -> None:
    answer = http.get(f"/movers?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json()["detail"] == "/movers takes ?count=, 1 to 100, and nothing else"


def test_beside_them_metrics_are_served(http: httpx.Client) -> None:
    assert "streamtower_streams_clicks_total 0.0" in http.get("/metrics").text
    assert http.post("/movers").status_code == 405


def test_a_port_that_is_taken_is_a_problem_of_configuration(http: httpx.Client) -> None:
    with pytest.raises(ConfigurationError, match="set metrics_host and metrics_port"):
        serve(StreamsSettings(metrics_port=http.base_url.port or 0), Metrics(), MoversReport)
