"""Writes docs/metrics.md from the three services' Metrics classes: `python -m ops.metrics_doc`.

Station: beside the data's way. It invents no word: every formula is the metric's own help text.
"""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
MOST_EDGES = 15
"""Of a histogram that are listed one by one."""

_HEAD = """# Metrics

Made by `python -m ops.metrics_doc` from the metrics classes; change the help text there.

`streams` answers `/metrics` on port 9101, `trainer` on 9102, `retriever` on its HTTP port 8080. Names are
`streamtower_<service>_<thing>_<unit>`, in base units: seconds, bytes, ratios in 0–1; a `_timestamp_seconds` is a moment
in seconds since the epoch, so that an age is `time()` minus it. A counter ends in `_total` and starts again at 0 with
its process. A histogram `x` is `x_bucket`, `x_sum` and `x_count`. Each label has the listed values only, from the
start; no label holds an id, a version or an error's text.
"""


def registries() -> dict[str, CollectorRegistry]:
    """Service → a registry of its own with every metric that the service has, at their first values."""
    import retriever.metrics
    import streams.metrics
    import trainer.metrics

    found = {name: CollectorRegistry() for name in ("streams", "trainer", "retriever")}
    streams.metrics.Metrics(found["streams"])
    trainer.metrics.Metrics(found["trainer"])
    retriever.metrics.Metrics(found["retriever"])
    return found


def exposed_name(family: Metric) -> str:
    """The name that a query uses (of a histogram: without _bucket)."""
    return family.name + "_total" if family.type == "counter" else family.name


def label_values(family: Metric) -> dict[str, list[str]]:
    """Label → its values in the order in which they are made; without a histogram's `le`."""
    found: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in found.setdefault(label, []):
                found[label].append(value)
    return found


def buckets(family: Metric) -> list[str]:
    """Upper edges of a histogram as they are exposed, without +Inf."""
    edges = [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]
    return [edge for edge in dict.fromkeys(edges) if edge != "+Inf"]


def render() -> str:
    """The whole page."""
    parts = [_HEAD]
    for service, registry in registries().items():
        parts.append(f"\n## {service}\n\n| metric | type | labels | what it is |\n|---|---|---|---|\n")
        for family in registry.collect():
            labels = "<br>".join(f"`{label}`: {', '.join(found)}" for label, found in label_values(family).items())
            text = family.documentation.replace("|", "\\|")
            if family.type == "histogram":
                edges = buckets(family)
                few = len(edges) <= MOST_EDGES
                text += f" Edges: {', '.join(edges)}." if few else f" {len(edges)} edges, {edges[0]} to {edges[-1]}."
            parts.append(f"| `{exposed_name(family)}` | {family.type} | {labels or '–'} | {text} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
