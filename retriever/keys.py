"""Who may come in, and how often: API keys, from the settings and from a file that may change, and a rate for each.

Station: asked by `gate` for every request to /v1/*. It knows no HTTP. Keys are kept as digests, so that neither memory
nor the time that a comparison takes says more than whether one fits.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
from pydantic import SecretStr

from retriever.metrics import Metrics

MIN_KEY_LENGTH = 16
"""Characters."""
MAX_CALLERS = 10_000
"""Callers whose rate is remembered, those who came last; 200 bytes each."""
_LOOK_SECONDS = 1.0

log = structlog.get_logger(__name__)


class KeyFileError(ValueError):
    """The file cannot be read, or a line of it is no key: says which line, never what stands there."""


class Keys:
    """The keys that open the service now.

    The file holds one key a line; empty lines and those that begin with # are passed over. It is looked at once a
    second, when somebody asks. While it cannot be read, the keys that it held before stay good.
    """

    def __init__(
        self,
        api_keys: Sequence[SecretStr],
        file: Path | None,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the file for the first time.

        Args:
            api_keys: keys that never change.
            file: further keys; None: there are none.
            metrics: failures to read the file are counted there.
            clock: seconds that never go back.

        Raises:
            KeyFileError: it cannot be used.
        """
        self._fixed = [_digest(key.get_secret_value()) for key in api_keys]
        self._file, self._metrics, self._clock = file, metrics, clock
        self.are_wanted = bool(api_keys) or file is not None
        """Whether a key is needed at all. A file without keys lets nobody in."""
        self._stamp = _stamp(file)
        self._of_file = [] if file is None else read_keys(file)
        self._looked = clock()

    def fitting(self, given: str) -> bytes | None:
        """What the given key is called in `Rates`, or None if it is no key of this service.

        It is compared with every key, each in constant time: the time taken says nothing about them.
        """
        self._look()
        digest = _digest(given)
        fits = [hmac.compare_digest(digest, key) for key in self._fixed + self._of_file]
        return digest if any(fits) else None

    def _look(self) -> None:
        if self._file is None or self._clock() < self._looked + _LOOK_SECONDS:
            return
        self._looked = self._clock()
        if (stamp := _stamp(self._file)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._of_file = read_keys(self._file)
        except KeyFileError as error:
            self._metrics.key_file_failures.inc()
            log.error("keys not read again, those before stay good", reason=str(error))
        else:
            log.info("keys read again", num_keys=len(self._of_file))


class Rates:
    """A bucket of tokens for each caller: one for each request, `burst` at most, `per_second` come back each second.

    What several requests in one call take is taken once the call is let in, so that there may be less than nothing in
    the bucket: such a call is never refused for its size, and the next one waits the longer.

    A caller who is forgotten for others' sake begins with a full bucket; that is what bounds the memory.
    """

    def __init__(
        self,
        per_second: float,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
        max_callers: int = MAX_CALLERS,
    ) -> None:
        """
        Args:
            per_second: > 0, or 0: nobody is ever held back.
            burst: ≥ 1.
            clock: seconds that never go back.
            max_callers: ≥ 1.
        """
        self._per_second, self._burst = per_second, burst
        self._clock, self._max_callers = clock, max_callers
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """Callers that are remembered."""
        return len(self._buckets)

    def seconds_to_wait(self, caller: bytes) -> int:
        """0 if the caller may make a request, which is then counted; else the whole seconds until they may."""
        if not self._per_second:
            return 0
        now = self._clock()
        tokens, then = self._buckets.pop(caller, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - then) * self._per_second)
        may = tokens >= 1
        self._buckets[caller] = (tokens - 1 if may else tokens, now)
        if len(self._buckets) > self._max_callers:
            self._buckets.popitem(last=False)
        return 0 if may else max(1, math.ceil((1 - tokens) / self._per_second))

    def charge(self, caller: bytes, num_requests: int) -> None:
        """Counts further requests of a caller who was let in."""
        if caller in self._buckets:
            tokens, then = self._buckets[caller]
            self._buckets[caller] = (tokens - num_requests, then)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _stamp(file: Path | None) -> tuple[int, ...] | None:
    """What changes when the file does; None where it is not there."""
    try:
        found = None if file is None else os.stat(file)
    except OSError:
        return None
    return None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns)


def read_keys(file: Path) -> list[bytes]:
    """The digests of the keys in a file.

    Raises:
        KeyFileError: see there.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise KeyFileError(f"{file} cannot be read: {reason}") from None
    keys = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if len(line) < MIN_KEY_LENGTH or not line.isascii() or " " in line:
            problem = f"a key has {MIN_KEY_LENGTH} characters or more, ASCII without spaces"
            raise KeyFileError(f"{file}, line {number}: {problem}")
        keys.append(_digest(line))
    return keys
