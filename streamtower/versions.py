"""Looks at the published versions and makes another one live by hand, beside a running trainer or without one.

Station: beside the index and the model directory; for `streamtower versions`. It writes aliases alone. A version is
whole if it has its collection in Qdrant and its Manifest in the model directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamtower.qdrant import Qdrant
from trainer.aliases import actions_to, named_among, versions_among
from trainer.contract import (
    CHECKSUM_FILE,
    Manifest,
    ManifestError,
    collection_name,
    load_manifest,
    version_checksum,
    version_directory,
)


class VersionsError(RuntimeError):
    """What was asked for cannot be done: says why, and what there is."""


@dataclass(frozen=True)
class Version:
    """One version, as far as it is there."""

    number: int
    is_live: bool
    is_pinned: bool
    points: int | None
    """In its collection; None: it has none."""
    manifest: Manifest | None
    """None: it has none that can be read."""

    @property
    def is_whole(self) -> bool:
        """Whether it can be served."""
        return self.points is not None and self.manifest is not None


class PublishedVersions:
    """The versions of one alias."""

    def __init__(self, qdrant: Qdrant, alias: str, model_dir: Path) -> None:
        self._qdrant, self._alias, self._model_dir = qdrant, alias, model_dir

    def all(self) -> list[Version]:
        """All that there are, rising.

        Raises:
            QdrantAwayError: it does not answer.
        """
        named = named_among(self._qdrant.aliases(), self._alias)
        collections = versions_among(self._qdrant.collections(), self._alias)
        directories = [int(p.name[1:]) for p in self._model_dir.glob("v[0-9]*") if p.name[1:].isdecimal()]
        counts = {number: self._qdrant.count(collection_name(self._alias, number)) for number in collections}
        return [
            Version(number, number == named.live, number == named.pinned, counts.get(number), self._manifest(number))
            for number in sorted({*collections, *directories})
        ]

    def promote(self, number: int | None) -> Version:
        """Makes a version live and pins it; None: the newest whole one, and none is pinned any more.

        Raises:
            VersionsError: it is not there, not whole, or damaged.
            QdrantAwayError: it does not answer.
        """
        versions = {version.number: version for version in self.all()}
        whole = [version.number for version in versions.values() if version.is_whole]
        target = max(whole, default=0) if number is None else number
        if target not in whole:
            missing = "is not there" if target not in versions else "has no collection or no readable Manifest"
            listed = ", ".join(map(str, whole)) or "none"
            raise VersionsError(f"version {number or 'latest'} {missing}; whole versions are: {listed}")
        directory = version_directory(self._model_dir, target)
        checksum = directory / CHECKSUM_FILE
        if checksum.exists() and checksum.read_text() != version_checksum(directory):
            raise VersionsError(f"version {target} is damaged: {directory} contradicts its checksum")
        self._qdrant.change_aliases(actions_to(self._qdrant.aliases(), self._alias, target, pin=number is not None))
        return versions[target]

    def rollback(self) -> Version:
        """Makes the newest whole version before the live one live, and pins it.

        Raises:
            VersionsError: there is no live one, or none before it.
            QdrantAwayError: it does not answer.
        """
        versions = self.all()
        live = next((version.number for version in versions if version.is_live), None)
        if live is None:
            raise VersionsError(f"no version is live under the alias {self._alias!r}")
        before = [version.number for version in versions if version.is_whole and version.number < live]
        if not before:
            raise VersionsError(f"there is no whole version before {live}; keep_versions says how many are kept")
        return self.promote(before[-1])

    def _manifest(self, number: int) -> Manifest | None:
        try:
            manifest = load_manifest(version_directory(self._model_dir, number))
        except ManifestError:
            return None
        return manifest if manifest.collection == collection_name(self._alias, number) else None
