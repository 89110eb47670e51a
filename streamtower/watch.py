"""Reads the services' metrics, as Prometheus would, and makes of them what people and programs ask first.

Station: beside the data's way. It computes rates and quantiles from what the services say; it measures nothing itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

SCRAPE_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True)
class Reading:
    """All services' samples at one moment."""

    time: float
    """Seconds of time.monotonic."""
    samples: Mapping[tuple[str, frozenset[tuple[str, str]]], float]
    """(sample's name, labels) → value."""

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have these labels; NaN where there is none."""
        wanted = labels.items()
        found = [value for (sample, has), value in self.samples.items() if sample == name and wanted <= has]
        return math.fsum(found) if found else math.nan

    def quantile(self, histogram: str, q: float, since: Reading | None = None) -> float:
        """The q-quantile of a classic histogram, linear inside a bucket; NaN while it is empty.

        The last finite edge if the quantile lies above it: the truth is then larger.

        Args:
            since: only of what was observed after this reading.
        """
        before = {} if since is None else since.samples
        buckets = sorted(
            (float(dict(labels)["le"]), count - before.get((sample, labels), 0.0))
            for (sample, labels), count in self.samples.items()
            if sample == f"{histogram}_bucket"
        )
        if not buckets or buckets[-1][1] == 0:
            return math.nan
        rank = q * buckets[-1][1]
        low_edge, low_count = 0.0, 0.0
        for edge, count in buckets:
            if count >= rank:
                if math.isinf(edge):
                    return low_edge
                return low_edge + (edge - low_edge) * (rank - low_count) / max(count - low_count, 1e-12)
            low_edge, low_count = edge, count
        return low_edge


def rate(before: Reading, after: Reading, name: str) -> float:
    """How fast a counter grew between two readings, per second; NaN where one of them lacks it."""
    seconds = after.time - before.time
    return (after.value(name) - before.value(name)) / seconds if seconds > 0 else math.nan


class Watch:
    """Scrapes the /metrics of some services. A service that does not answer keeps the samples that it gave last."""

    def __init__(self, urls: Mapping[str, str]) -> None:
        """
        Args:
            urls: service → URL of its metrics.
        """
        self._urls = dict(urls)
        self._samples: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], float]] = {}
        self._client = httpx.Client(timeout=SCRAPE_TIMEOUT_SECONDS, trust_env=False)

    def read(self) -> Reading:
        """One scrape of all of them."""
        for service, url in self._urls.items():
            try:
                text = self._client.get(url).raise_for_status().text
            except httpx.HTTPError:
                continue
            self._samples[service] = {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
        merged: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for samples in self._samples.values():
            merged |= samples
        return Reading(time.monotonic(), merged)

    def close(self) -> None:
        self._client.close()
