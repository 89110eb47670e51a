"""How to ask a running Streamtower: over its HTTP service, and the lines that do so from a shell and from Python.

Station: the caller's side of the retriever. It computes no score.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from streams.contract import hash_id
from trainer.contract import DENSE


class AskError(RuntimeError):
    """The retriever gave no candidates. Says why."""


class RetrieverAwayError(AskError):
    """Nobody answers at the retriever's URL, or it has no version to serve yet."""


def ask(url: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_seconds: float = 5.0) -> dict[str, Any]:
    """The JSON answer to GET, or to POST where there is a body.

    Raises:
        RetrieverAwayError: nobody answers, or the service is not ready.
        AskError: the service refuses; the message is its own.
    """
    try:
        method = "GET" if body is None else "POST"
        answer = httpx.request(method, url.rstrip("/") + path, json=body, timeout=timeout_seconds, trust_env=False)
        document: dict[str, Any] = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise RetrieverAwayError(f"no retriever answers at {url}: {error or type(error).__name__}") from error
    if answer.status_code == 503:
        raise RetrieverAwayError(f"the retriever at {url} is not ready: {document.get('detail')}")
    if answer.status_code != 200:
        errors = "".join(f"; {e['location']}: {e['message']}" for e in document.get("errors", []))
        raise AskError(f"the retriever refuses: {document.get('detail')}{errors}")
    return document


def lines_for(retriever: str, qdrant: str, alias: str, user_id: str, item_id: str) -> dict[str, str]:
    """Lines to copy, which work as they are: `curl`, `streamtower query`, and Qdrant's own client.

    The last one needs no Streamtower: any Qdrant client finds an item's neighbours in the live index.
    """
    body = json.dumps({"user_id": user_id, "k": 5, "with_payload": True})
    url = "" if retriever == "http://127.0.0.1:8080" else f" --url {retriever}"
    return {
        "curl": f"curl -s {retriever}/v1/candidates -H 'content-type: application/json' -d '{body}'",
        "streamtower": f"{_command()} query {user_id} -k 5{url}",
        "python": "from qdrant_client import QdrantClient\n"
        f'client = QdrantClient("{qdrant}", headers={{"accept-encoding": "identity"}})\n'
        f"for point in client.query_points({alias!r}, query={hash_id(item_id)}, using={DENSE!r}, limit=5).points:\n"
        '    print(point.score, point.payload["item_id"])',
    }


def _command() -> str:
    """How this shell finds `streamtower`: it is in a virtual environment that need not be on the PATH."""
    if shutil.which("streamtower"):
        return "streamtower"
    script = Path(sys.executable).with_name("streamtower")
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)
