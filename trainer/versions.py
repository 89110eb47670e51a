"""The model directory: query tower and Manifest of each published version, for the retriever to load.

Station: beside the index; a version is whole only with both. It knows no Qdrant and decides nothing.

A version's directory is written under another name, synced and renamed, so that it is there with its Manifest or not at
all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from trainer.checkpoint import sync, sync_directory
from trainer.contract import (
    CHECKSUM_FILE,
    MANIFEST_FILE,
    QUERY_TOWER_FILE,
    Manifest,
    version_checksum,
    version_directory,
)
from trainer.towers import QueryTower, save_query_tower


class Versions:
    """The versions in one model directory."""

    def __init__(self, model_dir: Path) -> None:
        """Makes the directory. Raises OSError where that cannot be."""
        self._model_dir = model_dir
        model_dir.mkdir(parents=True, exist_ok=True)

    def numbers(self) -> list[int]:
        """Versions that have a directory, rising."""
        return sorted(int(path.name[1:]) for path in self._model_dir.glob("v[0-9]*") if path.name[1:].isdecimal())

    def write(self, manifest: Manifest, query_tower: QueryTower) -> None:
        """Puts a version's directory in place.

        Raises:
            OSError: the disk does not take it; nothing is left.
        """
        path = version_directory(self._model_dir, manifest.model_version)
        aside = path.with_name(f".{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            save_query_tower(aside / QUERY_TOWER_FILE, query_tower)
            (aside / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
            (aside / CHECKSUM_FILE).write_text(version_checksum(aside))
            sync_directory(aside)
            aside.rename(path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync(self._model_dir)

    def remove(self, number: int) -> None:
        """Removes a version's directory; harmless where there is none."""
        shutil.rmtree(version_directory(self._model_dir, number), ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Removes what an interrupted `write` left."""
        for path in self._model_dir.glob(".v[0-9]*"):
            shutil.rmtree(path, ignore_errors=True)
