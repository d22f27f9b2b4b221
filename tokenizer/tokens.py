"""Tokens as arrays: the bytes of every id, and ids back to bytes. A leaf: it imports nothing of this package."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping
from itertools import repeat
from operator import itemgetter
from typing import Any

import numpy as np

# Ids decoded at a time, so that the arrays stay in the second-level cache.
_BLOCK = 1 << 15
# Ids below which joining Python objects costs less than starting up the arrays.
_SHORT = 800


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """arange(starts[0], starts[0] + counts[0]), arange(starts[1], ...), ... in one array."""
    source = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    source += np.arange(len(source))
    return source


def _join_many(tokens: list[bytes]) -> bytes:
    """b"".join(tokens), which takes notes of 80 bytes on each of what it joins: so not of all at once."""
    return b"".join([b"".join(tokens[i : i + _SHORT]) for i in range(0, len(tokens), _SHORT)])


class TokenBytes:
    """The bytes of every token, for look-ups of whole arrays.

    sizes: (vocab_size,) int64, each token's bytes; 0 where the vocabulary has no such id.
    ints: (vocab_size,) objects, the vocabulary's own int for each id.
    """

    def __init__(self, vocab: Mapping[int, bytes]) -> None:
        ids = np.fromiter(vocab, np.int64, len(vocab))
        self.ints = np.empty(int(ids.max()) + 1, object)
        self.ints[ids] = list(vocab)
        self._has_gaps = len(ids) < len(self.ints)
        in_order = not self._has_gaps and (ids[1:] > ids[:-1]).all()
        tokens = list(vocab.values() if in_order else map(vocab.get, range(len(self.ints)), repeat(b"")))
        self.sizes = np.fromiter(map(len, tokens), np.int64, len(tokens))
        self._index(_join_many(tokens) + bytes(8))
        # None, which cannot be joined, where there is no token.
        self._tokens: list[Any] = [token or None for token in tokens] if self._has_gaps else tokens

    def _index(self, data: bytes) -> None:
        self._data = data
        self._offsets = np.cumsum(self.sizes) - self.sizes
        # Eight bytes from every offset of the tokens' bytes, and those at which each token starts.
        self._loads = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
        self._heads = self._loads[self._offsets]

    def __getstate__(self) -> tuple[np.ndarray, bytes, bool]:
        # Who gets it pickled encodes, by arrays, and has no need of Python objects for 100,000 tokens.
        return self.sizes, self._data, self._has_gaps

    def __setstate__(self, state: tuple[np.ndarray, bytes, bool]) -> None:
        self.sizes, data, self._has_gaps = state
        self._index(data)

    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Each token's first and last byte (uint8); anything where the vocabulary has no such id."""
        return self._heads.astype(np.uint8), self._loads[self._offsets + self.sizes - 1].astype(np.uint8)

    def matrix(self, ids: np.ndarray, length: int) -> np.ndarray:
        """(length, n) uint8, the bytes of tokens of that length, a token a column."""
        offsets = self._offsets.take(ids) + np.arange(length)[:, None]
        return np.frombuffer(self._data, np.uint8).take(offsets)

    def missing(self) -> re.Pattern[bytes] | None:
        """A byte of UTF-8 that is no token; None where every byte is one."""
        there = {self._tokens[i][0] for i in np.flatnonzero(self.sizes == 1)}
        # 0xff, which stands for special tokens in a text, is in no UTF-8
        found = b"".join(rb"\x%02x" % byte for byte in range(0xFF) if byte not in there)
        return re.compile(b"[%s]" % found) if found else None

    def join(self, ids: Iterable[int]) -> bytes:
        """The tokens' bytes, one after another, of arrays and tensors row after row.

        Raises ValueError on an id that is not in the vocabulary.
        """
        if hasattr(ids, "__array__"):
            array_of_ids = np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids).reshape(-1)
            if array_of_ids.dtype.kind not in "iu" and len(array_of_ids):
                raise ValueError(f"ids: got {array_of_ids.dtype}, expected integers")
        else:
            ids = ids if isinstance(ids, list) else list(ids)
            try:
                # Of an array's types one that takes a list fastest, and that refuses negative numbers.
                numbers = array("Q", ids)
                if len(ids) < _SHORT:
                    # A third less than map() takes; of one id itemgetter() makes no tuple.
                    return b"".join(itemgetter(*ids)(self._tokens) if len(ids) > 1 else [self._tokens[i] for i in ids])
            except (TypeError, OverflowError, IndexError):
                raise self._not_in_vocabulary(ids) from None
            array_of_ids = np.frombuffer(numbers, np.uint64)
        # Where a number has the sign bit set, it is negative or beyond every vocabulary.
        signed = array_of_ids
        if signed.dtype.kind == "u":
            signed = signed.astype(np.uint64, copy=False).view(np.int64)
        if len(signed) and signed.min() < 0:
            raise self._not_in_vocabulary(array_of_ids)
        return b"".join([self._join(signed[i : i + _BLOCK]) for i in range(0, len(signed), _BLOCK)])

    def _join(self, ids: np.ndarray) -> memoryview:
        try:
            sizes = self.sizes.take(ids)
        except IndexError:
            raise self._not_in_vocabulary(ids) from None
        if self._has_gaps and not sizes.all():
            raise self._not_in_vocabulary(ids)
        ends = sizes.cumsum()
        starts = ends - sizes
        joined = bytearray(int(ends[-1]) + 8)
        # Eight bytes are written at a time, whatever a token has of them. What is too much, seven bytes at most, lies
        # in the first eight of tokens that follow; these are written last, and in the tokens' order.
        writes = np.ndarray(len(joined) - 7, "<u8", joined, strides=(1,))
        n = 8
        longer = (sizes > n).nonzero()[0]
        while len(longer):
            writes[starts.take(longer) + n] = self._loads[self._offsets.take(ids.take(longer)) + n]
            n += 8
            longer = longer[sizes.take(longer) > n]
        writes[starts] = self._heads.take(ids)
        return memoryview(joined)[:-8]

    def _not_in_vocabulary(self, ids: Iterable[int]) -> ValueError:
        known = set(self.sizes.nonzero()[0].tolist())
        i = next(i for i in ids if not isinstance(i, (int, np.integer)) or i not in known)
        return ValueError(f"ids: {i} is not in the vocabulary, expected 0 <= id < {len(self.sizes)}")
