"""The few calls to Qdrant that looking at versions and switching them take, without its client.

Station: under `versions`. The client's import takes longer than a rollback may, all in all; what reads vectors uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from trainer.aliases import Action

PORT = 6333
"""Where a URL names none, as with the client."""


class QdrantAwayError(RuntimeError):
    """Qdrant does not answer, or lets nobody in."""


class NotThereError(QdrantAwayError):
    """Qdrant answers, and has no such collection."""


class Qdrant:
    """One Qdrant. Every call raises QdrantAwayError where it has no answer, or a refusal."""

    def __init__(self, url: str, api_key: str | None = None, timeout_seconds: float = 10.0) -> None:
        """
        Args:
            url: of its REST interface.
            api_key: sent with every request; None: nothing.
            timeout_seconds: longest time that an answer may take, > 0.
        """
        if "//" not in url:
            url = f"{'http' if api_key is None else 'https'}://{url}"
        base = httpx.URL(url)
        self._http = httpx.Client(
            base_url=base if base.port is not None else base.copy_with(port=PORT),
            headers={"accept-encoding": "identity"} | ({} if api_key is None else {"api-key": api_key}),
            timeout=timeout_seconds,
        )

    @property
    def url(self) -> httpx.URL:
        """Where it is asked."""
        return self._http.base_url

    def aliases(self) -> dict[str, str]:
        """Collection of each alias."""
        found = self._ask("GET", "/aliases")["aliases"]
        return {entry["alias_name"]: entry["collection_name"] for entry in found}

    def collections(self) -> list[str]:
        """Names of all collections."""
        return [entry["name"] for entry in self._ask("GET", "/collections")["collections"]]

    def count(self, collection: str) -> int | None:
        """Points in a collection, exactly; None: it is not there, or not any more."""
        try:
            return int(self._ask("POST", f"/collections/{collection}/points/count", {"exact": True})["count"])
        except NotThereError:
            return None

    def change_aliases(self, actions: Sequence[Action]) -> None:
        """Does all of them as one change."""
        self._ask("POST", "/collections/aliases", {"actions": list(actions)})

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = self._http.request(method, path, json=body)
            document: Any = answer.json() if answer.is_success else None
        except (httpx.HTTPError, ValueError) as error:
            raise QdrantAwayError(f"Qdrant does not answer: {error or type(error).__name__}") from error
        if not answer.is_success:
            kind = NotThereError if answer.status_code == 404 else QdrantAwayError
            raise kind(f"Qdrant answers {answer.status_code}: {answer.reason_phrase}")
        try:
            return document["result"]
        except (KeyError, TypeError) as error:
            raise QdrantAwayError("what answers is not Qdrant") from error
