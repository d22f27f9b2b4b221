"""Special tokens in text, in str and in UTF-8.

Specials(tokens).split(text) -> list        ordinary text and special tokens, alternating
Specials(tokens).mask(data) -> bytes        each special token becomes one SEPARATOR byte
Specials(ids).mask_ids(data)                ... and these are the ids of the tokens it replaced, in order
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from os.path import commonprefix

import numpy as np
import regex

from .text import SEPARATOR, utf8

# What Unicode calls white space.
_WHITE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"


class Specials:
    """Special tokens: found leftmost first, and at one place the longest first.

    tokens: those that stand for themselves in a text, with their ids where ids are asked for.
    flags: of a token, what goes with it (definition.Options).
    Raises ValueError on an empty, repeated or not encodable token, and on U+FFFD, which stands for invalid bytes.
    """

    def __init__(
        self, tokens: Iterable[str] | Mapping[str, int], flags: Mapping[str, Collection[str]] | None = None
    ) -> None:
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
        self.id_of = dict(tokens) if isinstance(tokens, Mapping) else {}
        self._id_of_bytes = dict(zip(self.encoded, self.id_of.values(), strict=False))
        self._flags = {token: found for token, found in (flags or {}).items() if token in self.tokens}
        # What all of them begin with; without any of them, what is in no text.
        self.beginning = commonprefix(self.tokens or ["\ud800"])  # noqa: RUF071  # of characters
        self.max_length = max(map(len, self.encoded), default=0) + bool(self._flags)
        longest_first = sorted(self.encoded, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first))) if longest_first else None
        longest = sorted(self.tokens, key=lambda token: len(token.encode()), reverse=True)
        self._text_pattern = regex.compile("|".join(map(self._expression, longest))) if longest else None

    def _expression(self, token: str) -> str:
        """A regular expression whose one group is the token; around it is what goes with it."""
        flags = self._flags.get(token, ())
        found = f"({regex.escape(token)})"
        if "single_word" in flags:
            found = rf"(?<!\w){found}(?!\w)"
        before = rf"{_WHITE}*+" if "lstrip" in flags else ""
        return before + found + (rf"{_WHITE}*+" if "rstrip" in flags else "")

    def split(self, text: str) -> list[str]:
        """The text's parts: ordinary text and special tokens, alternating."""
        # Looking for each token by itself is the faster, and mostly there is not even what all begin with.
        if self._text_pattern is None or self.beginning not in text or not any(token in text for token in self.tokens):
            return [text]
        parts, done = [], 0
        for match in self._text_pattern.finditer(text):
            parts += [text[done : match.start()], match[match.lastindex]]
            done = match.end()
        return [*parts, text[done:]]

    def mask(self, data: bytes) -> bytes:
        """`data` with every special token replaced by one SEPARATOR."""
        if self._pattern is None:
            return data
        if self._flags:
            return SEPARATOR.join(part.encode() for part in self.split(data.decode())[::2])
        if len(self.encoded) == 1:
            return SEPARATOR.join(data.split(self.encoded[0]))  # replace() would count them first, to allocate
        return self._pattern.sub(SEPARATOR, data)

    def mask_ids(self, data: bytes) -> tuple[bytes, np.ndarray]:
        """mask(data), and the ids (int32) of the special tokens, one for each SEPARATOR."""
        masked = self.mask(data)
        if self._pattern is None or masked is data or SEPARATOR not in masked:
            return data, np.empty(0, np.int32)
        if len(self.id_of) == 1:
            return masked, np.full(masked.count(SEPARATOR), next(iter(self.id_of.values())), np.int32)
        if self._flags:
            return masked, np.array([self.id_of[part] for part in self.split(data.decode())[1::2]], np.int32)
        return masked, np.array([self._id_of_bytes[token] for token in self._pattern.findall(data)], np.int32)

    def starts(self, data: bytes, at: int = 0) -> Iterator[int]:
        """Where special tokens start in `data` at or after `at`."""
        if self._pattern is None:
            return
        for match in self._pattern.finditer(data, at):
            # (Else the white space before it would be cut off.)
            if "lstrip" not in self._flags.get(match[0].decode(), ()):
                yield match.start()

    def spans(self, data: bytes) -> list[tuple[int, int]]:
        """Every occurrence in `data` of every token, overlapping ones included, as (start, end)."""
        found = []
        for token in self.encoded:
            at = data.find(token)
            while at >= 0:
                # With flags, what stands beside it matters too.
                found.append((at - bool(self._flags), at + len(token) + bool(self._flags)))
                at = data.find(token, at + 1)
        return found
