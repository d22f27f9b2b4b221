"""Cutting text into pre-tokens: the words, numbers, punctuation runs and white space that merges never cross.

    GPT2_PATTERN                                the default pattern
    utf8(text) -> bytes                         str to UTF-8; a lone surrogate is a ValueError
    repair(data) -> bytes                       bytes.decode("utf-8", errors="replace"), as UTF-8 again
    Specials(tokens).mask(data) -> bytes        each special token becomes one SEPARATOR byte
    Specials(tokens).findall(data) -> list      ... and these are the tokens it replaced, in order
    pretokenize(data, pattern) -> Pretokens     (data, starts, lengths): byte offsets of every pre-token

The GPT-2 pattern is not run through a regular-expression engine. A pre-token's boundaries depend only on the classes
of neighbouring characters: letter, number, white space, other. Each byte is translated to its class, neighbours are
compared as whole arrays, and the few cases that need more than two neighbours (the last space of a run, contractions)
are corrected where they occur. The result equals `regex.findall(GPT2_PATTERN, text)` on every text. Any other pattern
goes through `regex`, at about a fifth of the speed.

Bytes 0xFF never occur in UTF-8, so one stands for a special token: a SEPARATOR ends the text before it as the end of
the text would, and is a pre-token of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import regex

# Radford et al. 2019, as spelt in Stanford CS336; GPT-2's own encoder.py spells the contractions out.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_VECTORISED = {
    GPT2_PATTERN,
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
}

SEPARATOR = b"\xff"
# So that loads of 8 bytes at a pre-token's start, and up to 24 further on, stay inside the buffer.
PADDING = 40 * SEPARATOR

_LETTER, _NUMBER, _OTHER, _SPACE, _SEPARATOR, _MULTIBYTE = range(6)
_CLASSES = ((_LETTER, r"\p{L}+"), (_NUMBER, r"\p{N}+"), (_SPACE, r"\s+"))


class Pretokens(NamedTuple):
    """The pre-tokens of one text, separators included.

    data: the text's bytes, followed by PADDING.
    starts, lengths: (n,) int64, byte offsets into data and lengths in bytes, in the order of the text.
    """

    data: bytes
    starts: np.ndarray
    lengths: np.ndarray

    def tolist(self) -> list[bytes]:
        ends = self.starts + self.lengths
        return [self.data[i:j] for i, j in zip(self.starts.tolist(), ends.tolist(), strict=True)]


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


def utf8(text: str) -> bytes:
    """UTF-8 of `text`. Raises ValueError on a lone surrogate, which has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: {text[error.start]!r} at position {error.start} is a lone surrogate, expected Unicode text"
        ) from None


def repair(data: bytes) -> bytes:
    """`data` as valid UTF-8: each invalid sequence becomes U+FFFD, as in bytes.decode("utf-8", errors="replace")."""
    if data.isascii():
        return data
    try:
        str(data, "utf-8")
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace").encode()
    return data


def pretokenize(data: bytes, pattern: str = GPT2_PATTERN) -> Pretokens:
    """Pre-tokens of `data`, which is valid UTF-8 but for SEPARATOR bytes (see repair and Specials.mask).

    Equals regex.findall(pattern, text) on each stretch between separators, with every separator a pre-token of its own.
    Text that a custom pattern does not match belongs to no pre-token. Raises ValueError on a pattern that does not
    compile.
    """
    if pattern in _VECTORISED:
        return _gpt2(data)
    return _by_regex(data, compile_pattern(pattern))


def is_vectorised(pattern: str) -> bool:
    """Whether `pattern` is GPT-2's, so that texts may be cut inside documents and no regular expression is run."""
    return pattern in _VECTORISED


