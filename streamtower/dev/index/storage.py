"""Collections and aliases on disk: one directory per collection, aliases in one file.

Station: under `app`; the engine's shards live here. It knows no HTTP.

    DIRECTORY/lock                          held while a process uses the directory
    DIRECTORY/aliases.json                  {alias: collection}
    DIRECTORY/collections/NAME-RANDOM/      collection.json (name, configuration), shard/ (the engine's files)

A collection exists from the moment when its collection.json is there, until that is removed; a directory without one is
the rest of an interrupted creation or deletion and is removed at the start. Both kinds of JSON file are replaced
atomically. The engine writes each update to its write-ahead log first, so what was acknowledged survives kill -9.

Not safe for threads and need not be: every engine call holds Python's global lock, so one thread does all the work, and
a request sees all aliases and points as they are between two updates.

Every search is exact, on the vectors themselves. The settings of HNSW, quantization, optimizers and shards are kept and
shown but change nothing: the engine builds such indexes inside one call that stops everything else, for half a minute
at 100,000 points, and its exact search takes about 3 ms there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import msgspec
import qdrant_edge as edge

from streamtower.dev.index import configuration, schema
from streamtower.dev.index.errors import (
    ApiError,
    StorageError,
    format_error,
    is_panic,
    not_found,
    wrong_input,
)

_FORBIDDEN_IN_NAMES = '<>:"/\\|?*\0\x1f'


class Collection:
    """One collection: its configuration, the sizes of its vectors, and the engine's shard."""

    def __init__(self, path: Path, name: str, config: dict[str, Any], shard: edge.EdgeShard) -> None:
        self.path = path
        self.name = name
        self.config = config
        """The body of the call that created it, with later changes merged in."""
        self.shard = shard
        dense = configuration.dense_vectors(config.get("vectors"))
        self.vector_sizes: dict[str, int] = {name: params.size for name, params in dense.items()}
        """Dense vectors; the unnamed one has the name ""."""
        self.sparse_vectors: frozenset[str] = frozenset(config.get("sparse_vectors") or {})
        self.dirty = False
        self.num_operations = 0

    def update(self, operation: edge.UpdateOperation) -> int:
        """Applies the operation; returns its number. Raises what the engine raises."""
        self.dirty = True
        self.num_operations += 1
        self.shard.update(operation)
        return self.num_operations

    def flush(self) -> None:
        """Brings what is new to disk, after removing deleted points for good where a fifth of them is deleted."""
        if self.dirty:
            self.shard.optimize()
            self.shard.flush()
            self.dirty = False


