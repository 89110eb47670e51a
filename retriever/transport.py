"""What is asked of Qdrant again and again, over HTTP without the models of its client: JSON out, points in.

Station: under `search`, which says what an error means and whether to try again, and uses the client for all else.
Searches go this way because every answer waits for one, and look-ups of the alias because they come between them: the
client's own way takes two milliseconds more. Errors are the client's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx
import msgspec
import orjson
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from retriever.fusion import Body

ResultT = TypeVar("ResultT")
MAX_CONNECTIONS = 64
KEPT_SECONDS = 30.0
"""How long a connection that nobody uses is kept."""


class Point(msgspec.Struct, frozen=True):
    """A point as a search gives it."""

    id: int | str
    score: float
    payload: dict[str, Any] | None = None
    vector: dict[str, Any] | None = None
    """By name: a list of numbers, or `indices` and `values`; only where it was asked for."""


class _Points(msgspec.Struct):
    points: list[Point]


class _Alias(msgspec.Struct):
    alias_name: str
    collection_name: str


class _Aliases(msgspec.Struct):
    aliases: list[_Alias]


class _Answer(msgspec.Struct, Generic[ResultT]):
    result: ResultT


_FOUND = msgspec.json.Decoder(_Answer[_Points])
_FOUND_IN_BATCH = msgspec.json.Decoder(_Answer[list[_Points]])
_ALIASES = msgspec.json.Decoder(_Answer[_Aliases])


class Transport:
    """Connections to one Qdrant, made when they are needed; to be used within one event loop."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """
        Args:
            url: of its REST interface, with port and perhaps a prefix.
            api_key: sent with every request; None: nothing.
        """
        self._url = url.rstrip("/")
        self._headers = {"content-type": "application/json", "accept-encoding": "identity"}  # compressed: 44 ms more
        if api_key is not None:
            self._headers["api-key"] = api_key
        self._is_encrypted = url.startswith("https:")
        self._session: aiohttp.ClientSession | None = None

    async def search(self, collection: str, requests: Sequence[Body]) -> list[list[Point]]:
        """The points of each request, by one call.

        Args:
            collection: that is searched.
            requests: at least one.

        Raises:
            ResponseHandlingException: no answer.
            UnexpectedResponse: a refusal.
            ValueError: an answer that is not Qdrant's.
        """
        path = f"/collections/{quote(collection, safe='')}/points/query"
        if len(requests) == 1:
            return [_decoded(_FOUND, await self._ask("POST", path, requests[0])).points]
        answers = _decoded(_FOUND_IN_BATCH, await self._ask("POST", f"{path}/batch", {"searches": requests}))
        return [one.points for one in answers]

    async def aliases(self) -> dict[str, str]:
        """Collection of each alias. Raises as `search` does."""
        found = _decoded(_ALIASES, await self._ask("GET", "/aliases"))
        return {entry.alias_name: entry.collection_name for entry in found.aliases}

    async def close(self) -> None:
        """Ends the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask(self, method: str, path: str, body: Body | None = None) -> bytes:
        if self._session is None:
            self._session = self._new_session()
        data = None if body is None else _encoded(body)
        try:
            async with self._session.request(method, self._url + path, data=data, allow_redirects=False) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            raise ResponseHandlingException(error) from error
        if answer.status != 200:
            raise UnexpectedResponse(answer.status, answer.reason or "", content, httpx.Headers(dict(answer.headers)))
        return content

    def _new_session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=MAX_CONNECTIONS,
            keepalive_timeout=KEPT_SECONDS,
            ssl=httpx.create_ssl_context() if self._is_encrypted else True,
        )
        return aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # whoever calls has a deadline
            proxy=_proxy_of(self._url),
        )


def _encoded(body: Body) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError:  # a filter has integers of more than 64 bits: Qdrant says what is wrong with them
        return json.dumps(body).encode()


def _decoded(decoder: msgspec.json.Decoder[_Answer[ResultT]], content: bytes) -> ResultT:
    try:
        return decoder.decode(content).result
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for the URL. Left to aiohttp, it would be looked up for every request."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