@cache
def compile_pattern(pattern: str) -> regex.Pattern:
    """`pattern` compiled by `regex`. Raises ValueError, with the reason, when it does not compile."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}") from None


def _by_regex(data: bytes, compiled: regex.Pattern) -> Pretokens:
    starts, lengths = [], []
    offset = 0
    for document in data.split(SEPARATOR):
        if offset:
            starts.append(np.array([offset - 1]))
            lengths.append(np.ones(1, np.int64))
        spans = np.array([m.span() for m in compiled.finditer(document.decode())], np.int64).reshape(-1, 2)
        if not document.isascii():
            # Character offsets to byte offsets: a character starts at each byte that continues none.
            lead = np.flatnonzero((np.frombuffer(document, np.uint8) & 0xC0) != 0x80)
            spans = np.append(lead, len(document))[spans]
        spans = spans[spans[:, 1] > spans[:, 0]]
        starts.append(offset + spans[:, 0])
        lengths.append(spans[:, 1] - spans[:, 0])
        offset += len(document) + 1
    return Pretokens(data + PADDING, np.concatenate(starts), np.concatenate(lengths))


@cache
def _class_of_code_point() -> np.ndarray:
    """(0x110000,) uint8: the class of every code point, as `regex` sees it (its Unicode version, not Python's)."""
    classes = np.full(0x110000, _OTHER, np.uint8)
    code_points = np.arange(0x110000, dtype="<u4")
    code_points[0xD800:0xE000] = 0xE000  # a surrogate is no character; private use has its class
    everything = code_points.tobytes().decode("utf-32-le")
    for class_, pattern in _CLASSES:
        for match in regex.finditer(pattern, everything):
            classes[match.start() : match.end()] = class_
    return classes


def _class_of_byte() -> bytes:
    table = bytearray([_OTHER] * 128 + [_MULTIBYTE] * 128)
    for class_, pattern in _CLASSES:
        for match in regex.finditer(pattern, bytes(range(128)).decode()):
            table[match.start() : match.end()] = bytes([class_]) * len(match[0])
    table[SEPARATOR[0]] = _SEPARATOR
    return bytes(table)


_CLASS_OF_BYTE = _class_of_byte()


def _classify(padded: bytes, buffer: np.ndarray, lead: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The class of every byte (that of its character), and start and length of the white space of several bytes.

    lead: where the characters of several bytes start.
    """
    classes = np.frombuffer(bytearray(padded.translate(_CLASS_OF_BYTE)), np.uint8)
    first = buffer[lead]
    size = 2 + (first >= 0xE0).astype(np.int64) + (first >= 0xF0)
    code = (first & (0x7F >> size)).astype(np.int64)
    for k in (1, 2, 3):
        more = size > k
        code = np.where(more, code << 6 | (buffer[lead + k] & 0x3F), code)
    found = _class_of_code_point()[code]
    for k in range(4):
        more = size > k
        classes[lead[more] + k] = found[more]
    wide = found == _SPACE
    return classes, lead[wide], size[wide]


def _gpt2(data: bytes) -> Pretokens:
    n = len(data)
    padded = data + PADDING
    buffer = np.frombuffer(padded, np.uint8)
    lead = wide = wide_size = separators = np.empty(0, np.int64)
    if not data.isascii():
        high = np.flatnonzero(buffer[:n] >= 0xC0)
        is_separator = buffer[high] == SEPARATOR[0]
        separators, lead = high[is_separator], high[~is_separator]
    if len(lead):
        classes, wide, wide_size = _classify(padded, buffer, lead)
    else:
        classes = np.frombuffer(padded.translate(_CLASS_OF_BYTE), np.uint8)

    # is_start[i]: a pre-token starts at byte i. The end of the text counts as one; padding has the separator's class.
    is_start = np.empty(n + 1, bool)
    is_start[0] = True
    # The class changes, unless the byte before is a space, which belongs to the word that follows it.
    np.not_equal(classes[1 : n + 1], classes[:n], out=is_start[1:])
    is_start[1:] &= buffer[:n] != 0x20
    # \s+(?!\S): the last white space of a run that a word follows is given up to that word.
    space = classes[: n + 1] == _SPACE
    word = classes[: n + 1] < _SPACE
    is_start[1:n] |= space[1:n] & space[: n - 1] & word[2:]
    is_start[separators] = True
    is_start[n] = True

    if len(wide):
        # The rules above look at single bytes; here white space of several bytes is one character again.
        after = wide + wide_size
        for k in (1, 2):
            is_start[(wide + k)[wide_size > k]] = False
        before_is_space = (wide > 0) & (classes[wide - 1] == _SPACE)
        is_start[wide] = ~before_is_space | (classes[after] < _SPACE)
        is_start[after] |= classes[after] != _SPACE

    # Contractions: an apostrophe that starts a pre-token takes the s, d, m, t, ll, ve or re that follows.
    quotes = np.flatnonzero(buffer[:n] == ord("'"))
    if len(quotes):
        quotes = quotes[is_start[quotes]]
        x, y = buffer[quotes + 1], buffer[quotes + 2]
        one = (x == ord("s")) | (x == ord("d")) | (x == ord("m")) | (x == ord("t"))
        two = (x == ord("l")) & (y == ord("l")) | (x == ord("v")) & (y == ord("e")) | (x == ord("r")) & (y == ord("e"))
        is_start[quotes[one | two] + 1] = False
        is_start[quotes[one] + 2] = True
        is_start[quotes[two] + 3] = True

    bounds = np.flatnonzero(is_start)
    return Pretokens(padded, bounds[:-1], np.diff(bounds))
