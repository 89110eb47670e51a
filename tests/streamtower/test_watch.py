"""Reading metrics: sums, rates and quantiles by value, from text as services serve it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from streamtower.figures import SERVABLE, figures
from streamtower.watch import Reading, Watch, rate


def reading(time: float, *samples: tuple[str, dict[str, str], float]) -> Reading:
    return Reading(time, {(name, frozenset(labels.items())): value for name, labels, value in samples})


def histogram(name: str, edges: list[str], cumulative: list[float]) -> list[tuple[str, dict[str, str], float]]:
    return [(f"{name}_bucket", {"le": edge}, count) for edge, count in zip(edges, cumulative, strict=True)]


def test_a_value_is_the_sum_over_the_labels_that_are_left_open() -> None:
    seen = reading(0.0, ("x", {"k": "10", "p": "a"}, 1.0), ("x", {"k": "10", "p": "b"}, 2.0), ("x", {"k": "100"}, 4.0))
    assert seen.value("x") == 7.0
    assert seen.value("x", k="10") == 3.0
    assert seen.value("x", k="10", p="b") == 2.0
    assert math.isnan(seen.value("y"))


def test_a_quantile_is_linear_inside_its_bucket() -> None:
    seen = reading(0.0, *histogram("h", ["1.0", "2.0", "4.0", "+Inf"], [10.0, 30.0, 40.0, 40.0]))
    assert seen.quantile("h", 0.25) == pytest.approx(1.0)
    assert seen.quantile("h", 0.5) == pytest.approx(1.5)
    assert seen.quantile("h", 0.875) == pytest.approx(3.0)
    assert seen.quantile("h", 1.0) == pytest.approx(4.0)


def test_a_quantile_beyond_the_last_edge_is_that_edge_and_of_nothing_is_not_a_number() -> None:
    assert reading(0.0, *histogram("h", ["1.0", "+Inf"], [1.0, 10.0])).quantile("h", 0.95) == 1.0
    assert math.isnan(reading(0.0, *histogram("h", ["1.0", "+Inf"], [0.0, 0.0])).quantile("h", 0.5))
    assert math.isnan(reading(0.0).quantile("h", 0.5))


def test_a_quantile_since_a_reading_leaves_out_what_was_before() -> None:
    edges = ["1.0", "2.0", "+Inf"]
    before, after = (reading(0.0, *histogram("h", edges, counts)) for counts in ([100.0] * 3, [100.0, 110.0, 110.0]))
    assert after.quantile("h", 0.5) < 1.0
    assert after.quantile("h", 0.5, since=before) == pytest.approx(1.5)
    assert math.isnan(after.quantile("h", 0.5, since=after))


def test_a_rate_is_growth_by_time() -> None:
    before, after = reading(10.0, ("c", {}, 100.0)), reading(12.5, ("c", {}, 350.0))
    assert rate(before, after, "c") == 100.0
    assert math.isnan(rate(before, before, "c"))
    assert math.isnan(rate(before, after, "d"))


@pytest.fixture
def service() -> Iterator[SimpleNamespace]:
    """A service that serves `text`, or fails while `text` is None."""
    state = SimpleNamespace(text="")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500 if state.text is None else 200)
            self.end_headers()
            self.wfile.write((state.text or "").encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/metrics"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_service_that_fails_keeps_what_it_said_last(service: SimpleNamespace) -> None:
    watch = Watch({"one": service.url, "away": "http://127.0.0.1:1/metrics"})
    service.text = '# TYPE a_total counter\na_total{k="1"} 2\n'
    assert watch.read().value("a_total") == 2.0
    service.text = None
    assert watch.read().value("a_total") == 2.0
    service.text = '# TYPE a_total counter\na_total{k="1"} 3\n'
    assert watch.read().value("a_total") == 3.0
    watch.close()


def test_every_figure_is_one_that_the_services_really_publish(service: SimpleNamespace) -> None:
    """Fed with the metrics of the services' own code, no figure stays unknown."""
    from prometheus_client import generate_latest

    from streams.metrics import Metrics as StreamsMetrics
    from trainer.metrics import Metrics as TrainerMetrics

    streams, trainer = StreamsMetrics(), TrainerMetrics()
    streams.clicks.inc(9)
    streams.frequency_drift.set(0.25)
    streams.dead_letters.labels("not_json").inc(2)
    streams.dead_letters.labels("bad_id").inc(1)
    trainer.clicks_learnt.inc(6)
    trainer.clicks_evaluated.inc(5)
    trainer.loss.set(4.5)
    trainer.loss_first.set(5.5)
    trainer.prequential_recall.labels("10").set(0.1)
    trainer.popularity_recall.labels("100").set(0.3)
    trainer.items_published.labels("full").inc(100)
    trainer.items_published.labels("delta").inc(20)
    trainer.click_to_servable.observe(np.array([0.5] * 10))
    service.text = (generate_latest(streams.registry) + generate_latest(trainer.registry)).decode()
    watch = Watch({"both": service.url})
    seen = figures(watch.read())
    watch.close()
    assert not [name for name, value in vars(seen).items() if math.isnan(value)]
    assert (seen.clicks_received, seen.clicks_learnt, seen.clicks_dead_lettered) == (9.0, 6.0, 3.0)
    assert (seen.frequency_drift, seen.loss, seen.loss_first) == (0.25, 4.5, 5.5)
    assert (seen.recall_at_10, seen.popularity_recall_at_100, seen.items_published) == (0.1, 0.3, 120.0)
    assert seen.click_to_servable_p95_seconds == pytest.approx(0.5, rel=0.25)


def test_loss_and_recall_are_unknown_before_anything_is_learnt() -> None:
    trainer = "streamtower_trainer_"
    seen = figures(
        reading(
            0.0,
            (trainer + "clicks_learnt_total", {}, 0.0),
            (trainer + "clicks_evaluated_total", {}, 0.0),
            (trainer + "loss", {}, 0.0),
            (trainer + "prequential_recall_at_k", {"k": "10"}, 0.0),
            *histogram(SERVABLE, ["1.0", "+Inf"], [0.0, 0.0]),
        )
    )
    assert math.isnan(seen.loss)
    assert math.isnan(seen.recall_at_10)
    assert math.isnan(seen.click_to_servable_p95_seconds)
    assert seen.clicks_learnt == 0.0
