"""Special tokens in text.

Specials(tokens).mask(data) -> bytes        each special token becomes one SEPARATOR byte
Specials(tokens).findall(data) -> list      ... and these are the tokens it replaced, in order
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from .text import SEPARATOR, utf8


class Specials:
    """Special tokens: found leftmost first, and at one place the longest first.

    Raises ValueError on an empty, repeated or not encodable token, and on U+FFFD, which stands for invalid bytes.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        if isinstance(tokens, str):
            raise ValueError(f"special_tokens: got the string {tokens!r}, expected a list of strings")
        self.tokens = tuple(tokens)
        for token in self.tokens:
            if not isinstance(token, str) or not token or "\ufffd" in token:
                raise ValueError(f"special_tokens: got {token!r}, expected non-empty strings without U+FFFD")
        if len(set(self.tokens)) < len(self.tokens):
            twice = next(token for token in self.tokens if self.tokens.count(token) > 1)
            raise ValueError(f"special_tokens: {twice!r} is given more than once")
        self.encoded = tuple(utf8(token) for token in self.tokens)
        self.max_length = max(map(len, self.encoded), default=0)
        longest_first = sorted(self.encoded, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first))) if longest_first else None

    def mask(self, data: bytes) -> bytes:
        """`data` with every special token replaced by one SEPARATOR."""
        if self._pattern is None:
            return data
        if len(self.encoded) == 1:
            return SEPARATOR.join(data.split(self.encoded[0]))  # replace() would count them first, to allocate
        return self._pattern.sub(SEPARATOR, data)

    def findall(self, data: bytes) -> list[bytes]:
        """The special tokens in `data`, in order: one for each SEPARATOR of mask(data)."""
        return [] if self._pattern is None else self._pattern.findall(data)

    def starts(self, data: bytes, at: int = 0) -> Iterator[int]:
        """Where special tokens start in `data` at or after `at`."""
        return iter(()) if self._pattern is None else (match.start() for match in self._pattern.finditer(data, at))

    def spans(self, data: bytes) -> list[tuple[int, int]]:
        """Every occurrence in `data` of every token, overlapping ones included, as (start, end)."""
        found = []
        for token in self.encoded:
            at = data.find(token)
            while at >= 0:
                found.append((at, at + len(token)))
                at = data.find(token, at + 1)
        return found
