"""Damaged inputs: bytes of good ones with bits flipped, parts cut, doubled, exchanged, words of the format put in."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

_NUMBERS = (
    b"0", b"-0", b"-1", b"1", b"255", b"256", b"65536", b"2147483648", b"4294967296", b"9223372036854775807",
    b"9223372036854775808", b"18446744073709551616", b"1e999", b"-1e999", b"1e-999", b"0.1", b"1e15", b"253402300800",
    b"9" * 400, b"9" * 5000,
)  # fmt: skip
_BYTES = (0x00, 0x01, 0x0A, 0x20, 0x22, 0x2C, 0x30, 0x5B, 0x5C, 0x7B, 0x7D, 0x7F, 0x80, 0xC0, 0xED, 0xFE, 0xFF)
_DIGITS = re.compile(rb"-?\d+(?:\.\d+)?")
_NUM_CHANGES = (1, 1, 1, 2, 3, 5)
_MAX_BYTES = 200_000

JSON_WORDS = (
    b"null", b"true", b"false", b"NaN", b"Infinity", b"-Infinity", b"{}", b"[]", b'""', b'"', b",", b":", b"{", b"}",
    b"[", b"]", b"\\ud800", b"\\u0000", b'"\\ud800\\udc00"', b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"[" * 3000,
    b'{"a":' * 2000, b"\\q", b"\\", b"\xc3\xa9", b"\x00",
)  # fmt: skip


class Mutator:
    """Endless damaged inputs; the same ones for the same seed."""

    def __init__(self, corpus: Sequence[bytes], words: Sequence[bytes] = (), seed: int = 0) -> None:
        """
        Args:
            corpus: good inputs.
            words: parts of the format that may stand anywhere.
            seed: of every choice.
        """
        self._corpus = list(corpus)
        self._good = frozenset(corpus)
        self._words = [*words, *_NUMBERS]
        self._random = random.Random(seed)

    def mutated(self) -> bytes:
        """An input that is none of the good ones."""
        chosen = self._random
        while True:
            data = bytearray(chosen.choice(self._corpus))
            for _ in range(chosen.choice(_NUM_CHANGES)):
                self._change(data)
            if (changed := bytes(data[:_MAX_BYTES])) not in self._good:
                return changed

    def _change(self, data: bytearray) -> None:
        chosen = self._random
        size = len(data)
        at = chosen.randrange(size + 1)
        end = min(size, at + chosen.choice((1, 1, 2, 4, 8, 32, 128)))
        kind = chosen.randrange(10)
        if kind == 0 and at < size:
            data[at] ^= 1 << chosen.randrange(8)
        elif kind == 1 and at < size:
            data[at] = chosen.choice(_BYTES)
        elif kind == 2:
            data[at:at] = chosen.choice(self._words)
        elif kind == 3:
            del data[at:end]
        elif kind == 4:
            data[at:at] = data[at:end]
        elif kind == 5:
            del data[at:]
        elif kind == 6 and (found := list(_DIGITS.finditer(data))):
            number = chosen.choice(found)
            data[number.start() : number.end()] = chosen.choice(_NUMBERS)
        elif kind == 7:
            other = chosen.choice(self._corpus)
            data[at:] = other[chosen.randrange(len(other) + 1) :]
        elif kind == 8:
            there = chosen.randrange(size + 1)
            data[at:end] = data[there : there + end - at]
        else:
            data[at:end] = chosen.choice(self._words)
