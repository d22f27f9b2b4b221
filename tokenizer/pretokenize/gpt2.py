"""GPT-2's pattern without a regular-expression engine.

A pre-token's boundaries depend only on the classes of neighbouring characters: letter, number, white space, other. Each
byte is translated to its class, neighbours are compared as whole arrays, and the few cases that need more than two
neighbours (the last space of a run, contractions) are corrected where they occur. The result equals
`regex.findall(GPT2_PATTERN, text)` on every text.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import regex

from .text import PADDING, SEPARATOR, Pretokens

_LETTER, _NUMBER, _OTHER, _SPACE, _SEPARATOR, _MULTIBYTE = range(6)
_CLASSES = ((_LETTER, r"\p{L}+"), (_NUMBER, r"\p{N}+"), (_SPACE, r"\s+"))


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


def gpt2(data: bytes) -> Pretokens:
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
