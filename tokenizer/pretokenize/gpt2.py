"""GPT-2's pattern without a regular-expression engine.

A pre-token's boundaries depend only on the classes of neighbouring characters: letter, number, white space, other. Each
byte is translated to its class, neighbours are compared as whole arrays, and the few cases that need more than two
neighbours (the last space of a run, contractions) are corrected where they occur. The result equals
`regex.findall(GPT2_PATTERN, text)` on every text.
"""

from __future__ import annotations

import numpy as np

from .classes import Classes
from .text import PADDING, SEPARATOR, Pretokens

_LETTER, _NUMBER, _OTHER, _SPACE, _SEPARATOR = range(5)
_CLASSES = Classes(((_LETTER, r"\p{L}"), (_NUMBER, r"\p{N}"), (_SPACE, r"\s")), _OTHER, _SEPARATOR, {_SPACE})


def gpt2(data: bytes) -> Pretokens:
    n = len(data)
    padded = data + PADDING
    buffer = np.frombuffer(padded, np.uint8)
    wide = wide_size = separators = np.empty(0, np.int64)
    classes = np.frombuffer(padded.translate(_CLASSES.of_byte), np.uint8)
    if not data.isascii():
        separators = np.flatnonzero(buffer[:n] == SEPARATOR[0])
        classes = classes.copy()
        wide, _, wide_size = _CLASSES.write(classes, buffer, n)

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
