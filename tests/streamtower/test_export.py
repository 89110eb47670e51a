"""`streamtower export`: all that is in a version, in files; and the example of the docs on them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from qdrant_client import QdrantClient, models
from typer.testing import CliRunner

from streamtower import export
from streamtower.__main__ import app
from tests.trainer.publishing import Publishing, publishings
from tests.trainer.small_trainer import CONFIG
from trainer.contract import (
    COVISIT,
    DENSE,
    MANIFEST_FILE,
    QUERY_TOWER_FILE,
    collection_name,
    load_manifest,
    version_directory,
)
from trainer.item_events import ItemChange
from trainer.towers import load_query_tower

pytestmark = pytest.mark.index

PAGE = Path(__file__).parent.parent.parent / "docs" / "export.md"


@pytest.fixture
def publishing(qdrant_url: str, alias: str, tmp_path: Path) -> Iterator[Publishing]:
    """Version 1 with 60 items, version 2 live with two more and a canary."""
    with publishings(qdrant_url, alias, tmp_path / "models") as make:
        made = make()
        made.take(ItemChange("item-1", {"brand": "x"}, '{"title": "Tee ☕", "price": 2}'.encode()))
        made.click(*[f"item-{n % 60}" for n in range(200)])
        made.settle()
        made.renew()
        made.click("fresh", "item-3", "another")
        made.settle()
        made.index.tell_canary(2, 5.0, 3)
        yield made


@pytest.fixture
def run(publishing: Publishing, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        where = ["--qdrant", publishing.url, "--alias", publishing.alias, "--model-dir", str(publishing.model_dir)]
        done = CliRunner().invoke(app, ["export", str(tmp_path / "exported"), *arguments, *where])
        return done.exit_code, done.output

    return run


def test_every_item_is_exported_with_its_vectors_and_payload_and_the_tower_loads(
    run: Callable[..., tuple[int, str]], publishing: Publishing, tmp_path: Path
) -> None:
    code, text = run("--json")
    directory = tmp_path / "exported"
    assert code == 0 and json.loads(text) == {
        "schema": "streamtower.export/1", "version": 2, "items": 62, "directory": str(directory),
    }  # fmt: skip
    rows = {row["item_id"]: row for row in pq.read_table(directory / "items.parquet").to_pylist()}
    points = {item: point for item, point in publishing.points().items() if point.vector}
    assert rows.keys() == points.keys() and len(rows) == 62
    for item, point in points.items():
        assert isinstance(point.vector, dict) and point.payload is not None
        row, sparse = rows[item], point.vector.get(COVISIT)
        assert (row["item_hash"], row["step"]) == (point.id, point.payload["step"])
        assert row["dense"] == np.array(point.vector[DENSE], np.float32).tolist()
        assert isinstance(sparse, models.SparseVector)
        assert row["covisit_indices"] == sparse.indices
        assert row["covisit_values"] == np.array(sparse.values, np.float32).tolist()
    assert json.loads(rows["item-1"]["payload"]) == {"title": "Tee ☕", "price": 2}
    assert load_manifest(directory) == load_manifest(version_directory(publishing.model_dir, 2))
    load_query_tower(directory / QUERY_TOWER_FILE, CONFIG)


def test_an_older_version_is_exported_as_it_was_and_none_over_another(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert run("--version", "1") == (0, f"version 1: 60 items in {tmp_path / 'exported'}\n")
    code, text = run()
    assert code == 1 and "is not an empty directory" in text
    assert load_manifest(tmp_path / "exported").model_version == 1


def test_a_version_that_is_not_whole_is_not_exported(
    run: Callable[..., tuple[int, str]], publishing: Publishing, tmp_path: Path
) -> None:
    code, text = run("--version", "9")
    assert code == 1 and "there is no whole version 9; whole versions are: 1, 2" in text
    (version_directory(publishing.model_dir, 2) / MANIFEST_FILE).unlink()
    code, text = run()
    assert code == 1 and "no whole version is live; whole versions are: 1" in text
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("lost", ["collection", "directory"])
def test_a_version_that_is_removed_meanwhile_is_told_as_that_and_leaves_room_for_another(
    run: Callable[..., tuple[int, str]],
    publishing: Publishing,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    table = export._table

    def removing(*values: Any) -> Any:
        """As the trainer does with an old version, after its first page."""
        if lost == "collection":
            publishing.client.delete_collection(collection_name(publishing.alias, 1))
        else:
            shutil.rmtree(version_directory(publishing.model_dir, 1), ignore_errors=True)
        return table(*values)

    monkeypatch.setattr(export, "PAGE_ITEMS", 10)
    monkeypatch.setattr(export, "_table", removing)
    assert run("--version", "1") == (1, "streamtower: version 1 was removed while it was exported; try another\n")
    assert list((tmp_path / "exported").iterdir()) == []
    monkeypatch.setattr(export, "_table", table)
    assert run("--version", "2")[0] == 0
    assert load_manifest(tmp_path / "exported").model_version == 2


def ask_qdrant(client: QdrantClient, alias: str, names: dict[str, Any]) -> dict[str, float]:
    """The whole score of the best by `dense`, by one query of Qdrant."""
    sparse = models.SparseVector(indices=list(names["sparse"]), values=list(names["sparse"].values()))
    logarithm = models.LnExpression(ln=models.SumExpression(sum=[1.0, "$score[1]"]))
    dense = names["query"][0].tolist()
    hits = client.query_points(
        alias,
        prefetch=[
            models.Prefetch(query=dense, using=DENSE, limit=500),
            models.Prefetch(query=sparse, using=COVISIT, limit=500),
        ],
        query=models.FormulaQuery(
            formula=models.SumExpression(sum=["$score[0]", models.MultExpression(mult=[names["b"], logarithm])]),
            defaults={"$score[1]": 0.0},
        ),
        limit=100,
        with_payload=True,
    ).points
    return {(hit.payload or {})["item_id"]: hit.score for hit in hits}


# faiss' own bindings.
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_the_example_of_the_docs_finds_what_qdrant_finds(
    run: Callable[..., tuple[int, str]], publishing: Publishing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run()[0] == 0
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(example, str(PAGE), "exec"), names)
    wanted = ask_qdrant(publishing.client, publishing.alias, names)
    assert len(names["candidates"]) == 62 == len(wanted)
    assert any(names["sparse"].values()) and names["b"] != 0
    assert dict(names["candidates"]) == pytest.approx(wanted, abs=1e-4)
    scores = [score for _, score in names["candidates"]]
    assert scores == sorted(scores, reverse=True)
