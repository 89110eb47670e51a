"""Writes ops/grafana/dashboards/streamtower.json: `python -m ops.dashboard`.

Station: beside the data's way. The JSON is committed, because Grafana reads files; this is where it is changed. No
panel has an alert: those are in ops/prometheus/rules.yml.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

FILE = Path(__file__).parent / "grafana" / "dashboards" / "streamtower.json"
DATASOURCE_UID = "prometheus"
"""As in ops/grafana/provisioning/datasources/prometheus.yml."""

# Units as Grafana calls them.
RATIO, SECONDS, PER_SECOND, COUNT, NUMBER = "percentunit", "s", "cps", "short", "none"


@dataclass(frozen=True)
class Panel:
    """One chart. `queries`: legend → PromQL; every counter is rated over $__rate_interval."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]
    width: int = 8
    """Of 24 columns."""
    stacked: bool = False
    from_zero: bool = True


def rate(metric: str, by: str = "") -> str:
    """Events a second over all instances, or by a label."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping}(rate({metric}[$__rate_interval]))"


def quantile(share: float, histogram: str, **labels: str) -> str:
    """A quantile of a histogram over all instances."""
    matchers = ",".join(f'{name}="{value}"' for name, value in labels.items())
    selector = f"{histogram}_bucket{{{matchers}}}" if matchers else f"{histogram}_bucket"
    return f"histogram_quantile({share:g}, sum by (le)(rate({selector}[$__rate_interval])))"


def quantiles(histogram: str, **labels: str) -> dict[str, str]:
    """Median, p95 and p99."""
    return {f"p{share * 100:g}": quantile(share, histogram, **labels) for share in (0.5, 0.95, 0.99)}


STREAMS, TRAINER, RETRIEVER = "streamtower_streams_", "streamtower_trainer_", "streamtower_retriever_"
WAITING = TRAINER + "unservable_click_timestamp_seconds"
"""Ingest time of the oldest learnt click that is not servable; 0: there is none."""

ROWS: dict[str, list[Panel]] = {
    "Is the world moving, and does the model follow?": [
        Panel(
            "Frequency drift",
            "Share of the clicks that have moved to other items lately, 0 to 1: total variation distance between a "
            "fast and a slow memory of the clicks, less what sampling alone makes of it. That noise is drawn beside "
            "it: drift means most where it stands clear of it.",
            RATIO,
            {
                "drift {{instance}}": STREAMS + "frequency_drift_ratio",
                "noise {{instance}}": STREAMS + "frequency_drift_noise_ratio",
            },
            12,
        ),
        Panel(
            "Loss",
            "Mean loss per row, taken before each step's update, over the last 100 micro-batches; beside it the mean "
            "over the first 100 that the model ever learnt. Rising under drift is normal; rising without is not.",
            NUMBER,
            {"loss": TRAINER + "loss", "first": TRAINER + "loss_first"},
            12,
            from_zero=False,
        ),
        Panel(
            "Recall beside popularity's",
            "Share of clicks whose item the model ranks among the first k before it learns the click, beside the same "
            "for live popularity alone. The ceiling is the share of clicks whose item was known at all.",
            RATIO,
            {
                "model @{{k}}": TRAINER + "prequential_recall_at_k",
                "popularity @{{k}}": TRAINER + "popularity_recall_at_k",
                "ceiling": TRAINER + "recall_ceiling_ratio",
            },
            12,
        ),
        Panel(
            "Freshness: click to servable",
            "Seconds from a click's arrival in Kafka to the acknowledged publish that carries its effect. The "
            "objective is 95 % within 10 s.",
            SECONDS,
            quantiles(TRAINER + "click_to_servable_seconds"),
            12,
        ),
        Panel(
            "Freshness by stage",
            "95th percentile of the seconds of a click in Kafka and streams (queue), in the trainer (learn), and from "
            "there to the acknowledged publish; and how old the oldest learnt click is that is not servable yet.",
            SECONDS,
            {
                stage: quantile(0.95, TRAINER + "servable_stage_seconds", stage=stage)
                for stage in ("queue", "learn", "publish")
            }
            | {"oldest waiting": f"(time() - {WAITING}) * ({WAITING} > bool 0)"},
            12,
        ),
        Panel(
            "Drift by other measures",
            "Jensen-Shannon distance, in which items that came or went altogether weigh most, and the population "
            "stability index over deciles of popularity, in which only moves between popular and rare items count: "
            "0.1 is moderate, 0.25 significant. Both less what sampling alone makes of them.",
            NUMBER,
            {
                "Jensen-Shannon {{instance}}": STREAMS + "js_drift_ratio",
                "its noise {{instance}}": STREAMS + "js_drift_noise_ratio",
                "stability index {{instance}}": STREAMS + "popularity_stability_index",
            },
            12,
        ),
        Panel(
            "Clicks on young items",
            "Share of the clicks whose item had its first click within the last hour (young_minutes), lately and "
            "usually. They differ by more than the noise when much that is new is clicked, or nothing new comes any "
            "more. Nothing counts in the first hour.",
            RATIO,
            {
                "lately {{instance}}": STREAMS + "young_clicks_ratio",
                "usually {{instance}}": STREAMS + "young_clicks_usual_ratio",
                "noise {{instance}}": STREAMS + "young_clicks_noise_ratio",
            },
            12,
        ),
    ],
    "Clicks": [
        Panel(
            "Clicks in and learnt",
            "Clicks a second that streams took in, that it passed on in micro-batches, and that the trainer learnt. "
            "They should run together; a gap that stays shows in the lag.",
            PER_SECOND,
            {
                "in": rate(STREAMS + "clicks_total"),
                "learnt": rate(TRAINER + "clicks_learnt_total"),
                "followed by the retriever": rate(RETRIEVER + "clicks_total"),
            },
        ),
        Panel(
            "Consumer lag",
            "Records in Kafka that a service has not taken up yet: clicks for streams, micro-batches for the others.",
            COUNT,
            {
                "streams": f"sum({STREAMS}consumer_lag_messages)",
                "trainer": f"sum({TRAINER}consumer_lag_messages)",
                "retriever {{instance}}": RETRIEVER + "consumer_lag_messages",
            },
        ),
        Panel(
            "Dead letters by reason",
            "Clicks a second that were rejected and went to the dead-letter topic, by what was wrong with them.",
            PER_SECOND,
            {"{{reason}}": rate(STREAMS + "dead_letters_total", "reason")},
            stacked=True,
        ),
    ],
    "Publishing": [
        Panel(
            "Items published",
            "Points a second in acknowledged upserts: into a new version (full) or into the live one (delta).",
            PER_SECOND,
            {"{{kind}}": rate(TRAINER + "items_published_total", "kind")},
        ),
        Panel(
            "Index version",
            "The version that the trainer has made live and the one that each retriever serves. They differ for a "
            "moment after a full publish; a retriever that stays behind could not load the new one.",
            NUMBER,
            {
                "trainer": TRAINER + "index_version",
                "retriever {{instance}}": RETRIEVER + "model_version",
            },
            from_zero=False,
        ),
        Panel(
            "Staleness of what is served",
            "On a sample of items: cosine between the vector in the index and the one that the towers would give now "
            "(mean, and what 95 % have at least), and the share of the best items that is lost by it.",
            RATIO,
            {
                "cosine, {{of}}": TRAINER + "served_cosine_ratio",
                "recall lost": TRAINER + "served_recall_lost_ratio",
            },
        ),
        Panel(
            "Age of what is served",
            "Seconds since the copy of the live version was taken, since a publish was last acknowledged, and since "
            "the newest checkpoint.",
            SECONDS,
            {
                "version": f"time() - ({TRAINER}index_version_timestamp_seconds > 0)",
                "publish": f"time() - ({TRAINER}publish_timestamp_seconds > 0)",
                "checkpoint": f"time() - ({TRAINER}checkpoint_timestamp_seconds > 0)",
            },
        ),
        Panel(
            "Items",
            "Items that may be served, those that wait for a delta, the most that the next delta takes, and those that "
            "are gone.",
            COUNT,
            {
                "known": TRAINER + "items_known",
                "unpublished": TRAINER + "items_unpublished",
                "delta takes": TRAINER + "delta_limit_items",
                "deleted": TRAINER + "items_deleted",
            },
        ),
        Panel(
            "Publish and checkpoint duration",
            "95th percentile of the seconds that a publish or a checkpoint took.",
            SECONDS,
            {
                "full": quantile(0.95, TRAINER + "publish_seconds", kind="full"),
                "delta": quantile(0.95, TRAINER + "publish_seconds", kind="delta"),
                "checkpoint": quantile(0.95, TRAINER + "checkpoint_seconds"),
            },
        ),
        Panel(
            "What the trainer spends its time on",
            "Share of the time of the trainer's loop, by what it did. Much `wait` means room to learn more; none "
            "means that it is the bottleneck.",
            RATIO,
            {"{{stage}}": rate(TRAINER + "stage_seconds_total", "stage")},
            stacked=True,
        ),
    ],
    "Serving": [
        Panel(
            "Retriever latency",
            "Seconds of a request that was answered with candidates, from its head to the answer's last byte. The "
            "objective is 95 % within 25 ms.",
            SECONDS,
            quantiles(RETRIEVER + "request_seconds", stage="whole")
            | {
                "p95 encode": quantile(0.95, RETRIEVER + "request_seconds", stage="encode"),
                "p95 search": quantile(0.95, RETRIEVER + "request_seconds", stage="search"),
            },
        ),
        Panel(
            "Requests by status",
            "Requests a second that were answered, by class of status code: 5xx are errors of ours.",
            PER_SECOND,
            {"{{code}}": rate(RETRIEVER + "requests_total", "code")},
            stacked=True,
        ),
        Panel(
            "Where histories come from",
            "Queries a second by the origin of their history: the request itself, the followed stream, or none.",
            PER_SECOND,
            {"{{history}}": rate(RETRIEVER + "queries_total", "history")},
            stacked=True,
        ),
    ],
    "Health": [
        Panel(
            "Up",
            "1 for each process that Prometheus reaches, 0 for one that it knows and does not reach.",
            NUMBER,
            {"{{job}} {{instance}}": 'up{job!="prometheus"}'},
        ),
        Panel(
            "Dependencies answer",
            "1 while a service's last call to Kafka or Qdrant was answered.",
            NUMBER,
            {
                "streams → Kafka {{instance}}": STREAMS + "kafka_up",
                "trainer → Kafka": TRAINER + "kafka_up",
                "retriever → Kafka {{instance}}": RETRIEVER + "kafka_up",
                "retriever → Qdrant {{instance}}": RETRIEVER + "qdrant_up",
            },
        ),
        Panel(
            "Things that should not happen",
            "A second: calls to Qdrant repeated, publishes given up, source offsets never delivered, versions that "
            "could not be loaded, rows delivered again (harmless: they are dropped).",
            PER_SECOND,
            {
                "Qdrant calls repeated": rate(TRAINER + "qdrant_retries_total"),
                "searches repeated": rate(RETRIEVER + "qdrant_retries_total"),
                "publishes given up": rate(TRAINER + "publish_failures_total"),
                "offsets missing": rate(TRAINER + "source_gap_offsets_total"),
                "versions not loaded": rate(RETRIEVER + "version_load_failures_total"),
                "rows delivered again": rate(TRAINER + "rows_already_learnt_total"),
            },
        ),
    ],
}


def _panel(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(DataSourceRef(type_val="prometheus", uid=DATASOURCE_UID))
        .span(panel.width)
        .height(8)
        .line_width(1)
        .fill_opacity(20 if panel.stacked else 5)
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL if panel.stacked else StackingMode.NONE))
        .legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if panel.from_zero:
        built = built.min(0)
    for letter, (legend, expression) in zip(ascii_uppercase, panel.queries.items(), strict=False):
        built = built.with_target(prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(letter).range())
    return built


def render() -> str:
    """The dashboard as Grafana's JSON."""
    built = (
        dashboard.Dashboard("Streamtower")
        .uid("streamtower")
        .description("From a click in Kafka to a candidate from Qdrant. What each metric is: docs/metrics.md.")
        .tags(["streamtower"])
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
    )
    number = 0
    for title, panels in ROWS.items():
        built = built.with_row(dashboard.Row(title).id(number := number + 1))
        for panel in panels:
            built = built.with_panel(_panel(panel).id(number := number + 1))
    return json.dumps(built.build(), cls=JSONEncoder, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
