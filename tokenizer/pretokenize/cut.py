"""Cutting text into pre-tokens: the words, numbers, punctuation runs and white space that merges never cross.

The patterns known by name go by arrays (gpt2.py, neighbours.py); others through `regex`, at a fifth of the speed.
"""

from __future__ import annotations

import numpy as np

from .gpt2 import gpt2
from .patterns import GPT2_PATTERN, Pattern, by_neighbours, find_pretokens, is_gpt2
from .text import PADDING, SEPARATOR, Pretokens


def pretokenize(data: bytes, pattern: Pattern = GPT2_PATTERN) -> Pretokens:
    """Pre-tokens of `data`, which is valid UTF-8 but for SEPARATOR bytes (see repair and Specials.mask).

    Equals regex.findall(pattern, text) on each stretch between separators, with every separator a pre-token of its own.
    Text that a custom pattern does not match belongs to no pre-token. Raises ValueError on a pattern that does not
    compile.
    """
    if is_gpt2(pattern):
        return gpt2(data)
    if (neighbours := by_neighbours(pattern)) is not None:
        return neighbours.cut(data)
    return by_expression(data, pattern)


def by_expression(data: bytes, pattern: Pattern) -> Pretokens:
    """pretokenize by the regular-expression engine, whatever the pattern."""
    starts, lengths = [], []
    offset = 0
    for document in data.split(SEPARATOR):
        if offset:
            starts.append(np.array([offset - 1]))
            lengths.append(np.ones(1, np.int64))
        spans = np.array(find_pretokens(document.decode(), pattern), np.int64).reshape(-1, 2)
        if not document.isascii():
            # Character offsets to byte offsets: a character starts at each byte that continues none.
            lead = np.flatnonzero((np.frombuffer(document, np.uint8) & 0xC0) != 0x80)
            spans = np.append(lead, len(document))[spans]
        starts.append(offset + spans[:, 0])
        lengths.append(spans[:, 1] - spans[:, 0])
        offset += len(document) + 1
    return Pretokens(data + PADDING, np.concatenate(starts), np.concatenate(lengths))
