"""Merges of a vocabulary, found by their bytes for whole arrays: no Python object for a merge or a token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..tokens import TokenBytes
from ..wordkeys import MULTIPLIER, KeyTable, mix

_INVERSE = np.uint64(pow(int(MULTIPLIER), -1, 1 << 64))
# Tokens looked up at a time: their arrays stay in the cache.
_TOKENS = 1 << 13


def find_merges(tokens: TokenBytes, data: np.ndarray, middles: np.ndarray, stops: np.ndarray) -> np.ndarray | None:
    """Merges as Definition.pairs has them; None if a token is not in the vocabulary, or is there more than once.

    data: (bytes,) uint8, the tokens that the merges make, one after another.
    middles, stops: (n,) int64, where in it the second part of each begins, and where each ends.
    """
    starts = np.append(0, stops[:-1])
    table = _table(tokens)
    if table is None:
        return None
    pairs = np.empty((len(stops), 3), np.int32)
    for i in range(0, len(stops), _TOKENS):
        start, middle, stop = (array[i : i + _TOKENS] for array in (starts, middles, stops))
        keys_of = _hashing(data, start[0], stop[-1])
        for column, span in enumerate(((start, middle), (middle, stop), (start, stop))):
            keys = keys_of(*span)
            pairs[i : i + _TOKENS, column] = table.get(keys, mix(keys)) - 1
    # What was found by its hash must have the bytes too.
    expected = middles - starts, stops - middles, stops - starts
    for ids, sizes in zip(pairs.T, expected, strict=True):
        if (ids < 0).any() or (tokens.sizes.take(ids) != sizes).any():
            return None
    same = tokens.join(pairs[:, :2]) == tokens.join(pairs[:, 2]) == data.tobytes()
    return pairs if same else None


def _table(tokens: TokenBytes) -> KeyTable | None:
    """Hashes of all tokens, with their ids + 1; None if two have the same."""
    ids = np.flatnonzero(tokens.sizes)
    data = np.frombuffer(tokens.join(ids), np.uint8)
    stops = np.cumsum(tokens.sizes.take(ids))
    starts = np.append(0, stops[:-1])
    table = KeyTable.of(1, (2 * len(ids)).bit_length(), np.int32)
    for i in range(0, len(ids), _TOKENS):
        start, stop = starts[i : i + _TOKENS], stops[i : i + _TOKENS]
        keys = _hashing(data, start[0], stop[-1])(start, stop)
        slots, _ = table.find(keys, mix(keys))
        table.values[slots] = ids[i : i + _TOKENS] + 1
    return table if table.n == len(ids) else None


def _hashing(data: np.ndarray, first: int, last: int) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    """A function that gives spans of data[first:last] a key, the sum of (byte + 1) * MULTIPLIER^i, i from its start on.

    (Karp & Rabin 1987.) From sums over data[first:] it follows by two look-ups and a product with MULTIPLIER^-start.
    """
    powers, inverses = np.full((2, last - first + 1), [[MULTIPLIER], [_INVERSE]], np.uint64)
    for each in powers, inverses:
        each[0] = 1
        np.cumprod(each, out=each)
    sums = np.zeros(len(powers), np.uint64)
    np.cumsum((data[first:last] + np.uint64(1)) * powers[:-1], out=sums[1:])

    def keys_of(starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
        starts = starts - first
        return [(sums.take(stops - first) - sums.take(starts)) * inverses.take(starts)]

    return keys_of
