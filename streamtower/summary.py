"""What a demo has shown, as one document for programs and one table for people.

Station: at the end of a demo.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from streamtower.asking import AskError, ask
from streamtower.figures import Figures

SCHEMA = "streamtower.demo/1"
EXAMPLE_K = 10


def document(figures: Figures, clicks_produced: int, example: dict[str, Any] | None, **more: object) -> dict[str, Any]:
    """The summary, ready for JSON: NaN becomes null, counts are integers."""
    plain: dict[str, Any] = {name: _plain(name, value) for name, value in asdict(figures).items()}
    learnt, dead = plain["clicks_learnt"] or 0, plain["clicks_dead_lettered"] or 0
    return {
        "schema": SCHEMA,
        "clicks_produced": clicks_produced,
        "clicks_learnt": learnt,
        "clicks_dead_lettered": dead,
        "clicks_in_flight": clicks_produced - learnt - dead,
        "micro_batches": plain["micro_batches"],
        "steps": plain["steps"],
        "loss_first": plain["loss_first"],
        "loss_last": plain["loss"],
        "recall_at_10": plain["recall_at_10"],
        "recall_at_100": plain["recall_at_100"],
        "popularity_recall_at_10": plain["popularity_recall_at_10"],
        "popularity_recall_at_100": plain["popularity_recall_at_100"],
        "frequency_drift": plain["frequency_drift"],
        "items_known": plain["items_known"],
        "items_published": plain["items_published"],
        "index_version": plain["index_version"],
        "click_to_servable_p50_seconds": plain["click_to_servable_p50_seconds"],
        "click_to_servable_p95_seconds": plain["click_to_servable_p95_seconds"],
        "candidates_example": example,
    } | more


_COUNTS = {
    "clicks_received", "clicks_learnt", "clicks_dead_lettered", "micro_batches", "steps",
    "lag_clicks", "lag_micro_batches", "items_known", "items_published", "index_version",
}  # fmt: skip


def _plain(name: str, value: float) -> float | int | None:
    if math.isnan(value):
        return None
    return int(value) if name in _COUNTS else round(value, 6)


def candidates_example(
    retriever: str, user_id: str, popular: list[str], names: dict[str, str], *, timeout_seconds: float = 5.0
) -> dict[str, Any] | None:
    """What one user with a history gets, beside what everybody would get; None where the retriever gives nothing.

    Args:
        popular: ids of the most clicked items, the first one most.
        names: what to call items, by id.
    """
    try:
        history = ask(retriever, f"/v1/users/{user_id}/history", timeout_seconds=timeout_seconds)
        answer = ask(retriever, "/v1/candidates", {"user_id": user_id, "k": EXAMPLE_K}, timeout_seconds=timeout_seconds)
    except AskError:
        return None

    def named(item_id: str) -> dict[str, str]:
        return {"item_id": item_id} | ({"name": names[item_id]} if item_id in names else {})

    candidates = [named(found["item_id"]) | {"score": found["score"]} for found in answer["candidates"]]
    popular = popular[:EXAMPLE_K]
    return {
        "user_id": user_id,
        "history": [named(item_id) for item_id in history["items"] if item_id is not None],
        "candidates": candidates,
        "most_popular": [named(item_id) for item_id in popular],
        "candidates_among_most_popular": len({found["item_id"] for found in candidates} & set(popular)),
        "model_version": answer["model_version"],
    }


def show(summary: dict[str, Any], console: Console) -> None:
    """The table for people."""
    console.print(_totals(summary))
    if summary["candidates_example"]:
        console.print(_example(summary["candidates_example"]))


def _totals(summary: dict[str, Any]) -> RenderableType:
    table = Table(title="Streamtower demo", title_justify="left", show_header=False)
    for label, text in (
        ("clicks", "{clicks_produced:,} produced = {clicks_learnt:,} learnt + {clicks_dead_lettered:,} dead-lettered "
         "+ {clicks_in_flight:,} in flight"),
        ("micro-batches", "{micro_batches:,}, {steps:,} steps"),
        ("loss", "{loss_first:.3f} → {loss_last:.3f}"),
        ("recall@10", "{recall_at_10:.3f}, popularity {popularity_recall_at_10:.3f}"),
        ("recall@100", "{recall_at_100:.3f}, popularity {popularity_recall_at_100:.3f}"),
        ("frequency drift", "{frequency_drift:.3f}"),
        ("index", "version {index_version}, {items_published:,} items published"),
        ("click to servable", "p50 {click_to_servable_p50_seconds:.1f} s, p95 {click_to_servable_p95_seconds:.1f} s"),
    ):  # fmt: skip
        table.add_row(label, text.format_map({k: math.nan if v is None else v for k, v in summary.items()}))
    return table


def _example(example: dict[str, Any]) -> RenderableType:
    table = Table(title=f"User {example['user_id']}", title_justify="left")
    columns = {
        "clicked last": list(reversed(example["history"])),
        "candidates": example["candidates"],
        "most popular": example["most_popular"],
    }
    for name in columns:
        table.add_column(name)
    for row in range(EXAMPLE_K):
        table.add_row(*(_label(items[row]) if row < len(items) else "" for items in columns.values()))
    return table


def _label(item: dict[str, str]) -> str:
    return f"{item['item_id']} {item.get('name', '')}".strip()
