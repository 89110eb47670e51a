"""`streamtower versions list | show | promote | rollback`: the options and what is printed.

Station: between the command line and `versions`, which does the work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from streams.service import EXIT_DEPENDENCY
from streamtower.connection import EXIT_FAILURE, EXIT_USAGE
from streamtower.options import fail

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

    from streamtower.versions import PublishedVersions, Version

app = typer.Typer(help="Look at the published versions, or make another one live.", no_args_is_help=True)

Qdrant = Annotated[str, typer.Option(envvar="STREAMTOWER_TRAINER_QDRANT", help="URL of Qdrant's REST interface.")]
Key = Annotated[str | None, typer.Option(envvar="STREAMTOWER_TRAINER_QDRANT_API_KEY", help="Key that Qdrant asks for.")]
Alias = Annotated[str, typer.Option(envvar="STREAMTOWER_TRAINER_ALIAS", help="Names the live version's collection.")]
ModelDir = Annotated[
    Path, typer.Option(envvar="STREAMTOWER_TRAINER_MODEL_DIR", help="Directory of the published versions.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
URL = "http://127.0.0.1:6333"
MODELS = Path("models")


@app.command("list")
def list_versions(
    qdrant: Qdrant = URL,
    api_key: Key = None,
    alias: Alias = "items",
    model_dir: ModelDir = MODELS,
    as_json: AsJson = False,
) -> None:
    """Show every version: how old, how many items, how well its model foresaw the clicks when it was made."""
    with published_versions(qdrant, api_key, alias, model_dir) as versions:
        found = versions.all()
    if as_json:
        print(json.dumps({"schema": "streamtower.versions/1", "versions": [_plain(version) for version in found]}))
        return
    for version in found:
        print(_line(version))
    if not found:
        print("none")


@app.command()
def show(
    number: Annotated[int, typer.Argument(min=1, help="Of the version.")],
    qdrant: Qdrant = URL,
    api_key: Key = None,
    alias: Alias = "items",
    model_dir: ModelDir = MODELS,
) -> None:
    """Print a version and its whole Manifest as one JSON document."""
    with published_versions(qdrant, api_key, alias, model_dir) as versions:
        found = [version for version in versions.all() if version.number == number]
    if not found:
        fail(f"there is no version {number}", EXIT_FAILURE)
    manifest = msgspec.to_builtins(found[0].manifest, str_keys=True) if found[0].manifest else None
    print(json.dumps({"schema": "streamtower.version/1"} | _plain(found[0]) | {"manifest": manifest}, indent=2))


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="Its number, which is then pinned; or latest: the newest, unpinned.")],
    qdrant: Qdrant = URL,
    api_key: Key = None,
    alias: Alias = "items",
    model_dir: ModelDir = MODELS,
    as_json: AsJson = False,
) -> None:
    """Make a version live at once. A number stays live, and the trainer publishes no other, until `promote latest`."""
    if version != "latest" and not version.isdecimal():
        fail(f"promote takes the number of a version, or latest, not {version!r}", EXIT_USAGE)
    with published_versions(qdrant, api_key, alias, model_dir) as versions:
        promoted = versions.promote(None if version == "latest" else int(version))
    _say(promoted, pinned=version != "latest", as_json=as_json)


@app.command()
def rollback(
    qdrant: Qdrant = URL,
    api_key: Key = None,
    alias: Alias = "items",
    model_dir: ModelDir = MODELS,
    as_json: AsJson = False,
) -> None:
    """Make the version before the live one live at once, and keep it so until `promote latest`."""
    with published_versions(qdrant, api_key, alias, model_dir) as versions:
        promoted = versions.rollback()
    _say(promoted, pinned=True, as_json=as_json)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns what cannot be done with Qdrant or with a version into a line on stderr and an exit code."""
    from streamtower.qdrant import QdrantAwayError
    from streamtower.versions import VersionsError

    try:
        yield
    except QdrantAwayError as error:
        fail(str(error), EXIT_DEPENDENCY)
    except VersionsError as error:
        fail(str(error), EXIT_FAILURE)


@contextmanager
def published_versions(qdrant: str, api_key: str | None, alias: str, model_dir: Path) -> Iterator[PublishedVersions]:
    """The versions of an alias; errors end the command."""
    from streamtower.qdrant import Qdrant
    from streamtower.versions import PublishedVersions

    with _exit_codes():
        asked = Qdrant(qdrant, api_key)
        try:
            yield PublishedVersions(asked, alias, model_dir)
        finally:
            asked.close()


@contextmanager
def qdrant_client(url: str, api_key: str | None) -> Iterator[QdrantClient]:
    """Qdrant's own client, for what the calls of `published_versions` are too few; errors end the command."""
    from qdrant_client import QdrantClient

    client = QdrantClient(
        url=url, api_key=api_key, headers={"accept-encoding": "identity"}, check_compatibility=False, timeout=10
    )
    with _exit_codes():
        try:
            yield client
        finally:
            client.close()


def _say(version: Version, *, pinned: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"schema": "streamtower.promoted/1", "version": version.number, "pinned": pinned}))
    else:
        print(f"version {version.number} is live" + (" and pinned" if pinned else ""))


def _plain(version: Version) -> dict[str, Any]:
    manifest = version.manifest
    prequential = manifest.prequential if manifest else None
    return {
        "version": version.number,
        "live": version.is_live,
        "pinned": version.is_pinned,
        "whole": version.is_whole,
        "points": version.points,
        "created_at": manifest.created_at if manifest else None,
        "step": manifest.step if manifest else None,
        "prequential": msgspec.to_builtins(prequential) if prequential else None,
    }


def _line(version: Version) -> str:
    state = " ".join(
        word
        for word, applies in (
            ("live", version.is_live),
            ("pinned", version.is_pinned),
            ("not whole", not version.is_whole),
        )
        if applies
    )
    points = "no collection" if version.points is None else f"{version.points:,} items"
    if (manifest := version.manifest) is None:
        return f"{version.number:>6}  {state:<12}  {points}, no Manifest"
    created = datetime.fromtimestamp(manifest.created_at, UTC).isoformat(timespec="seconds")
    recall = "not tested"
    if (score := manifest.prequential) is not None:
        recall = (
            f"recall@10 {score.recall_at_10:.3f} ({score.popularity_recall_at_10:.3f})"
            f"  @100 {score.recall_at_100:.3f} ({score.popularity_recall_at_100:.3f})"
        )
    return f"{version.number:>6}  {state:<12}  {created}  {points}  step {manifest.step:,}  {recall}"
