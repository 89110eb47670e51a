"""Collections and aliases on disk: clean-up of deleted points, torn files, and a copy taken at any time as a crash."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("qdrant_edge", reason="needs the extra `embedded`")

import qdrant_edge as edge

from streamtower.dev.index import schema, updates
from streamtower.dev.index.errors import ApiError, StorageError
from streamtower.dev.index.storage import Collection, Storage

DIM = 8
BODY = json.dumps({"vectors": {"dense": {"size": DIM, "distance": "Dot"}}, "sparse_vectors": {"covisit": {}}}).encode()


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    opened = Storage(tmp_path / "live")
    yield opened
    opened.close()


def upsert(collection: Collection, first: int, count: int, step: int) -> None:
    points = [
        {
            "id": id,
            "vector": {"dense": [float(id % 13)] * DIM, "covisit": {"indices": [id % 5], "values": [step]}},
            "payload": {"step": step},
        }
        for id in range(first, first + count)
    ]
    collection.update(updates.operation("upsert", json.dumps({"points": points}).encode(), collection))


def delete(collection: Collection, ids: range) -> None:
    collection.update(updates.operation("delete", json.dumps({"points": list(ids)}).encode(), collection))


def steps(collection: Collection) -> dict[int, int]:
    """Step of every point by id."""
    points, _ = collection.shard.scroll(edge.ScrollRequest(limit=100_000, with_payload=True))
    return {point.id: point.payload["step"] for point in points if isinstance(point.id, int) and point.payload}


def alias_actions(**targets: str) -> list[schema.AliasAction]:
    return [
        schema.AliasAction(create_alias=schema.CreateAlias(collection_name=target, alias_name=alias))
        for alias, target in targets.items()
    ]


def test_a_crash_at_any_time_leaves_what_was_written(tmp_path: Path, storage: Storage) -> None:
    """Before and after flushes, with points replaced, deleted and cleaned up in between."""
    storage.create("items__v1", BODY)
    collection = storage.collection("items__v1")
    collection.update(updates.create_index(schema.CreateIndex("step", "integer")))
    storage.change_aliases(alias_actions(items="items__v1"))
    expected: dict[int, int] = {}
    for turn in range(6):
        upsert(collection, turn * 700, 1500, step=turn)
        expected |= dict.fromkeys(range(turn * 700, turn * 700 + 1500), turn)
        delete(collection, range(turn * 300, turn * 300 + 900))
        for id in range(turn * 300, turn * 300 + 900):
            expected.pop(id, None)
        if turn % 2:
            storage.flush()
        crashed = tmp_path / f"copy {turn}"
        shutil.copytree(tmp_path / "live", crashed)
        survivor = Storage(crashed)
        assert steps(survivor.collection("items")) == expected == steps(collection)
        survivor.close()


def test_deleted_points_are_removed_for_good(storage: Storage) -> None:
    storage.create("items__v1", BODY)
    collection = storage.collection("items__v1")
    upsert(collection, 0, 4000, step=1)
    delete(collection, range(3000))
    storage.flush()
    # The engine has put what was left into a new segment: there is nothing more for it to do.
    assert collection.shard.optimize() is False
    upsert(collection, 2000, 1500, step=2)
    assert steps(collection) == dict.fromkeys(range(2000, 3500), 2) | dict.fromkeys(range(3500, 4000), 1)


def test_a_torn_new_alias_file_is_ignored(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.create("items__v1", BODY)
    storage.change_aliases(alias_actions(items="items__v1"))
    storage.close()
    (tmp_path / "aliases.new").write_text('{"items": "it')
    storage = Storage(tmp_path)
    assert storage.aliases == {"items": "items__v1"}
    storage.change_aliases(alias_actions(other="items__v1"))
    assert json.loads((tmp_path / "aliases.json").read_text()) == {"items": "items__v1", "other": "items__v1"}
    storage.close()


def test_an_alias_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "aliases.json").write_text('{"items": "it')
    with pytest.raises(StorageError, match=r"aliases\.json cannot be read"):
        Storage(tmp_path)


def test_the_switches_before_a_bad_one_stand_on_disk_too(tmp_path: Path, storage: Storage) -> None:
    storage.create("items__v1", BODY)
    with pytest.raises(ApiError, match="nope"):
        storage.change_aliases(alias_actions(one="items__v1", two="nope", three="items__v1"))
    assert storage.aliases == json.loads((tmp_path / "live" / "aliases.json").read_text()) == {"one": "items__v1"}


def test_a_refused_creation_leaves_nothing(tmp_path: Path, storage: Storage) -> None:
    for body in (b"{}", b'{"vectors":{"size":0,"distance":"Dot"}}', b"", BODY.replace(b"Dot", b"Foo")):
        with pytest.raises(ApiError):
            storage.create("items__v1", body)
    assert list((tmp_path / "live" / "collections").iterdir()) == []
