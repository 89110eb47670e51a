"""`streamtower export`: the options and what is printed.

Station: between the command line and `export`, which does the work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from streamtower.connection import EXIT_FAILURE
from streamtower.options import fail
from streamtower.versions_command import (
    MODELS,
    URL,
    Alias,
    AsJson,
    Key,
    ModelDir,
    Qdrant,
    published_versions,
    qdrant_client,
)


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where it is written; must be new or empty.")],
    version: Annotated[int | None, typer.Option(min=1, help="Its number; default: the live one.")] = None,
    qdrant: Qdrant = URL,
    api_key: Key = None,
    alias: Alias = "items",
    model_dir: ModelDir = MODELS,
    as_json: AsJson = False,
) -> None:
    """Write a version's items and vectors (Parquet), query tower (safetensors) and Manifest for other vector tools."""
    from streamtower.export import export as export_version

    with (
        qdrant_client(qdrant, api_key) as client,
        published_versions(qdrant, api_key, alias, model_dir) as versions,
    ):
        try:
            exported, num_items = export_version(client, versions, model_dir, directory, version)
        except OSError as error:
            fail(f"{directory} cannot be written: {error}", EXIT_FAILURE)
    if as_json:
        document = {"schema": "streamtower.export/1", "version": exported.number, "items": num_items}
        print(json.dumps(document | {"directory": str(directory)}))
    else:
        print(f"version {exported.number}: {num_items:,} items in {directory}")