class Storage:
    """All collections and aliases of one directory.

    Args:
        directory: made if missing; belongs to this process until `close`.

    Raises:
        StorageError: another process uses the directory, or what is in it cannot be read.
    """

    aliases: dict[str, str]
    """Collection of each alias."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._root = directory / "collections"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = open(directory / "lock", "ab")  # noqa: SIM115 - held until close
        except OSError as error:
            raise StorageError(f"{directory} cannot be written to ({error.strerror}): choose another one") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StorageError(f"{directory} is used by another local index: end it or choose another one") from None
        try:
            self._collections = {collection.name: collection for collection in map(_load, self._leftovers_removed())}
            self.aliases = self._load_aliases()
        except StorageError:
            self._lock.close()
            raise

    @property
    def names(self) -> list[str]:
        """Of all collections, sorted."""
        return sorted(self._collections)

    def collection(self, name: str) -> Collection:
        """The collection of this name or alias.

        Raises:
            ApiError: 404.
        """
        found = self._collections.get(name) or self._collections.get(self.aliases.get(name, ""))
        if found is None:
            raise not_found(f"Collection `{name}` doesn't exist!")
        return found

    def exists(self, name: str) -> bool:
        return name in self._collections or name in self.aliases

    def create(self, name: str, body: bytes) -> None:
        """A new, empty collection as the body of the request says.

        Raises:
            ApiError: 400, 409 or 422; nothing was created.
        """
        checked_name(name)
        engine_config = configuration.engine_config(schema.decode(body, schema.CreateCollection))
        if name in self._collections:
            raise ApiError(409, f"Wrong input: Collection `{name}` already exists!")
        if name in self.aliases:
            raise wrong_input(f"Can't create collection with name {name}. Alias with the same name already exists")
        path = self._root / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[:80]}-{secrets.token_hex(4)}"
        (path / "shard").mkdir(parents=True)
        collection = Collection(
            path, name, msgspec.json.decode(body), edge.EdgeShard.create(str(path / "shard"), engine_config)
        )
        _save(collection)
        self._collections[name] = collection

    def change(self, name: str, body: bytes) -> None:
        """Merges new settings into a collection's configuration.

        Raises:
            ApiError: 400 or 404.
        """
        collection = self.collection(name)
        changes = schema.decode(body, schema.ChangeCollection)
        collection.config = configuration.changed(collection.config, changes)
        _save(collection)

    def delete(self, name: str) -> bool:
        """Removes the collection and its aliases; whether there was one."""
        collection = self._collections.pop(name, None)
        if collection is None:
            return False
        self.aliases = {alias: target for alias, target in self.aliases.items() if target != name}
        self._save_aliases()
        (collection.path / "collection.json").unlink()
        collection.shard.close()
        shutil.rmtree(collection.path)
        return True

    def change_aliases(self, actions: list[schema.AliasAction]) -> None:
        """Does all actions as one change of the file; if one fails, those before it stand, as on a server.

        Raises:
            ApiError: 400, 404 or 409.
        """
        try:
            for action in actions:
                self._change_alias(action)
        finally:
            self._save_aliases()

    def _change_alias(self, action: schema.AliasAction) -> None:
        if create := action.create_alias:
            checked_name(create.alias_name)
            if create.alias_name in self._collections:
                raise ApiError(409, f"Wrong input: Collection `{create.alias_name}` already exists!")
            if create.collection_name not in self._collections:
                raise not_found(f"Collection `{create.collection_name}` doesn't exist!")
            self.aliases[create.alias_name] = create.collection_name
        elif delete := action.delete_alias:
            self.aliases.pop(delete.alias_name, None)
        elif rename := action.rename_alias:
            if rename.old_alias_name not in self.aliases:
                raise not_found(f"Alias {rename.old_alias_name} does not exists!")
            self.aliases[rename.new_alias_name] = self.aliases.pop(rename.old_alias_name)
        else:
            raise format_error("data did not match any variant of untagged enum AliasOperations")

    def flush(self) -> None:
        """Brings what is new to disk, so that a start after a crash is quick."""
        for collection in self._collections.values():
            collection.flush()

    def close(self) -> None:
        """Leaves everything on disk and gives the directory free."""
        self.flush()
        for collection in self._collections.values():
            collection.shard.close()
        self._lock.close()

    def _leftovers_removed(self) -> list[Path]:
        paths = sorted(self._root.iterdir())
        for path in paths:
            if not (path / "collection.json").exists():
                shutil.rmtree(path)
        return [path for path in paths if path.exists()]

    def _load_aliases(self) -> dict[str, str]:
        with contextlib.suppress(FileNotFoundError):
            aliases: dict[str, str] = _read_json(self._directory / "aliases.json")
            return {alias: name for alias, name in aliases.items() if name in self._collections}
        return {}

    def _save_aliases(self) -> None:
        _write_json(self._directory / "aliases.json", self.aliases)


def checked_name(name: str) -> str:
    """The name of a collection or alias.

    Raises:
        ApiError: 422.
    """
    for character in _FORBIDDEN_IN_NAMES:
        if character in name:
            raise ApiError(
                422,
                "Validation error in path parameters: "
                f'[collection_name: collection name cannot contain "{character}" char]',
            )
    if not 1 <= len(name) <= 255:
        raise ApiError(422, "Validation error in path parameters: [collection_name: must be 1 to 255 characters long]")
    return name


def _load(path: Path) -> Collection:
    description = _read_json(path / "collection.json")
    try:
        shard = edge.EdgeShard.load(str(path / "shard"))
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise StorageError(
            f"collection {description['name']!r} in {path} cannot be read ({error}): "
            "remove that directory, or choose another one"
        ) from error
    return Collection(path, description["name"], description["config"], shard)


def _save(collection: Collection) -> None:
    _write_json(collection.path / "collection.json", {"name": collection.name, "config": collection.config})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise StorageError(f"{path} cannot be read ({error}): remove it, or choose another directory") from None


def _write_json(path: Path, content: Any) -> None:
    """Replaces the file: whoever reads it, at any time and after any crash, sees the old content or the new."""
    beside = path.with_suffix(".new")
    with open(beside, "wb") as file:
        file.write(json.dumps(content, ensure_ascii=False).encode())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
