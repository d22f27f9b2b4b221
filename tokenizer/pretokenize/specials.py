"""Special tokens in text, in str and in UTF-8.

Specials(tokens).split(text) -> list        ordinary text and special tokens, alternating
Specials(tokens).mask(data) -> bytes        each special token becomes one SEPARATOR byte
Specials(ids).mask_ids(data)                ... and these are the ids of the tokens it replaced, in order
"""

from __future__ import annotations

import re
import unicodedata
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
    flags: of a token, what goes with it (definition.Options).  nfc: those that are "normalized" are found in that form.
    Raises ValueError on an empty, repeated or not encodable token, and on U+FFFD, which stands for invalid bytes.
    """

    def __init__(
        self,
        tokens: Iterable[str] | Mapping[str, int],
        flags: Mapping[str, Collection[str]] | None = None,
        *,
        nfc: bool = False,
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
        # A text is less than four times as long as its normal form.
        self._nfc = nfc and any("normalized" in found for found in self._flags.values())
        longest_token = max(map(len, self.encoded), default=0)
        self.max_length = longest_token * (4 if self._nfc else 1) + bool(self._flags)
        longest_first = sorted(self.encoded, key=len, reverse=True)
        self._pattern = re.compile(b"|".join(map(re.escape, longest_first))) if longest_first else None
        longest = sorted(self.tokens, key=lambda token: len(token.encode()), reverse=True)
        passes: tuple[list[str], list[str]] = [], []
        for token in longest:
            passes["normalized" in self._flags.get(token, ())].append(token)
        self._text_pattern, self._second_pattern = map(self._compile, passes)

    def _compile(self, longest_first: list[str]) -> regex.Pattern[str] | None:
        expressions = [self._expression(token, longest_first) for token in longest_first]
        return regex.compile("|".join(expressions)) if expressions else None

    def _expression(self, token: str, others: list[str]) -> str:
        """A regular expression whose one group is the token; around it is what goes with it."""
        flags = self._flags.get(token, ())
        before, after = (rf"{_WHITE}*+" if flag in flags else "" for flag in ("lstrip", "rstrip"))
        escaped = regex.escape(token)
        if before and (
            longer := [regex.escape(other) for other in others if other != token and other.startswith(token)]
        ):
            before += f"(?!{'|'.join(longer)})"
        if "single_word" in flags:
            # Where it is none, another token is looked for behind it.
            return rf"{before}(?<!\w)({escaped})(?!\w){after}|{escaped}(*SKIP)(*FAIL)"
        return f"{before}({escaped}){after}"

    def split(self, text: str) -> list[str]:
        """The text's parts: ordinary text and special tokens, alternating."""
        # Looking for each token by itself is the faster, and mostly there is not even what all begin with.
        seen = text + unicodedata.normalize("NFC", text) if self._nfc else text
        if self.beginning not in seen or not any(token in seen for token in self.tokens):
            return [text]
        parts = _split_by(self._text_pattern, text)
        if self._second_pattern is None:
            return parts
        found: list[str] = []
        for i, part in enumerate(parts):
            ordinary = unicodedata.normalize("NFC", part) if self._nfc and not i % 2 else part
            found += [part] if i % 2 else _split_by(self._second_pattern, ordinary)
        return found

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
            # (Else the white space before it would be cut off, or it might be none.)
            if not {"lstrip", "normalized"} & {*self._flags.get(match[0].decode(), ())}:
                yield match.start()

    def across(self, before: bytes, after: bytes) -> bool:
        """Whether a token may lie across the place between."""
        sides = [(before, after)]
        if self._nfc:
            sides.append((_normal_form(before), _normal_form(after)))
        return any(start < len(left) < stop for left, right in sides for start, stop in self.spans(left + right))

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


def _split_by(pattern: regex.Pattern[str] | None, text: str) -> list[str]:
    """The text's parts: what is no match, and the group of what is, alternating."""
    parts, done = [], 0
    for match in pattern.finditer(text) if pattern else ():
        parts += [text[done : match.start()], match[match.lastindex]]
        done = match.end()
    return [*parts, text[done:]]


def _normal_form(data: bytes) -> bytes:
    return unicodedata.normalize("NFC", data.decode(errors="ignore")).encode()
