"""What happens to every HTTP request before and after the routes: keys, rates, limits, counting. Pure ASGI.

Station: between uvicorn and `service`. A request that may not come in costs no JSON and no tower.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever.keys import Keys, Rates
from retriever.metrics import Metrics
from retriever.problems import ProblemError, problem_response

GUARDED = "/v1/"
"""Paths under it want a key (where keys are set) and count as in flight; probes and metrics are open."""

CHARGE = "charge"
"""Name in a request's state of what a route calls with how many more requests the one that was let in stands for."""

_ROUTE_OF_PATH = {
    "/v1/candidates": "candidates",
    "/v1/candidates:batch": "batch",
    "/v1/query": "query",
    "/v1/similar": "similar",
    "/v1/version": "version",
    "/healthz": "alive",
    "/readyz": "ready",
    "/metrics": "metrics",
    "/openapi.json": "openapi",
}
_DRAINED_BODIES = 16
"""A body that is too large is read and thrown away up to so many times the limit, then the connection is closed."""


class _ClientGone(Exception):
    """The caller hung up before its request was whole."""


class Gate:
    """ASGI middleware: checks key and rate, bounds requests in flight, bounds the body's size and time, and counts."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        keys: Keys,
        rates: Rates,
        max_body_bytes: int,
        body_timeout_seconds: float,
        max_in_flight: int,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = keys
        self._rates = rates
        self._max_body_bytes = max_body_bytes
        self._body_timeout_seconds = body_timeout_seconds
        self._max_in_flight = max_in_flight
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        guarded = scope["path"].startswith(GUARDED)
        self._count(guarded)
        try:
            if guarded:
                caller = self._check_caller(scope)
                scope.setdefault("state", {})[CHARGE] = partial(self._rates.charge, caller)
                self._check_in_flight()
            body = await self._read_body(Headers(scope=scope), receive)
            await self._app(scope, _replay(body, receive), send_and_note)
        except ProblemError as error:
            await problem_response(error, {"connection": "close"})(scope, receive, send_and_note)
        except _ClientGone:
            status = 499
        finally:
            self._count(guarded, -1)
            route = _route_of(scope["path"])
            self._metrics.requests.labels(route, f"{status // 100}xx").inc()
            if route == "candidates" and status == 200:
                self._metrics.request_seconds.labels("whole").observe(time.perf_counter() - started)

    def _count(self, guarded: bool, step: int = 1) -> None:
        if guarded:
            self._in_flight += step
            self._metrics.in_flight.set(self._in_flight)

    def _check_in_flight(self) -> None:
        if self._in_flight > self._max_in_flight:
            self._metrics.refused.labels("overload").inc()
            raise ProblemError("overloaded", f"{self._max_in_flight} requests are under way; try again later")

    def _check_caller(self, scope: Scope) -> bytes:
        """Whose request it is: it has a key, where one is wanted, and its caller is not above their rate."""
        caller = str((scope.get("client") or ("",))[0]).encode()
        if self._keys.are_wanted:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            key = self._keys.fitting(given.strip())
            if scheme.lower() != "bearer" or key is None:
                self._check_rate(caller)  # who guesses is slowed down
                self._metrics.refused.labels("key").inc()
                raise ProblemError("unauthorized", "send one of the service's keys as `Authorization: Bearer KEY`")
            caller = key
        self._check_rate(caller)
        return caller

    def _check_rate(self, caller: bytes) -> None:
        if seconds := self._rates.seconds_to_wait(caller):
            self._metrics.refused.labels("rate").inc()
            reason = f"more requests than the rate limit allows; try again in {seconds} s"
            raise ProblemError("too-many-requests", reason, retry_after_seconds=seconds)

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body. One that is too large is read on for a while, or its sender would miss the 413."""
        length = headers.get("content-length", "")
        declared = int(length) if length.isdecimal() else 0
        body = bytearray()
        size = 0
        try:
            async with asyncio.timeout(self._body_timeout_seconds):
                while max(size, declared) <= _DRAINED_BODIES * self._max_body_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientGone
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self._max_body_bytes:
                        body += part
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            reason = f"the body must be here within {self._body_timeout_seconds:g} s"
            raise ProblemError("body-timeout", reason) from None
        if max(size, declared) > self._max_body_bytes:
            raise ProblemError("body-too-large", f"a body may have {self._max_body_bytes} bytes at most")
        return bytes(body)


def _route_of(path: str) -> str:
    """The label of `metrics.ROUTES` for a path, whether or not the request comes as far as its route."""
    if path.startswith("/v1/users/") and path.endswith("/history"):
        return "history"
    return _ROUTE_OF_PATH.get(path, "other")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, then goes on with the caller's."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
